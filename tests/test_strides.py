"""Whatever layout an argument has: results as for a contiguous one, laid out as their fake tensors say: torch.compile reads them by those."""

import pytest
import torch
from oracle import EVERY_LAYOUT, LABELS, OVERLAPPING, layouts_of
from torch._subclasses.fake_tensor import FakeTensorMode

import fastff.functional as ff
from fastff.spec import LOSSES, NORMALIZATIONS
from fastff.spec import PAIRED_LOSSES as PAIRED

IMPLEMENTATIONS = ("native", "torch", "reference")
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float64: 1e-10}
K = 3
SHAPES = [(4, 6, 5, 3), (2, 1, 4, 1), (4, 6, 1, 1)]  # of x
STEP = {"reduction": "none", "margin": 0.5, "label_smoothing": 0.1}


def gradients(function, leaves, d):
    """The result of function(*leaves) and, from the gradient d of it, those of the leaves."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    y = function(*leaves)
    return y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], d)


def goodness(x, weight=None, bias=None, grid_weight=None, d=None, **options):
    return gradients(
        lambda x, w, b, v: ff.goodness(x, w, b, grid_weight=v, **options), (x, weight, bias, grid_weight), d
    )


def group_goodness(x, d, **options):
    return gradients(lambda x: ff.group_goodness(x, **options), (x,), d)


def normalize(x, d, **options):
    return gradients(lambda x: ff.normalize(x, **options), (x,), d)


def layer_norm(x, d, **options):
    return gradients(lambda x: ff.layer_norm(x, **options), (x,), d)


def goodness_step(x, target, weight=None, bias=None, **options):
    return ff.goodness_step(x, weight, bias, target, **STEP, **options)


def tail_step(y, target, weight=None, bias=None, **options):
    return ff.tail_step(y, weight, bias, target, **STEP, **options)


def depthwise(x, weight, d, impl, stride=1, padding=1, need_x=True):
    y = torch.ops.fastff.depthwise(x, weight, stride, padding, impl)
    return y, *torch.ops.fastff.depthwise_backward(d, x, weight, stride, padding, need_x, impl)


def convolution_weight_gradient(x, d, impl, kernel=3, stride=1, padding=1):
    return (torch.ops.fastff.convolution_weight_gradient(d, x, kernel, stride, padding, impl),)


def heads(x):
    """{name: (weight, bias, grid_weight), options} of every form of the goodness with weights."""
    B, C = x[:2]
    weight, bias, grid = {"weight": (K, C)}, {"bias": (K,)}, {"grid_weight": (K, C, 2, 2)}
    forms = [
        (tensors, {"algorithm": how})
        for tensors in (weight, weight | bias | grid)
        for how in ("direct", "second_moment")
    ]
    forms += [(grid, {}), ({"weight": (K, C, 3, 3)} | bias | grid, {"padding": 1})]
    return forms


def groups_of(x):
    return min(x[1], K)


def calls(name, x):
    """[(shapes of the tensors handed in, the other arguments)] of function `name` for x of this shape."""
    B, C, H, W = x
    steps = [{"normalize": how} for how in (None, "layer_norm", "layer_norm_channels")]
    own = {"bn_weight": (C,), "bn_bias": (C,), "residual": x}
    if name == "goodness":
        return [({"x": x, "d": (B, K)} | tensors, how) for tensors, how in heads(x)]
    if name == "goodness_step":
        found = [({"x": x, "target": None} | tensors, how | step) for tensors, how in heads(x) for step in steps]
        return [
            *found,
            ({"x": x, "target": None, "weight": (K, C), "tau": (), "grad_scale": ()}, {"need_grad_x": False}),
        ]
    if name == "tail_step":
        found = [({"y": x, "target": None} | tensors | own, how) for tensors, how in heads(x)]
        found += [({"y": x, "target": None, "weight": (K, C)} | own, step | {"activation": "silu"}) for step in steps]
        return [
            *found,
            (
                {"y": x, "target": None, "weight": (K, C), "tau": (), "grad_scale": ()} | own,
                {"need_grad_residual": False},
            ),
        ]
    if name == "group_goodness":
        count = {"groups": groups_of(x), "power": 1, "mean": False}
        return [
            ({"x": x, "d": (B, groups_of(x))}, count),
            ({"x": x, "d": (B, H * W)}, {"positions": True}),
            ({"x": x, "d": (B, 1)}, {}),
        ]
    if name in ("group_goodness_step", "group_tail_step"):
        tensors = {"x": x} if name == "group_goodness_step" else {"y": x} | own
        options = [
            {"groups": groups_of(x), "normalize": how, "loss": loss}
            for loss, how in zip(LOSSES * 2, NORMALIZATIONS, strict=False)
        ]
        options += [
            {"positions": True, "loss": loss, "reduction": "none", "normalize": None} for loss in (LOSSES[1], PAIRED[0])
        ]
        labels = [{"target": None, "grad_scale": ()} if how["loss"] == "cross_entropy" else {} for how in options]
        return [(tensors | label, how) for label, how in zip(labels, options, strict=True)]
    if name == "normalize":
        return [({"x": x, "d": x}, {"how": how, "groups": groups_of(x)}) for how in NORMALIZATIONS[1:]]
    if name == "layer_norm":  # over channels it is PyTorch's own, whose fake gradients have other strides
        return [({"x": x, "d": x}, {})]
    if name == "depthwise":
        found = [
            ({"x": x, "weight": (C, 1, k, k), "d": x}, {"padding": k // 2, "need_x": need})
            for k in (3, 5)
            for need in (True, False)
        ]
        half = (B, C, (H + 1) // 2, (W + 1) // 2)
        return [*found, ({"x": x, "weight": (C, 1, 3, 3), "d": half}, {"stride": 2})]
    return [({"x": x, "d": (B, 7, H, W)}, {}), ({"x": x, "d": (B, 7, H, W)}, {"kernel": 1, "padding": 0})]


FUNCTIONS = {
    "goodness": goodness,
    "goodness_step": goodness_step,
    "tail_step": tail_step,
    "group_goodness": group_goodness,
    "group_goodness_step": ff.group_goodness_step,
    "group_tail_step": ff.group_tail_step,
    "normalize": normalize,
    "layer_norm": layer_norm,
    "depthwise": depthwise,
    "convolution_weight_gradient": convolution_weight_gradient,
}


def layouts(tensors, form):
    """[{argument: its layout}]: a third of x's beside each form of a call, and a tenth of the others', x being contiguous or channels_last."""
    first, *others = tensors
    yield from ({first: layout} for layout in layouts_of(len(tensors[first]))[form % 3 :: 3])
    pairs = [
        (name, layout)
        for name in others
        for layout in (LABELS if tensors[name] is None else layouts_of(len(tensors[name])))
    ]
    for name, layout in pairs[form % 10 :: 10]:
        yield {name: layout}
        yield {first: "channels_last", name: layout}


def laid(tensors, values, names):
    made = {}
    for name, shape in tensors.items():
        layout = names.get(name, "contiguous")
        made[name] = LABELS[layout](values[name]) if shape is None else EVERY_LAYOUT[layout](values[name])[0]
    return made


def described(results):
    """Shape, dtype and strides of each; where a dimension has one element its stride says nothing."""
    return [None if t is None else (tuple(t.shape), t.dtype, strides(t)) for t in results]


def strides(t):
    return None if t.numel() == 0 else tuple(s if n > 1 else None for s, n in zip(t.stride(), t.shape, strict=True))


def forms(name):
    """[(shapes, the other arguments, a number)] of enough calls of each kind that the tenths of layouts are all of them."""
    found = [call for x in SHAPES for call in calls(name, x)]
    repeats = -(-10 // len(found))
    return [(*call, number) for number, call in enumerate(found * repeats)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_of_every_layout(name, impl, dtype):
    generator, function, wrong = torch.Generator().manual_seed(0), FUNCTIONS[name], []
    for tensors, options, form in forms(name):
        x = next(iter(tensors.values()))
        values = {a: torch.randn(s or (), generator=generator).to(dtype) for a, s in tensors.items() if s is not None}
        values |= {a: torch.randint(groups_of(x), x[:1], generator=generator) for a, s in tensors.items() if s is None}
        values |= {a: values[a].abs() + 0.5 for a in ("tau", "grad_scale") if a in tensors}
        options = options | {"impl": impl}
        try:
            plain = function(**values, **options)
        except RuntimeError as error:
            if "no implementation of" not in str(error):
                raise
            pytest.skip(str(error))
        for names in layouts(tensors, form):
            case = f"{tensors}, {options}, {names}"
            given = laid(tensors, values, names)
            real = function(**given, **options)
            with FakeTensorMode() as mode:
                fake = function(**{a: mode.from_tensor(t) for a, t in given.items()}, **options)
            for i, (a, b) in enumerate(zip(described(real), described(fake), strict=True)):
                if a != b:
                    wrong.append(f"{case}: result {i} is {a}, its fake {b}")
            changed = not OVERLAPPING.isdisjoint(names.values())
            same = function(**{a: t.contiguous() for a, t in given.items()}, **options) if changed else plain
            for i, (a, b) in enumerate(zip(real, same, strict=True)):
                if a is not None and a.numel() and not close(a, b, CLOSE[dtype] * (10 if changed else 1)):
                    wrong.append(f"{case}: result {i} is off by {float((a.double() - b.double()).abs().max()):.2g}")
    assert not wrong, f"{len(wrong)} differ, among them\n" + "\n".join(wrong[:: max(1, len(wrong) // 20)])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_slices_of_channels_last_in_compiled_graphs(dtype, impl):
    """By both algorithms and with the spatial term: compiled, the results are those of eager mode."""
    torch.manual_seed(0)
    x = (
        torch.randn(4, 12, 8, 6)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)[:, :6]
        .detach()
        .requires_grad_()
    )
    weight, grid, target = (
        torch.randn(3, 6).to(dtype).requires_grad_(),
        torch.randn(3, 6, 2, 2).to(dtype),
        torch.arange(4) % 3,
    )

    def results(x, weight):
        found = [ff.normalize(x, "l2", impl=impl).float().square().mean()]
        for algorithm in ("direct", "second_moment"):
            options = {"grid_weight": grid, "impl": impl, "algorithm": algorithm}
            step = ff.goodness_step(x.detach(), weight.detach(), None, target, **options)
            found += [
                ff.goodness(x, weight, **options).mean(),
                step.loss,
                step.grad_x.float().sum(),
                step.normalized.float().sum(),
            ]
        return torch.stack(found)

    torch._dynamo.reset()
    compiled, eager = (
        torch.autograd.grad(f(x, weight).sum(), (x, weight))
        for f in (torch.compile(results, backend="aot_eager"), results)
    )
    torch.testing.assert_close(compiled, eager)


def close(a, b, tolerance):
    return float((a.double() - b.double()).abs().max()) <= tolerance * max(1.0, float(b.double().abs().max()))
