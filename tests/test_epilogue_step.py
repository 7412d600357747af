"""tail_step against autograd of the eager sequence (batch norm, addition, activation, head, loss, layer norm) in float64."""

import copy
import functools
import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import (
    EAGER,
    KINKS,
    LAYOUTS,
    eager_goodness,
    eager_layer_norm,
    eager_loss,
    op_arguments,
    peak_memory,
    planned_for,
    same_bits,
)
from torch import nn
from vision import import_torchvision

import fastff
import fastff.functional as ff
from fastff import SFF, Trainer
from fastff.ops.goodness import ROWS
from fastff.spec import ACTIVATIONS, Epilogue, Loss, Normalization, Projection, Step

# With TRITON_INTERPRET=1 this file tests the Triton kernels, interpreted, and nothing else (test_triton.py runs it so).
TRITON = os.environ.get("TRITON_INTERPRET") == "1"
IMPLEMENTATIONS = ["triton"] if TRITON else [row.name for row in ROWS if row.name != "triton"]
DTYPES = (torch.float32, torch.bfloat16) + (() if TRITON else (torch.float64,))
RUNS = [
    (dtype, row.name)
    for row in ROWS
    for dtype in DTYPES
    if row.name in IMPLEMENTATIONS and row.can_run(torch.zeros(1, 1, 1, 1, dtype=dtype)) is None
]
EXAMPLES = int(os.environ.get("FASTFF_EXAMPLES", 12 if TRITON else 60))
GRADIENTS = (
    "grad_y",
    "grad_residual",
    "grad_bn_weight",
    "grad_bn_bias",
    "grad_weight",
    "grad_bias",
    "grad_grid_weight",
    "grad_tau",
)


@st.composite
def problems(draw, dtype):
    B, C, K = draw(st.integers(2, 6)), draw(st.integers(1, 20)), draw(st.sampled_from([1, 3, 11, 40]))
    H, W = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    grid = draw(st.sampled_from([None, None, (2, 2), (4, 3)]))
    kernel = draw(st.sampled_from([1, 1, 1, 3]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def values(scale, *shape, offset=0.0):
        return (torch.randn(shape, dtype=torch.float64, generator=generator) * scale + offset).to(dtype)

    def optional(*args, **kwargs):
        return values(*args, **kwargs) if draw(st.booleans()) else None

    layout, other = (draw(st.sampled_from(sorted(LAYOUTS.keys() - {"expanded"}))) for _ in range(2))
    y = LAYOUTS[layout](values(2.0, B, C, H, W, offset=draw(st.sampled_from([0.0, 3.0]))))[0]
    residual = optional(1.0, B, C, H, W)
    return {
        "y": y,
        "residual": None if residual is None else LAYOUTS[other](residual)[0],
        "bn_weight": optional(0.3, C, offset=1.0),
        "bn_bias": optional(0.5, C),
        "weight": values((2 / (C * kernel**2)) ** 0.5, K, C, kernel, kernel),
        "bias": optional(0.5, K),
        "grid_weight": values((1 / C) ** 0.5, K, C, *grid) if grid else None,
        "tau": torch.tensor(0.7, dtype=torch.promote_types(dtype, torch.float32)) if draw(st.booleans()) else 0.5,
        "target": torch.randint(K, (B,), generator=generator),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "options": {
            "padding": kernel // 2,
            "normalize": draw(st.sampled_from(["layer_norm", "layer_norm_channels", None])),
            "algorithm": draw(st.sampled_from(["auto", "direct"] + ["second_moment"] * (kernel == 1))),
            "reduction": draw(st.sampled_from(["mean", "sum"])),
            "margin": draw(st.sampled_from([0.0, 1.0])),
        },
        "budget": draw(st.sampled_from([None, 16, 400, 4000])),
    }


def eager(p, dtype):
    """(loss, goodness, next input, mean, var, {name: gradient}) of the sequence a user would write."""
    names = ("y", "residual", "bn_weight", "bn_bias", "weight", "bias", "grid_weight", "tau")
    leaves = {n: p[n].detach().to(dtype, copy=True).requires_grad_() for n in names if isinstance(p[n], torch.Tensor)}
    get = lambda name: leaves.get(name, p[name])  # noqa: E731
    h = F.batch_norm(get("y"), None, None, get("bn_weight"), get("bn_bias"), training=True, eps=1e-5)
    h = h if get("residual") is None else h + get("residual")
    x = EAGER[p["activation"]](h)
    o = p["options"]
    g = eager_goodness(x, get("weight"), get("bias"), get("grid_weight"), o["padding"])
    loss = eager_loss(g, p["target"], get("tau"), o["margin"], 0.0, o["reduction"])
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    normalized = None
    if o["normalize"] == "layer_norm":
        normalized = eager_layer_norm(x.detach())
    elif o["normalize"]:
        normalized = F.layer_norm(x.detach().movedim(1, -1), (x.shape[1],), eps=1e-5).movedim(-1, 1)
    var, mean = torch.var_mean(p["y"].to(dtype), (0, 2, 3), correction=0)
    return loss.detach(), g.detach(), normalized, mean, var, grads


def magnitudes(p, exact):
    """(whether every h is away from the kinks of its activation, {result: its size with every term of its sums positive}).

    Roundings are relative to these sizes, times what a softmax magnifies: 1 + 2 tau max g."""
    y, o = p["y"].double(), p["options"]
    w, b, r = (torch.zeros(()) if p[n] is None else p[n].double().abs() for n in ("bn_weight", "bn_bias", "residual"))
    w = torch.ones(y.shape[1]) if p["bn_weight"] is None else w
    var, mean = torch.var_mean(y, (0, 2, 3), correction=0, keepdim=True)
    rstd = (var + 1e-5).rsqrt()
    column = lambda v: v.reshape(-1, 1, 1) if v.dim() else v  # noqa: E731
    size = ((y.abs() + mean.abs()) * rstd * column(w) + column(b) + r).requires_grad_()
    signed = (y - mean) * rstd * (1 if p["bn_weight"] is None else column(p["bn_weight"].double()))
    signed = signed + (0 if p["bn_bias"] is None else column(p["bn_bias"].double()))
    signed = signed + (0 if p["residual"] is None else p["residual"].double())
    safe = all(float((signed - kink).abs().min()) > 1e-4 for kink in KINKS.get(p["activation"], ()))
    tau = float(p["tau"])
    head = {n: p[n].double().abs().requires_grad_() for n in ("weight", "bias", "grid_weight") if p[n] is not None}
    g = eager_goodness(size, head["weight"], head.get("bias"), head.get("grid_weight"), o["padding"])
    magnified = 1 + 2 * tau * float(g.detach().max())
    d = tau * ((tau * exact[1].double()).softmax(1) + 1) / (len(y) if o["reduction"] == "mean" else 1)
    grad_x, *grads = torch.autograd.grad((g * d).sum(), [size, *head.values()])
    size, g = size.detach(), g.detach()
    h = grad_x * 1.2 * (1 + (size.max() if p["activation"] in ("silu", "gelu", "hardswish") else 0))
    normal = (y.abs() + mean.abs()) * rstd
    found = dict(zip(head, (float(v.max()) for v in grads), strict=True))
    found |= {"bn_bias": h.sum((0, 2, 3)), "bn_weight": (h * normal).sum((0, 2, 3)), "residual": h}
    n = y.numel() / y.shape[1]
    found["y"] = (h + column(found["bn_bias"]) / n + normal * column(found["bn_weight"]) / n) * rstd * column(w)
    found["tau"] = (g * d).sum() / tau
    found = {name: float(torch.as_tensor(v).max()) * magnified for name, v in found.items()}
    x = EAGER[p["activation"]](signed)
    over = x.flatten(1) if o["normalize"] == "layer_norm" else x.movedim(1, -1)
    spread = float((over.var(-1, correction=0) + 1e-5).sqrt().min())
    total = 1 if o["reduction"] == "mean" else len(y)
    found |= {
        "goodness": float(g.max()),
        "loss": (tau * float(g.max()) + 2) * total,
        "normalized": float(size.max()) / spread,
    }
    return safe, found | {"mean": float(y.abs().max()), "var": float(y.square().max())}


def call(p, impl):
    named = {n: p[n] for n in ("bn_weight", "bn_bias", "residual", "activation", "grid_weight", "tau")}
    with planned_for(p["budget"]):
        return ff.tail_step(p["y"], p["weight"], p["bias"], p["target"], impl=impl, **named, **p["options"])


@pytest.mark.skipif("native" not in IMPLEMENTATIONS, reason="of the C++ kernel")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head", ["projection", "groups"])
def test_memory_is_that_of_the_results(head, dtype, layout):
    """dL/dy, the residual's gradient and the next input have y's size; samples are widened to float32 one at a time."""
    y, residual = (torch.randn(64, 16, 16, 16).to(dtype).contiguous(memory_format=layout) for _ in range(2))
    target, size = torch.zeros(64, dtype=torch.int64), y.numel() * y.element_size()
    for added in (None, residual):
        options = {"residual": added, "impl": "native"}
        if head == "projection":
            run = functools.partial(ff.tail_step, y, torch.randn(10, 16), None, target, **options)
        else:
            run = functools.partial(ff.group_tail_step, y, target, groups=4, **options)
        run()
        results = 2 if added is None else 3
        assert peak_memory(run) <= results * size + 2**15


@pytest.mark.parametrize(("dtype", "impl"), RUNS)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_tail_step(data, dtype, impl):
    """Every result, its argument untouched, the same bits twice. x is rounded to y's dtype before it meets the head."""
    p = data.draw(problems(dtype))
    assume(p["y"].numel() > p["y"].shape[1])
    exact, plain = eager(p, torch.float64), eager(p, torch.promote_types(dtype, torch.float32))
    away, size = magnitudes(p, exact)
    assume(away)
    before = {n: t.clone() for n, t in p.items() if isinstance(t, torch.Tensor)}
    step, again = call(p, impl), call(p, impl)

    def close(name, got, want, rough):
        assert got.shape == want.shape, name
        eps = torch.finfo(torch.bfloat16 if dtype == torch.bfloat16 else got.dtype).eps
        allowed = 4 * float((rough.double() - want).abs().max()) + 8 * eps * size[name]
        off = float((got.double() - want).abs().max())
        assert off <= allowed, f"{name}: off by {off:.3g}, allowed {allowed:.3g}"

    for i, name in enumerate(("loss", "goodness", "normalized", "mean", "var")):
        assert (exact[i] is None) == (getattr(step, name) is None)
        if exact[i] is not None:
            close(name, getattr(step, name), exact[i], plain[i])
    for field in GRADIENTS:
        name, found = field.removeprefix("grad_"), getattr(step, field)
        assert (found is None) == (name not in exact[5]), field
        if found is not None:
            assert found.dtype == p[name].dtype
            close(name, found, exact[5][name], plain[5][name])
    assert all(same_bits(p[n], t) for n, t in before.items()), "an argument was written to"
    assert all(same_bits(a, b) for a, b in zip(step, again, strict=True) if a is not None)


# --- in a network


class Shared(nn.Module):
    """What ends like an epilogue but is none: the normalised tensor is used twice; and one whose activation has an argument."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv, self.norm, self.act = (
            kind,
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.GELU("tanh"),
        )

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.kind == "twice":
            return F.relu(y) * y
        return y + y if self.kind == "doubled" else self.act(y)


def with_classifier(*blocks):
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))


NETS = {
    "resnet18": (lambda: fastff.models.resnet18(5, stem="cifar", width=8), "batch norm + residual + relu"),
    "mobilenet_v3_small": (
        lambda: fastff.models.mobilenet_v3_small(5, stem="cifar", width_mult=0.5), "batch norm + residual"),
    "torchvision's resnet50": (lambda: import_torchvision().models.resnet50(num_classes=5), "batch norm + residual + relu"),
    "torchvision's efficientnet_b0": (
        lambda: import_torchvision().models.efficientnet_b0(num_classes=5, stochastic_depth_prob=0.0), "batch norm"),
}  # fmt: skip


def epilogues_of(sff):
    return [sff.local_blocks[index].epilogue for index in range(len(sff.blocks))]


def trained(sff, batches, **options):
    """State after training on the batches, running statistics included."""
    trainer = Trainer(sff, lambda groups: torch.optim.SGD(groups, lr=1e-3), **options)
    losses = [trainer.step(*batch) for batch in batches]
    return torch.stack(losses), dict(sff.state_dict())


@pytest.mark.skipif(TRITON, reason="nothing of the kernels")
@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("name", NETS)
def test_training_with_fused_epilogues_is_training_without(name, granularity):
    torch.manual_seed(0)
    make, kind = NETS[name]
    net = make().double()
    size, micro_batches = (64, 1) if "torchvision" in name else (32, 2)
    batches = [(torch.randn(6, 3, size, size, dtype=torch.float64), torch.randint(5, (6,))) for _ in range(3)]
    options = {
        "input_shape": (3, size, size),
        "window": 1,
        "granularity": granularity,
        "hidden": 6 * (name == "resnet18"),
    }
    fused, plain = (SFF(copy.deepcopy(net), 5, **options, fuse=fuse) for fuse in (True, False))
    plain.load_state_dict(fused.state_dict())
    epilogues = epilogues_of(fused)
    assert kind in {str(epilogue) for epilogue in epilogues}
    assert all(epilogue is None for epilogue in epilogues_of(plain))
    calls = []
    for epilogue in epilogues:
        if epilogue is not None:
            epilogue.update = lambda *a, run=epilogue.update, **k: (calls.append(1), run(*a, **k))[1]
    start = {k: v.clone() for k, v in fused.state_dict().items()}
    (losses, state), (plain_losses, plain_state) = (
        trained(sff, batches, micro_batches=micro_batches) for sff in (fused, plain)
    )
    assert len(calls) == sum(epilogue is not None for epilogue in epilogues) * micro_batches * len(batches)
    torch.testing.assert_close(losses, plain_losses, rtol=1e-7, atol=1e-7)
    moved = max(float((plain_state[k].double() - v.double()).norm()) for k, v in start.items())
    off = {k: float((state[k].double() - v.double()).norm()) for k, v in plain_state.items()}
    assert max(off.values()) < 1e-7 * moved, max(off.items(), key=lambda item: item[1])


@pytest.mark.skipif(TRITON, reason="nothing of the kernels")
def test_what_is_no_epilogue_and_what_turns_one_off():
    for kind in ("twice", "doubled", "other"):
        net = with_classifier(nn.Conv2d(3, 3, 1), Shared(kind))
        net(torch.zeros(2, 3, 8, 8))
        assert epilogues_of(SFF(net, 5, input_shape=(3, 8, 8))) == [None, None], kind
    net = with_classifier(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    net(torch.zeros(2, 3, 8, 8))
    sff = SFF(net, 5, input_shape=(3, 8, 8), window=1)
    assert str(*epilogues_of(SFF(net, 5, input_shape=(3, 8, 8), normalize=None))) == "batch norm + relu"
    (epilogue,) = epilogues_of(sff)
    assert str(epilogue) == "batch norm + relu"
    (block,) = sff.local_blocks
    ready = lambda: block.graph.ready() and block.epilogue.ready()  # noqa: E731
    assert ready()
    seen = []
    handle = net[0][1].register_forward_hook(lambda *_: seen.append(1))
    assert not ready()
    Trainer(sff).step(torch.randn(4, 3, 8, 8), torch.arange(4))
    assert seen == [1]
    handle.remove()
    net[0][1].eval()
    assert not ready()
    net.train()
    net[0][1].momentum = None
    assert not ready()


@pytest.mark.skipif(TRITON, reason="nothing of the kernels")
def test_mixed_dtypes_and_broadcasting_go_through_the_modules(monkeypatch):
    """A residual of another shape or dtype than the convolution's output: the epilogue's modules run as they are."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)

        def forward(self, x):
            return F.relu(self.norm(self.conv(x)) + x.mean(1, keepdim=True))

    torch.manual_seed(0)
    net = with_classifier(Block())
    net(torch.zeros(2, 3, 8, 8))
    fused, plain = (SFF(copy.deepcopy(net), 5, input_shape=(3, 8, 8), window=1, fuse=fuse) for fuse in (True, False))
    plain.load_state_dict(fused.state_dict())
    assert fused.local_blocks[0].epilogue is not None
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4))] * 2
    (_, state), (_, plain_state) = (trained(sff, batches) for sff in (fused, plain))
    for name, value in plain_state.items():
        torch.testing.assert_close(state[name], value)


@pytest.mark.skipif(TRITON, reason="nothing of the kernels")
def test_bad_arguments_are_named():
    y, weight, target = torch.randn(2, 3, 4, 4), torch.randn(5, 3), torch.tensor([0, 1])
    for error, options in (
        ("y: expected a tensor", {"y": torch.randn(2, 3)}),
        ("y: expected more than one value", {"y": torch.randn(1, 3, 1, 1), "target": target[:1]}),
        ("bn_weight: expected a floating-point tensor \\[3\\]", {"bn_weight": torch.ones(4)}),
        ("bn_bias: expected a floating-point tensor \\[3\\]", {"bn_bias": torch.ones(3, dtype=torch.int64)}),
        ("residual: expected \\[2, 3, 4, 4\\]", {"residual": torch.randn(2, 3, 1, 1)}),
        ("residual: expected .* torch.float32", {"residual": y.double()}),
        ("activation: expected one of none, relu", {"activation": "tanh"}),
        ("normalize: expected one of", {"normalize": "batch"}),
        ("target: expected labels in 0..4", {"target": torch.tensor([0, 5])}),
        ("impl", {"impl": "cuda"}),
    ):
        arguments = {"y": y, "weight": weight, "bias": None, "target": target} | options
        with pytest.raises((ValueError, RuntimeError), match=error):
            ff.tail_step(**arguments)


@pytest.mark.skipif(TRITON, reason="nothing of the kernels")
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl):
    torch.manual_seed(0)
    y, weight = torch.randn(3, 4, 5, 5), torch.randn(6, 4, 1, 1)
    for residual, bn in ((None, None), (torch.randn(3, 4, 5, 5), torch.rand(4))):
        epilogue, loss = Epilogue(bn, bn, residual=residual), Loss(target=torch.tensor([0, 1, 2]))
        step = Step(y, epilogue, Projection(weight), loss, Normalization("layer_norm", 6))
        torch.library.opcheck(torch.ops.fastff.step.default, op_arguments(step, impl))
