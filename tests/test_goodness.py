"""goodness, goodness_loss and goodness_step against autograd of the eager formulation in float64."""

import contextlib
import os

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import (
    LAYOUTS,
    assert_as_exact,
    eager_goodness,
    eager_layer_norm,
    eager_loss,
    op_arguments,
    planned_for,
    same_bits,
)
from torch import nn

import fastff.functional as ff
from fastff.nn import FFConv2d, GoodnessHead
from fastff.ops.goodness import ROWS
from fastff.spec import Hidden, Loss, Normalization, Projection, Step

# With TRITON_INTERPRET=1 this file tests the Triton kernels, interpreted, and nothing else (test_triton.py runs it so).
TRITON = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ["triton"] if TRITON else [row.name for row in ROWS if row.name != "triton"]
DTYPES = (
    (torch.float32, torch.bfloat16, torch.float16)
    if TRITON
    else (torch.float32, torch.float64, torch.bfloat16, torch.float16)
)
RUNS = [
    (dtype, row.name)
    for row in ROWS
    for dtype in DTYPES
    if row.name in IMPLEMENTATIONS and row.can_run(torch.zeros(1, 1, 1, 1, dtype=dtype)) is None
]
IN_FLOAT64 = [impl for impl in IMPLEMENTATIONS if impl != "native"]
NAMES = ("x", "weight", "bias", "grid_weight", "hidden_weight", "hidden_bn_weight", "hidden_bn_bias")
EXAMPLES = int(os.environ.get("FASTFF_EXAMPLES", 25 if TRITON else 60))
# bytes of temporaries: this machine's; a few samples or classes at a time; one at a time
BUDGETS = (None, 16, 400, 4000)


def plain_dtype(dtype):
    """What plain PyTorch may compute in to be compared with: the Triton kernels multiply 16-bit numbers as they are."""
    return dtype if TRITON else compute_dtype(dtype)


def compute_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@st.composite
def problems(draw, dtype):
    """A call: canonical values in float64 (rounded to its dtype), what is handed in, and how."""
    B, C, K = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.sampled_from([1, 2, 3, 7, 11, 40]))
    H, W = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rank = draw(st.sampled_from([4, 4, 4, 3, 2]))
    H, W = {4: (H, W), 3: (1, W), 2: (1, 1)}[rank]
    squares, grid = (
        draw(st.booleans()) or draw(st.booleans()),
        draw(st.sampled_from([None, None, (1, 1), (2, 2), (3, 2), (4, 4), (12, 1)])),
    )
    squares = squares or grid is None
    kernel = draw(st.sampled_from([1, 1, 1, 3, 5])) if squares else 1
    padding = kernel // 2
    if kernel > 1 and min(H, W) >= kernel:
        padding = draw(st.sampled_from([0, 1, kernel // 2]))
    bias = squares and draw(st.booleans())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def values(scale, *shape, offset=0.0):
        return (torch.randn(shape, dtype=torch.float64, generator=generator) * scale + offset).to(dtype)

    x = values(1.0, B, C, H, W, offset=draw(st.sampled_from([0.0, 0.0, 2.0])))
    layout = draw(st.sampled_from(sorted(LAYOUTS)))
    channel_dim = draw(st.sampled_from([1, -1])) if rank > 2 else 1
    if rank == 2:
        shown = x[:, :, 0, 0]
    elif channel_dim == -1:
        shown = x.permute(0, 2, 3, 1) if rank == 4 else x[:, :, 0].mT
    else:
        shown = x if rank == 4 else x[:, :, 0]
    given_x, around = LAYOUTS[layout](shown)
    back = {1: lambda t: t, -1: lambda t: t.movedim(-1, 1)}[channel_dim]
    x = back(given_x).reshape(B, C, H, W)
    weight = values((2 / (C * kernel**2)) ** 0.5, K, C, kernel, kernel) if squares else None
    M = draw(st.sampled_from([0, 0, 1, 5])) if grid else 0  # of a hidden layer
    grid_weight = values((1 / (M or C)) ** 0.5, K, M or C, *grid) if grid else None
    hidden, statistics = [None] * 3, (1e-5, None, None)
    if M:
        one_value = B * min(H, grid[0]) * min(W, grid[1]) == 1
        hidden = [
            values((1 / C) ** 0.5, M, C),
            *(values(0.3, M, offset=o) if draw(st.booleans()) else None for o in (1, 0)),
        ]
        if one_value or draw(st.booleans()):
            statistics = (1e-3, values(0.3, M), values(0.3, M).abs() + 0.1)
    algorithms = ["auto", "direct"] + ["second_moment"] * (kernel == 1)
    parameter_layout = draw(st.sampled_from(["contiguous", "slice", "every other", "batch inside"]))
    memories = [around]

    def lay(t):
        if t is None:
            return None
        t, memory = LAYOUTS[parameter_layout if t.dim() > 1 else "every other"](t)
        memories.append(memory)
        return t

    return {
        "canonical": (x, weight, values(0.5, K) if bias else None, grid_weight, *hidden),
        "statistics": statistics,
        "x": given_x,
        "lay": lay,
        "memories": memories,
        "flat_weight": kernel == 1 and draw(st.booleans()),
        "options": {"padding": padding, "channel_dim": channel_dim, "algorithm": draw(st.sampled_from(algorithms))},
        "budget": draw(st.sampled_from(BUDGETS)),
        "target": torch.randint(K, (B,), generator=generator),
        "d": torch.randn(B, K, generator=generator, dtype=torch.float64),
        "loss": {
            "margin": draw(st.sampled_from([0.0, 1.5])),
            "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
            "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        },
        "tau": draw(st.sampled_from([1.0, 0.3])),
        "learn_tau": draw(st.booleans()),
    }  # fmt: skip


def handed_in(problem):
    """(weight, bias, grid_weight, and those of a hidden layer) as users hand them in."""
    weight, *others = problem["canonical"][1:]
    if weight is not None and problem["flat_weight"]:
        weight = weight[:, :, 0, 0]
    return [problem["lay"](t) for t in (weight, *others)]


def hidden_of(problem, parameters):
    """The Hidden layer of these parameters, or None."""
    return None if parameters[3] is None else Hidden(*parameters[3:], *problem["statistics"])


def eager_head(problem, leaves, norm=None):
    """Goodness of leaves (x, weight, bias, grid_weight, and those of a hidden layer) by `eager_goodness`, in their dtype."""
    x, weight, bias, grid_weight, *hidden = leaves
    eps, *statistics = problem["statistics"]
    statistics = [None if t is None else t.to(x.dtype, copy=True) for t in statistics]
    hidden = None if hidden[0] is None else (*hidden, eps, *statistics)
    return eager_goodness(x, weight, bias, grid_weight, problem["options"]["padding"], hidden, norm)


def eager_gradients(tensors, dtype, scalar):
    """(result, {name: gradient}) of scalar(*tensors as leaves of `dtype`) -> (anything, number)."""
    leaves = [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]
    result, number = scalar(*leaves)
    given = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(number, given, allow_unused=True))
    grads = [None if t is None else next(found) for t in leaves]
    return result, [
        torch.zeros_like(t) if g is None and t is not None else g for g, t in zip(grads, leaves, strict=True)
    ]


def magnitudes(problem, d):
    """g and its gradients with every term of every sum positive. Leaves out problems whose hidden layer has values close to the kink of ReLU."""
    tensors = [None if t is None else t.double() for t in problem["canonical"]]
    spread = 1.0
    if tensors[4] is not None:
        signed, (eps, mean, var) = [], problem["statistics"]
        eager_head(problem, tensors, lambda z: signed.append(z) or z)
        z = signed[0]
        if mean is None:
            var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
        mean, rstd = column(mean.double()), column(var.double() + eps).rsqrt()
        largest = float(((z.abs() + mean.abs()) * rstd).max())
        assume(float(affine((z - mean) * rstd, *tensors[5:]).abs().min()) > 1e-5 * (1 + largest))
        spread = (
            2 + largest**2
        )  # batch norm's gradient has three terms: dL/dh, its mean, and h times the mean of dL/dh h

    def scalar(*leaves):
        norm = lambda z: affine((z + mean.abs()) * rstd, *leaves[5:])  # noqa: E731
        g = eager_head(problem, leaves, norm if tensors[4] is not None else None)
        return g, (g * d.abs()).sum()

    g, grads = eager_gradients([None if t is None else t.abs() for t in tensors], torch.float64, scalar)
    return g, [t if t is None or i not in (0, 4) else t * spread for i, t in enumerate(grads)]


def column(v):
    return v[:, None, None]


def affine(h, weight, bias):
    h = h if weight is None else h * column(weight)
    return h if bias is None else h + column(bias)


@contextlib.contextmanager
def unchanged(tensors):
    before = [t.clone() for t in tensors]
    yield
    for t, was in zip(tensors, before, strict=True):
        assert same_bits(t, was), "an input, or the memory around it, was written to"


def shown_as(problem, t):
    """A canonical [B, C, H, W] tensor as x was handed in."""
    x = problem["x"]
    if x.dim() == 2:
        return t[:, :, 0, 0]
    t = t if x.dim() == 4 else t[:, :, 0]
    return t.movedim(1, -1) if problem["options"]["channel_dim"] == -1 else t


@pytest.mark.parametrize(("dtype", "impl"), RUNS)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_goodness_and_its_gradients(data, dtype, impl):
    """Values, first derivatives for any cotangent, inputs and their surroundings untouched, the same bits twice."""
    problem = data.draw(problems(dtype))
    tensors, d = problem["canonical"], problem["d"]

    def scalar(*leaves):
        g = eager_head(problem, leaves)
        return g, (g * d.to(g.dtype)).sum()

    exact_g, exact = eager_gradients(tensors, torch.float64, scalar)
    plain_g, plain = eager_gradients(tensors, plain_dtype(dtype), scalar)
    large_g, large = magnitudes(problem, d)
    parameters = handed_in(problem)
    memories = [t for t in (problem["x"], *parameters, *problem["memories"]) if t is not None]
    with unchanged(memories), planned_for(problem["budget"]):
        runs = []
        for _ in range(2):
            leaves = [None if t is None else t.detach().requires_grad_() for t in (problem["x"], *parameters)]
            x, weight, bias, grid_weight, *_ = leaves
            hidden = hidden_of(problem, leaves[1:])
            g = ff.goodness(x, weight, bias, grid_weight=grid_weight, hidden=hidden, impl=impl, **problem["options"])
            found = iter(torch.autograd.grad(g, [t for t in leaves if t is not None], d.to(g.dtype)))
            runs.append((g, [None if t is None else next(found) for t in leaves]))
    g, grads = runs[0]
    assert g.dtype == compute_dtype(dtype)
    assert_as_exact("goodness", g.detach(), exact_g.detach(), plain_g.detach(), large_g.detach())
    for name, t, grad, want, rough, size in zip(
        NAMES, (problem["x"], *parameters), grads, exact, plain, large, strict=True
    ):
        if t is None:
            continue
        assert grad.dtype == dtype
        want, rough = (shown_as(problem, v) if name == "x" else v.reshape(t.shape) for v in (want, rough))
        assert_as_exact(f"gradient of {name}", grad, want, rough, size)
    for first, second in zip((runs[0][0], *runs[0][1]), (runs[1][0], *runs[1][1]), strict=True):
        assert first is None or torch.equal(first, second)


@pytest.mark.parametrize(("dtype", "impl"), RUNS)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_goodness_step_and_loss(data, dtype, impl):
    """Every output of goodness_step, and goodness_loss with its gradients, for every loss option."""
    problem, grad_scale, need_grad_x = (
        data.draw(problems(dtype)),
        data.draw(st.sampled_from([None, 0.25])),
        data.draw(st.booleans()),
    )
    normalize = data.draw(st.sampled_from(["layer_norm", "layer_norm_channels", None]))
    tensors, target, options = problem["canonical"], problem["target"], problem["loss"]
    tau = torch.tensor(problem["tau"], dtype=compute_dtype(problem["x"].dtype))

    def scalar(*leaves):
        *leaves, temperature = leaves
        g = eager_head(problem, leaves)
        loss = eager_loss(g, target, temperature, **options)
        return (g, loss), loss.sum()

    (exact_g, exact_loss), exact = eager_gradients((*tensors, tau), torch.float64, scalar)
    (plain_g, plain_loss), plain = eager_gradients((*tensors, tau), plain_dtype(dtype), scalar)
    # |d| of each class, at most the sum of both its terms, over terms that are all positive
    weight_of_sample = 1 / len(target) if options["reduction"] == "mean" else 1.0
    d = problem["tau"] * weight_of_sample * ((problem["tau"] * exact_g.detach()).softmax(1) + 1)
    large_g, large = magnitudes(problem, d)
    # a softmax magnifies the error of its argument: |loss error| <= 2 tau max |g error|, relative errors of d likewise
    sensitivity = 1 + 2 * problem["tau"] * large_g.max()
    large, large_loss = (
        [None if t is None else t * sensitivity for t in large],
        large_g.max() * problem["tau"] + 1 + options["margin"],
    )

    parameters = handed_in(problem)
    given_tau = tau if problem["learn_tau"] else problem["tau"]
    memories = [t for t in (problem["x"], *parameters, *problem["memories"], target, tau) if t is not None]
    x, (weight, bias, grid_weight, *_) = problem["x"], parameters
    kwargs = dict(impl=impl, **problem["options"], **options)
    with unchanged(memories), planned_for(problem["budget"]):
        scale = None if grad_scale is None else torch.tensor(grad_scale)
        step, again = (
            ff.goodness_step(
                x, weight, bias, target, grid_weight=grid_weight, hidden=hidden_of(problem, parameters), tau=given_tau, grad_scale=scale,
                normalize=normalize, need_grad_x=need_grad_x, **kwargs,
            )
            for _ in range(2)
        )  # fmt: skip
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *parameters)]
        learned = tau.clone().requires_grad_() if problem["learn_tau"] else problem["tau"]
        kwargs |= {"grid_weight": leaves[3], "hidden": hidden_of(problem, leaves[1:])}
        loss = ff.goodness_loss(*leaves[:3], target, tau=learned, **kwargs)
        wanted = [t for t in (*leaves, learned) if isinstance(t, torch.Tensor)]
        found = iter(torch.autograd.grad(loss.sum(), wanted))
        loss_grads = [next(found) if isinstance(t, torch.Tensor) else None for t in (*leaves, learned)]

    for a, b in zip(step, again, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert step.loss.shape == ((len(target),) if options["reduction"] == "none" else ())
    assert step.loss.dtype == step.goodness.dtype == compute_dtype(dtype)
    assert_as_exact("goodness", step.goodness, exact_g.detach(), plain_g.detach(), large_g.detach())
    total = len(target) if options["reduction"] == "sum" else 1
    for which, value in (("step", step.loss), ("goodness_loss", loss.detach())):
        assert_as_exact(f"loss of {which}", value, exact_loss.detach(), plain_loss.detach(), large_loss * total)
    factor = 1.0 if grad_scale is None else grad_scale
    step_grads = [getattr(step, f"grad_{name}") for name in (*NAMES, "tau")]
    sizes = [*large, (large_g * d).sum() * sensitivity / problem["tau"]]
    for name, t, by_step, by_loss, want, rough, size in zip(
        (*NAMES, "tau"), (x, *parameters, tau if problem["learn_tau"] else None), step_grads, loss_grads, exact, plain, sizes, strict=True
    ):  # fmt: skip
        if t is None or (name == "x" and not need_grad_x):
            assert by_step is None
            continue
        want, rough = (shown_as(problem, v) if name == "x" else v.reshape(t.shape) for v in (want, rough))
        assert by_step.dtype == by_loss.dtype == t.dtype
        assert_as_exact(f"grad_{name} of step", by_step, want * factor, rough * factor, size * factor)
        assert_as_exact(f"gradient of {name}", by_loss, want, rough, size)
    if normalize is None:
        assert step.normalized is None
        return
    canonical = tensors[0]
    norm = (
        eager_layer_norm
        if normalize == "layer_norm"
        else lambda t: eager_layer_norm(t.flatten(2).mT.flatten(0, 1)).unflatten(0, (len(t), -1)).mT.reshape(t.shape)
    )
    exact_norm, plain_norm = (shown_as(problem, norm(canonical.to(t))) for t in (torch.float64, compute_dtype(dtype)))
    assert step.normalized.dtype == dtype
    # the mean is taken away first: its rounding is as large as the elements, relative to the deviation it is divided by
    over = canonical.double().flatten(1) if normalize == "layer_norm" else canonical.double().movedim(1, -1)
    worst = (over.abs().amax(-1) / (over.var(-1, correction=0) + 1e-5).sqrt()).max()
    assert_as_exact("normalized", step.normalized, exact_norm, plain_norm, worst)


@pytest.mark.parametrize("algorithm", ["direct", "second_moment"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("shape", "classes"),
    [
        ((3, 5, 4, 4), 40),
        ((6, 4, 2, 2), 3),
        ((5, 7, 1, 1), 9),
        ((2, 3, 8, 8), 600),
        ((4, 6, 7, 3), 35),
        ((3, 5, 21, 17), 200),
    ],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_form_of_the_algorithms(shape, classes, impl, algorithm, layout):
    """Flat and batched products, tiles that are kept and computed again, one sample at a time: all give the same step."""
    torch.manual_seed(0)
    dtype, rtol = (torch.float32, 1e-4) if impl == "native" else (torch.float64, 1e-10)
    x, target = LAYOUTS[layout](torch.randn(shape, dtype=dtype))[0], torch.randint(classes, shape[:1])
    weight, bias, grid_weight = (
        torch.randn(classes, shape[1]),
        torch.randn(classes),
        torch.randn(classes, shape[1], 2, 3),
    )
    weight, bias, grid_weight = weight.to(dtype), bias.to(dtype), grid_weight.to(dtype)

    def scalar(*leaves):
        g = eager_goodness(*leaves)
        return g, eager_loss(g, target)

    _, exact = eager_gradients((x, weight[:, :, None, None], bias, grid_weight), torch.float64, scalar)
    for budget in (None, 4 * 8, 4 * 8 * 300, 4 * 8 * 2000):
        with planned_for(budget):
            step = ff.goodness_step(x, weight, bias, target, grid_weight=grid_weight, impl=impl, algorithm=algorithm)
        got = (step.grad_x, step.grad_weight[:, :, None, None], step.grad_bias, step.grad_grid_weight)
        for name, a, b in zip(NAMES[:4], got, exact, strict=True):
            torch.testing.assert_close(
                a.double(),
                b,
                rtol=rtol,
                atol=rtol / 100 * float(b.abs().max()),
                msg=lambda m, name=name: f"{name}: {m}",
            )
        formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
        assert step.grad_x.is_contiguous(memory_format=formats[layout])


DERIVATIVES = {
    "squares": {"weight": (4, 3, 1, 1)},
    "bias": {"weight": (4, 3, 1, 1), "bias": (4,)},
    "grid": {"grid_weight": (4, 3, 2, 3)},
    "both": {"weight": (4, 3, 1, 1), "bias": (4,), "grid_weight": (4, 3, 2, 2)},
    "3 x 3": {"weight": (4, 3, 3, 3), "bias": (4,), "grid_weight": (4, 3, 2, 2)},
}


@pytest.mark.parametrize("algorithm", ["direct", "second_moment"])
@pytest.mark.parametrize("impl", IN_FLOAT64)
@pytest.mark.parametrize("case", DERIVATIVES)
def test_first_and_second_derivatives(case, impl, algorithm):
    if case == "3 x 3" and algorithm == "second_moment":
        with pytest.raises(ValueError, match="second_moment needs kernel size 1"):
            ff.goodness(torch.randn(2, 3, 4, 3), torch.randn(4, 3, 3, 3), algorithm=algorithm)
        return
    torch.manual_seed(0)
    shapes = {"x": (2, 3, 3, 2), **DERIVATIVES[case]}
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes.values()]
    padding = 1 if case == "3 x 3" else 0

    def goodness(*tensors):
        named = {"weight": None} | dict(zip(shapes, tensors, strict=True))
        return ff.goodness(**named, padding=padding, impl=impl, algorithm=algorithm)

    assert torch.autograd.gradcheck(goodness, leaves)
    assert torch.autograd.gradgradcheck(goodness, leaves)


def test_derivatives_of_the_loss():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 2, 2, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, weight, torch.tensor(0.7, dtype=torch.float64))]
    target = torch.tensor([0, 3, 1])

    def loss(x, weight, tau):
        return ff.goodness_loss(x, weight, None, target, tau=tau, margin=0.5, label_smoothing=0.1)

    assert torch.autograd.gradcheck(loss, leaves)
    assert torch.autograd.gradgradcheck(loss, leaves)


def test_goodness_step_cannot_be_differentiated_again():
    arguments = [torch.randn(2, 3, 4, 4, requires_grad=True), torch.randn(5, 3, 1, 1), None, None, torch.tensor([0, 4])]
    step = Step(
        arguments[0], None, Projection(*arguments[1:4]), Loss(target=arguments[4]), Normalization("layer_norm", 5)
    )
    loss, *_ = torch.ops.fastff.step(*op_arguments(step))
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()
    step = ff.goodness_step(*arguments[:3], arguments[4])
    assert not any(t.requires_grad for t in step if t is not None)


def test_opcheck():
    """Schemas, fake kernels, autograd registration and tracing of every op, as PyTorch checks them."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 4, 5, 2), torch.randn(6, 4, 1, 1), torch.randn(6)
    grid_weight, target, last = (
        torch.randn(6, 4, 2, 2),
        torch.tensor([0, 5, 2]),
        x.contiguous(memory_format=torch.channels_last),
    )
    how = ([0, 0], "auto", "auto")

    def learned(*tensors):
        return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]

    ops = torch.ops.fastff
    for inputs in (
        (x, weight, bias, grid_weight),
        (last, weight, None, None),
        (x.half(), None, None, grid_weight.half()),
    ):
        hidden = (torch.randn(4, 4), torch.rand(4), torch.rand(4)) if inputs[3] is not None else ()
        torch.library.opcheck(ops.goodness.default, (*learned(*inputs), *how))
        torch.library.opcheck(ops.goodness.default, (*inputs, *how))
        for need_x in (True, False):
            torch.library.opcheck(ops.goodness_backward.default, (torch.randn(3, 6), *inputs, *how, need_x))
        for reduction, normalize, tau in (
            ("mean", "layer_norm", None),
            ("none", "none", torch.tensor(0.5)),
            ("sum", "layer_norm_channels", None),
            ("mean", "group_norm", torch.tensor(0.5)),
        ):
            loss = Loss("cross_entropy", target, 1.0, tau, 0.1, 0.1, reduction=reduction)
            for layer in {(), hidden}:
                head = Projection(*inputs[1:], (0, 0), *layer)
                step = Step(inputs[0], None, head, loss, Normalization(normalize, 6), tau is None)
                torch.library.opcheck(ops.step.default, op_arguments(step))
        torch.library.opcheck(ops.normalize.default, (*learned(inputs[0]), "layer_norm", 1, 1e-5, "auto"))


def test_compile_and_export():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = FFConv2d(3, 4, 3, num_classes=5, grid=2, bias=True)
            self.head = GoodnessHead(4, 5, kernel_size=3, grid=2, hidden=3, learn_tau=True)

        def forward(self, x):
            y, g = self.block(x)
            y = self.block.next_input(y)
            return y, g, self.head.logits(self.head(y))

    torch.manual_seed(0)
    net, x, target = Net().eval(), torch.randn(2, 3, 6, 6), torch.tensor([4, 1])
    want = net(x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)

    def loss(outputs):
        return net.block.head.loss(outputs[1], target) + net.head.loss(outputs[2], target)

    parameters = list(net.parameters())
    for a, b in zip(
        torch.autograd.grad(loss(got), parameters), torch.autograd.grad(loss(want), parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, weight, target):
        return ff.goodness_step(x, weight, None, target, tau=0.5)

    weight = torch.randn(5, 3)
    for a, b in zip(step(x, weight, target), ff.goodness_step(x, weight, None, target, tau=0.5), strict=True):
        assert a is b is None or torch.equal(a, b)

    exported = torch.export.export(net, (x,))
    for a, b in zip(exported.module()(x), want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_margin_is_not_rounded_to_float32():
    torch.manual_seed(0)
    x, weight = torch.randn(4, 8, 5, 5, dtype=torch.float64), torch.randn(6, 8, 1, 1, dtype=torch.float64)
    target, margin = torch.randint(6, (4,)), 0.123456789
    expected = eager_loss(eager_goodness(x, weight), target, 1.0, margin)
    for loss in (
        ff.goodness_loss(x, weight, None, target, margin=margin),
        ff.goodness_step(x, weight, None, target, margin=margin).loss,
    ):
        assert abs(loss - expected) < 1e-13
