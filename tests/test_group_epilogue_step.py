"""group_tail_step against autograd of the eager sequence (batch norm, addition, activation, goodness without weights, loss) in float64."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from oracle import EAGER, KINKS, LAYOUTS, op_arguments, operators_run, same_bits, softplus

import fastff.functional as ff
from fastff import reference
from fastff.kernels.layout import is_channels_last
from fastff.ops.group_goodness import ROWS
from fastff.spec import ACTIVATIONS, LOSSES, NORMALIZATIONS, Epilogue, Groups, Loss, Normalization, Step

DTYPES = {"triton": torch.float32, "native": torch.float32, "torch": torch.float64, "reference": torch.float64}
IMPLEMENTATIONS = [row.name for row in ROWS if row.can_run(torch.zeros(1, 1, 1, 1, dtype=DTYPES[row.name])) is None]
SIZES = [(1, 5, 3), (7, 3, 5), (17, 7, 1), (33, 1, 9), (33, 5, 7), (40, 4, 4), (7, 1, 1), (1, 1, 1)]  # C, H, W


def drawn(draw, activation, normalize, loss, dtype):
    """A call, every number of it drawn; x of about 1, or less where g is a sum, so that no loss is saturated."""
    generator = torch.Generator().manual_seed(draw.randrange(2**32))
    C, H, W = draw.choice(SIZES)
    positions = loss != "cross_entropy" and draw.random() < 0.3
    groups = 1 if positions else draw.choice([1 if loss != "cross_entropy" else min(C, 3), min(C, 5), C])
    power, mean = draw.choice([1, 2]), draw.random() < 0.7
    B = 2 * draw.randrange(1, 4) if loss != "cross_entropy" else draw.randrange(2, 6)
    scale = 1.0 if mean else (C if positions else C * H * W / groups) ** (-1 / power)

    def values(by, *shape, offset=0.0):
        return (torch.randn(shape, dtype=torch.float64, generator=generator) * by + offset).to(dtype)

    def maybe(value):
        return value if draw.random() < 0.7 else None

    def laid(t):
        return LAYOUTS[draw.choice(["contiguous", "channels_last", "channels_last", "slice"])](t)[0]

    residual = maybe(values(scale, B, C, H, W))
    return {
        "y": laid(values(2.0, B, C, H, W, offset=draw.choice([0.0, 3.0]))),
        "residual": None if residual is None else laid(residual),
        "bn_weight": maybe(values(1.5, C, offset=1.0)) if mean else values(scale, C),
        "bn_bias": maybe(values(2 * scale, C)),
        "need_grad_residual": draw.random() < 0.8,
        "activation": activation,
        "how": {"groups": groups, "power": power, "mean": mean, "positions": positions},
        "loss": loss,
        "target": torch.randint(groups, (B,), generator=generator) if loss == "cross_entropy" else None,
        "theta": draw.choice([2.0, 0.5]), "alpha": draw.choice([1.0, 0.3]), "tau": draw.choice([1.0, 0.3]),
        "margin": draw.choice([0.0, 1.0]), "label_smoothing": draw.choice([0.0, 0.1]),
        "reduction": draw.choice(["mean", "sum", "none"]), "normalize": normalize,
        "grad_scale": draw.choice([None, torch.tensor(8.0)]),
    }  # fmt: skip


def plain_goodness(x, groups, power, mean, positions):
    reduce = torch.mean if mean else torch.sum
    if positions:
        return reduce(x**power, 1).flatten(1)
    return torch.stack([reduce(part.flatten(1) ** power, 1) for part in torch.tensor_split(x, groups, 1)], 1)


def plain_loss(g, p):
    if p["loss"] == "cross_entropy":
        u = p["tau"] * g - p["margin"] * F.one_hot(p["target"], g.shape[1]).to(g.dtype)
        return F.cross_entropy(u, p["target"], label_smoothing=p["label_smoothing"], reduction=p["reduction"])
    f = F.silu if "swish" in p["loss"] else softplus
    positive, negative = g[: len(g) // 2], g[len(g) // 2 :]
    if "symba" in p["loss"]:
        losses = f(-p["alpha"] * (positive - negative)).mean(1)
    else:
        losses = torch.cat([f(p["theta"] - positive), f(negative - p["theta"])]).mean(1)
    return {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[p["reduction"]]


def eager(p, dtype):
    """(results by name, the input of the activation, its gradient), differentiated by autograd."""
    names = ("y", "residual", "bn_weight", "bn_bias")
    leaves = {n: p[n].detach().to(dtype, copy=True).requires_grad_() for n in names if p[n] is not None}
    h = F.batch_norm(leaves["y"], None, None, leaves.get("bn_weight"), leaves.get("bn_bias"), training=True, eps=1e-5)
    h = h if p["residual"] is None else h + leaves["residual"]
    x = EAGER[p["activation"]](h)
    g = plain_goodness(x, **p["how"])
    loss = plain_loss(g, p)
    seed = loss.sum() * (1.0 if p["grad_scale"] is None else p["grad_scale"].item())
    grad_h, *grads = torch.autograd.grad(seed, [h, *leaves.values()])
    var, mean = torch.var_mean(p["y"].to(dtype), (0, 2, 3), correction=0)
    normal = reference.normalized(x.detach(), p["normalize"], p["how"]["groups"]) if p["normalize"] else None
    results = {"loss": loss.detach(), "goodness": g.detach(), "normalized": normal, "mean": mean, "var": var}
    results |= {f"grad_{n}": grad for n, grad in zip(leaves, grads, strict=True)}
    if not p["need_grad_residual"]:
        results.pop("grad_residual", None)
    return results, h.detach(), grad_h


def sizes(p, exact, h, grad_h):
    """{result: its size with every term of its sums positive}: roundings are relative to it."""
    y = p["y"].double()
    column = lambda v: v[:, None, None]  # noqa: E731
    var, mean = exact["var"], exact["mean"]
    rstd = (var + 1e-5).rsqrt()
    w = torch.ones(y.shape[1]) if p["bn_weight"] is None else p["bn_weight"].double().abs()
    normal = (y.abs() + column(mean.abs())) * column(rstd)
    size = normal * column(w) + sum(
        t.double().abs() if t.dim() == 4 else column(t.double().abs())
        for t in (p["bn_bias"], p["residual"])
        if t is not None
    )
    g = plain_goodness(size, **p["how"]).max()
    steep = {"cross_entropy": p["tau"], "symba": p["alpha"], "swish_symba": p["alpha"]}.get(p["loss"], 1.0) * g
    d = grad_h.abs() * (1 + 2 * steep) * size.max() / h.abs().max()
    found = {"grad_bn_bias": d.sum((0, 2, 3)), "grad_bn_weight": (d * normal).sum((0, 2, 3)), "grad_residual": d}
    n = y.numel() / y.shape[1]
    back = d + column(found["grad_bn_bias"]) / n + normal * column(found["grad_bn_weight"]) / n
    found |= {"grad_y": back * column(rstd * w), "mean": y.abs(), "var": y.square()}
    count = len(y) if p["reduction"] == "sum" else 1
    found |= {"goodness": g, "loss": count * (steep + exact["loss"].abs().max() / count + p["margin"] + p["theta"])}
    found = {k: torch.as_tensor(v).max() for k, v in found.items()}
    if p["normalize"]:  # what its divisors magnify
        x = EAGER[p["activation"]](h)
        over = (1,) if p["normalize"].endswith("channels") else (1, 2, 3)
        divisors = []
        for part in torch.tensor_split(x, p["how"]["groups"] if p["normalize"] == "group_norm" else 1, 1):
            centred = part - part.mean(over, keepdim=True) if "norm" in p["normalize"] else part
            squares = centred.square()
            by = squares.sum(over, True).sqrt() if "l2" in p["normalize"] else (squares.mean(over, True) + 1e-5).sqrt()
            by = by.expand_as(part) + 1e-5
            divisors.append(by if "norm" in p["normalize"] else by.where(part != 0, 1.0))  # 0 divided is 0
        found["normalized"] = size.max() / torch.cat(divisors, 1)
    return found


def problem(activation, normalize, loss, dtype, number=0, attempt=0):
    """The first drawn call that keeps away from the kinks, where a rounding is a step of the gradient; its exact results, their sizes."""
    p = drawn(random.Random(f"{activation} {normalize} {loss} {number} {attempt}"), activation, normalize, loss, dtype)
    exact, h, grad_h = eager(p, torch.float64)
    kinks, near = KINKS.get(activation, ()), 2e-5
    if normalize in ("l2_channels", "rms_channels") and p["y"].shape[1] == 1:  # a kink but for eps
        kinks, near = (0.0,), 1e-3
    if all(float((h - kink).abs().min()) > near * float(h.abs().max()) for kink in kinks):
        return p, exact, sizes(p, exact, h, grad_h)
    return problem(activation, normalize, loss, dtype, number, attempt + 1)


def call(p, impl):
    named = {k: v for k, v in p.items() if k not in ("y", "target", "how")}
    return ff.group_tail_step(p["y"], p["target"], **p["how"], **named, impl=impl)


def results(step):
    """{name: result}, with the name of tail_step for the gradient of its input."""
    named = step._asdict()
    return named | {"grad_y": named.pop("grad_x")}


def assert_as_eager(step, p, exact, size):
    dtype = p["y"].dtype
    rough = eager(p, dtype)[0]
    # In float64 rough is exact itself, and says nothing of what is rounded on the way: about sqrt(n) roundings of n terms.
    roundings = 4 * torch.finfo(dtype).eps * (p["y"].numel() ** 0.5 if dtype == torch.float64 else 1)
    for name, got in results(step).items():
        want = exact.get(name)
        assert (got is None) == (want is None), name
        if got is None:
            continue
        assert got.shape == want.shape, name
        assert got.dtype == dtype, name
        allowed = 4 * (rough[name].double() - want).abs().max() + roundings * size[name]
        excess = (got.double() - want).abs() - allowed
        assert bool((excess <= 0).all()), f"{name}: {excess.max():.3g} beyond the {allowed.max():.3g} allowed"


@pytest.mark.parametrize("normalize", [None, *NORMALIZATIONS[1:]])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_step(impl, activation, normalize):
    """Every result, arguments untouched, results laid out as y, the same bits twice."""
    for loss, number in itertools.product(LOSSES, range(2)):
        p, exact, size = problem(activation, normalize, loss, DTYPES[impl], number)
        before = {n: t.clone() for n, t in p.items() if isinstance(t, torch.Tensor)}
        step, again = call(p, impl), call(p, impl)
        assert_as_eager(step, p, exact, size)
        assert all(same_bits(p[n], t) for n, t in before.items()), "an argument was written to"
        assert all(same_bits(a, b) for a, b in zip(step, again, strict=True) if a is not None)
        for name in ("grad_y", "grad_residual", "normalized"):
            found = getattr(step, name)
            lies = found is None or (is_channels_last(found) if is_channels_last(p["y"]) else found.is_contiguous())
            assert lies, f"{name} is not laid out as y"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_memory_around_is_not_read(impl, loss):
    """Views of tensors of NaN, y and residual laid out differently: the results of contiguous ones."""
    p, *_ = problem("silu", "layer_norm", loss, DTYPES[impl])
    p["residual"] = torch.randn(p["y"].shape, dtype=p["y"].dtype)
    exact, *rest = eager(p, torch.float64)
    size = sizes(p, exact, *rest)
    others = ("contiguous", "channels_last", "every other")
    for layout, other in itertools.product(sorted(LAYOUTS.keys() - {"expanded"}), others):
        laid = p | {"y": LAYOUTS[layout](p["y"])[0], "residual": LAYOUTS[other](p["residual"])[0]}
        assert_as_eager(call(laid, impl), laid, exact, size)


@pytest.mark.skipif("native" not in IMPLEMENTATIONS, reason="no compiled library")
def test_threads_change_no_bit():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    try:
        for loss, layout in itertools.product(LOSSES, ["contiguous", "channels_last"]):
            y, residual = (LAYOUTS[layout](torch.randn(38, 33, 9, 11))[0] for _ in range(2))
            target = torch.arange(38) % 4 if loss == "cross_entropy" else None
            options = {"loss": loss, "residual": residual, "bn_weight": torch.rand(33), "impl": "native"}
            results = []
            for n in (1, 2):
                torch.set_num_threads(n)
                results.append(ff.group_tail_step(y, target, 4, **options))
            assert all(same_bits(a, b) for a, b in zip(*results, strict=True) if a is not None), loss
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_sample_that_is_not_a_number(impl, activation):
    """Spoils its channel's statistics and what is made of them, in every sample, as in eager code; no other channel's."""
    torch.manual_seed(0)
    for layout, value in itertools.product(["contiguous", "channels_last"], [float("nan"), float("inf")]):
        y = LAYOUTS[layout](torch.randn(4, 6, 3, 5, dtype=DTYPES[impl]))[0]
        y[1, 2, 0, 0] = value
        step = ff.group_tail_step(y, torch.tensor([0, 1, 2, 0]), 3, activation=activation, reduction="none", impl=impl)
        spoilt = torch.arange(6) == 2
        assert torch.equal(step.mean.isfinite(), ~spoilt)
        assert torch.equal(step.var.isfinite(), ~spoilt)
        g = plain_goodness(EAGER[activation](F.batch_norm(y, None, None, training=True)), 3, 2, True, False)
        assert torch.equal(step.goodness.isnan(), g.isnan())
        assert step.loss.isnan().all()
        assert step.grad_y[:, 2].isnan().all()


@pytest.mark.skipif("native" not in IMPLEMENTATIONS, reason="no compiled library")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype):
    """Of y's dtype where y's are; statistics, goodness and loss in float32."""
    torch.manual_seed(0)
    y, residual, weight = torch.randn(4, 12, 5, 3).to(dtype), torch.randn(4, 12, 5, 3).to(dtype), torch.rand(12)
    target = torch.arange(4) % 3
    exact = ff.group_tail_step(
        y.double(),
        target,
        3,
        residual=residual.double(),
        bn_weight=weight.double(),
        activation="silu",
        impl="reference",
    )
    for impl in ("native", "torch", "reference"):
        step = ff.group_tail_step(y, target, 3, residual=residual, bn_weight=weight, activation="silu", impl=impl)
        for name, got in results(step).items():
            if got is not None:
                assert got.dtype == (dtype if name in ("grad_y", "grad_residual", "normalized") else torch.float32), (
                    name
                )
                want = getattr(exact, name)
                assert (got - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max(), (impl, name)


def test_which_runs():
    """The compiled library for float32; for float64 batch norm on PyTorch's operators around the kernel of group_goodness."""
    y, target = torch.randn(3, 4, 2, 2), torch.arange(3)
    name = "fastff::step_native"
    assert (name in operators_run(lambda: ff.group_tail_step(y, target, 3))) == ("native" in IMPLEMENTATIONS)
    assert "aten::var_mean" not in operators_run(lambda: ff.group_tail_step(y, target, 3, impl="native"))
    if "native" in IMPLEMENTATIONS:
        run = operators_run(lambda: ff.group_tail_step(y.double(), target, 3, impl="native"))
        assert name in run
        assert "aten::var_mean" in run


def test_nothing_is_recorded_for_autograd():
    y, residual, weight = (torch.randn(3, 4, 2, 2, requires_grad=True) for _ in range(3))
    step = ff.group_tail_step(y, torch.arange(3), 4, residual=residual, bn_weight=weight[0, :, 0, 0])
    assert not any(t.requires_grad for t in step if t is not None)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"groups": 0}, ValueError, "groups: expected 1 to 6"),
        ({"groups": 7}, ValueError, "groups: expected 1 to 6"),
        ({"power": 3}, ValueError, "power: expected 1 or 2"),
        ({"loss": "softplus", "target": None, "y": torch.ones(3, 6, 2, 2)}, ValueError, "y: expected positive samples"),
        ({"loss": "softplus"}, ValueError, "target: expected None for softplus"),
        ({"loss": "hinge"}, ValueError, "loss: expected one of"),
        ({"positions": True, "groups": 1}, ValueError, "positions: expected False for cross_entropy"),
        ({"positions": True, "loss": "softplus"}, ValueError, "positions: expected groups=1"),
        ({"target": None}, ValueError, "target: expected .* for cross_entropy"),
        ({"target": torch.tensor([0, 1, 2, 3])}, ValueError, r"target: expected labels in 0\.\.2, got 3"),
        ({"target": torch.tensor([0, 1, -1, 2])}, ValueError, r"target: expected labels in 0\.\.2, got -1"),
        ({"target": torch.tensor([0, 1])}, ValueError, r"target: expected \[4\]"),
        ({"activation": "tanh"}, ValueError, "activation: expected one of none, relu"),
        ({"y": torch.ones(4, 6)}, ValueError, "y: expected a tensor"),
        ({"y": torch.ones(1, 6, 1, 1), "target": torch.tensor([0])}, ValueError, "y: expected more than one value"),
        ({"y": torch.ones(4, 6, 2, 2, dtype=torch.int64)}, TypeError, "y: expected float32"),
        ({"residual": torch.ones(4, 6, 1, 1)}, ValueError, r"residual: expected \[4, 6, 2, 2\]"),
        ({"residual": torch.ones(4, 6, 2, 2).double()}, ValueError, "residual: expected .* torch.float32"),
        ({"bn_weight": torch.ones(5)}, ValueError, r"bn_weight: expected a floating-point tensor \[6\]"),
        ({"bn_bias": torch.ones(6, dtype=torch.int64)}, ValueError, r"bn_bias: expected a floating-point tensor \[6\]"),
        ({"normalize": "batch"}, ValueError, "normalize: expected one of"),
        ({"reduction": "max"}, ValueError, "reduction: expected"),
        ({"impl": "cuda"}, RuntimeError, "impl='cuda'"),
    ],
)
def test_bad_input(change, error, said):
    arguments = {"y": torch.ones(4, 6, 2, 2), "target": torch.tensor([0, 2, 1, 0]), "groups": 3} | change
    with pytest.raises(error, match=said):
        ff.group_tail_step(**arguments)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl):
    torch.manual_seed(0)
    y = torch.randn(4, 6, 3, 5, dtype=DTYPES[impl])
    for bn, residual, loss, target in (
        (None, None, "symba", None),
        (torch.rand(6).to(y), torch.randn_like(y), "cross_entropy", torch.arange(4) % 3),
    ):
        described = Loss(loss, target, margin=0.5, label_smoothing=0.1)
        step = Step(y, Epilogue(bn, bn, residual=residual), Groups(3), described, Normalization("group_norm", 3))
        torch.library.opcheck(torch.ops.fastff.step.default, op_arguments(step, impl))
