"""Goodness without weights, its losses and the normalisations against what anyone would write, differentiated by autograd in float64.

With TRITON_INTERPRET=1 this file tests the Triton kernels, interpreted, and nothing else (test_triton.py runs it so)."""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LABELS, LAYOUTS, assert_as_exact, op_arguments, same_bits, softplus

import fastff.functional as ff
from fastff.ops.group_goodness import ROWS
from fastff.spec import LOSSES, NORMALIZATIONS, Groups, Loss, Normalization, Step

TRITON = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float32, torch.bfloat16, torch.float16) + (() if TRITON else (torch.float64,))
RUNS = [
    (dtype, row.name)
    for row in ROWS
    for dtype in DTYPES
    if (row.name == "triton") == TRITON and row.can_run(torch.zeros(1, 1, 1, 1, dtype=dtype)) is None
]
EXAMPLES = int(os.environ.get("FASTFF_EXAMPLES", 25 if TRITON else 80))


def plain_goodness(x, groups, power, mean, positions):
    reduce = torch.mean if mean else torch.sum
    powers = x**power
    if positions:
        return reduce(powers, 1).flatten(1)
    return torch.stack([reduce(part.flatten(1), 1) for part in torch.tensor_split(powers, groups, 1)], 1)


def plain_loss(g, p):
    if p["loss"] == "cross_entropy":
        u = p["tau"] * g - p["margin"] * F.one_hot(p["target"], g.shape[1]).to(g.dtype)
        return F.cross_entropy(u, p["target"], label_smoothing=p["label_smoothing"], reduction=p["reduction"])
    f = F.silu if "swish" in p["loss"] else softplus
    n = len(g) // 2
    if "symba" in p["loss"]:  # noqa: SIM108
        losses = f(-p["alpha"] * (g[:n] - g[n:])).mean(1)
    else:
        losses = torch.cat([f(p["theta"] - g[:n]), f(g[n:] - p["theta"])]).mean(1)
    return {"mean": losses.mean(), "sum": losses.sum(), "none": losses}[p["reduction"]]


def plain_normalized(x, how, groups, eps=1e-5):
    if how in ("layer_norm", "group_norm"):  # F.group_norm refuses a single value
        parts = torch.tensor_split(x, groups if how == "group_norm" else 1, 1)
        return torch.cat([F.layer_norm(part, part.shape[1:], eps=eps) for part in parts], 1)
    if how == "layer_norm_channels":
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2], eps=eps).movedim(-1, 1)
    dims = (1,) if how.endswith("channels") else (1, 2, 3)
    if how.startswith("l2"):
        return x / (torch.linalg.vector_norm(x, dim=dims, keepdim=True) + eps)
    return x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)


def largest_rstd(x, how, groups, eps=1e-5):
    """The largest 1 / sqrt(variance + eps) that a normalization multiplies x - mean with; 0 for those that subtract no mean."""
    if how not in ("layer_norm", "layer_norm_channels", "group_norm"):
        return 0.0
    dims = (1,) if how == "layer_norm_channels" else (1, 2, 3)
    parts = torch.tensor_split(x, groups if how == "group_norm" else 1, 1)
    return max((part.var(dims, correction=0) + eps).rsqrt().max() for part in parts)


@st.composite
def problems(draw, dtype):
    C = draw(st.integers(1, 40))
    loss = draw(st.sampled_from(LOSSES))
    positions = loss != "cross_entropy" and draw(st.booleans())
    groups = 1 if positions else draw(st.integers(1, C))
    B = 2 * draw(st.integers(1, 3)) if loss != "cross_entropy" else draw(st.integers(1, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(B, C, draw(st.integers(1, 9)), draw(st.integers(1, 9)), dtype=torch.float64, generator=generator)
    x = (x + draw(st.sampled_from([0.0, 2.0]))).to(dtype)
    return {
        "x": LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](x)[0],
        "how": {"groups": groups, "power": draw(st.sampled_from([1, 2])), "mean": draw(st.booleans()), "positions": positions},
        "loss": loss, "target": torch.randint(groups, (B,), generator=generator) if loss == "cross_entropy" else None,
        "theta": draw(st.sampled_from([2.0, 0.5])), "alpha": draw(st.sampled_from([4.0, 1.0])), "tau": draw(st.sampled_from([1.0, 0.3])),
        "margin": draw(st.sampled_from([0.0, 1.0])), "label_smoothing": draw(st.sampled_from([0.0, 0.1])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])), "normalize": draw(st.sampled_from([None, *NORMALIZATIONS[1:]])),
        "grad_scale": draw(st.sampled_from([None, 8.0])),
    }  # fmt: skip


def eager(p, dtype):
    """(loss, goodness, gradient, next input), differentiated by autograd."""
    x = p["x"].detach().to(dtype, copy=True).requires_grad_()
    g = plain_goodness(x, **p["how"])
    loss = plain_loss(g, p)
    (grad,) = torch.autograd.grad(loss.sum() * (p["grad_scale"] or 1.0), x)
    normal = plain_normalized(x.detach(), p["normalize"], p["how"]["groups"]) if p["normalize"] else None
    return loss.detach(), g.detach(), grad, normal


def compare_step(p, dtype, impl):
    options = {k: v for k, v in p.items() if k not in ("x", "how", "target", "grad_scale")}
    scale = None if p["grad_scale"] is None else torch.tensor(p["grad_scale"])
    run = lambda: ff.group_goodness_step(p["x"], p["target"], **p["how"], **options, grad_scale=scale, impl=impl)  # noqa: E731
    before = p["x"].clone()
    step = run()
    exact = eager(p, torch.float64)
    plain = eager(p, torch.promote_types(dtype, torch.float32))
    # In float64 plain is exact itself, and says nothing of what is rounded on the way: about sqrt(n) roundings of n terms.
    roundings = p["x"][0].numel() ** 0.5 if dtype == torch.float64 else 1
    # goodness: sums of terms of both signs for power 1; what it errs, the loss and the gradient err through the softmax
    size = roundings * plain_goodness(p["x"].double().abs(), **p["how"])
    steep = roundings + 4 * max(p["alpha"], p["tau"], 1.0) * size.max()
    assert_as_exact("goodness", step.goodness, exact[1], plain[1], size)
    assert_as_exact("loss", step.loss, exact[0], plain[0], exact[0].abs() + steep)
    assert_as_exact("grad_x", step.grad_x, exact[2], plain[2], exact[2].abs().max() * steep)
    if p["normalize"]:
        # the variance of data far from zero, by sums of squares on a GPU
        magnitude = roundings * (exact[3].abs() * (1 + p["x"].double().square().mean()) + 1)
        if dtype == torch.float64:
            magnitude += roundings * p["x"].abs().max() * largest_rstd(p["x"], p["normalize"], p["how"]["groups"])
        assert_as_exact("normalized", step.normalized, exact[3], plain[3], magnitude)
    assert (step.normalized is None) == (p["normalize"] is None)
    assert torch.equal(before, p["x"])
    assert all(same_bits(a, b) for a, b in zip(step, run(), strict=True) if a is not None)


@pytest.mark.parametrize(("dtype", "impl"), RUNS)
def test_step(dtype, impl):
    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize="FASTFF_EXAMPLES" not in os.environ)
    @given(problems(dtype))
    def check(p):
        compare_step(p, dtype, impl)

    check()


@pytest.mark.parametrize(("dtype", "impl"), RUNS)
def test_step_far_from_theta_and_of_one_value(dtype, impl):
    """Goodness of 0.01 to 100, where F.softplus is already z itself; each normalization of a single value."""
    how = {"groups": 1, "power": 2, "mean": True, "positions": False}
    settings = {
        "theta": 2.0,
        "alpha": 4.0,
        "tau": 1.0,
        "margin": 0.0,
        "label_smoothing": 0.0,
        "reduction": "mean",
        "grad_scale": None,
    }
    x = torch.tensor([0.1, 5.0, 5.0, 10.0], dtype=dtype)[:, None, None, None]
    for loss in LOSSES[1:]:
        compare_step({"x": x, "how": how, "loss": loss, "target": None, "normalize": None, **settings}, dtype, impl)
    for normalize in NORMALIZATIONS[1:]:
        p = {"x": x[1:2], "how": how, "loss": "cross_entropy", "target": torch.tensor([0]), "normalize": normalize}
        compare_step(p | settings, dtype, impl)


@pytest.mark.parametrize(("dtype", "impl"), RUNS)
def test_alone_and_by_autograd(dtype, impl):
    """group_goodness with its gradient, forward_forward_loss, normalize with its gradient."""
    torch.manual_seed(0)
    compute = torch.promote_types(dtype, torch.float32)
    for C, groups, positions in [(12, 3, False), (7, 3, False), (9, 1, True), (5, 5, False)]:
        x = torch.randn(6, C, 4, 3).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        for power in (1, 2):
            how = {"groups": groups, "power": power, "positions": positions}
            g = ff.group_goodness(x, **how, impl=impl)
            (grad,) = torch.autograd.grad(ff.forward_forward_loss(g, "symba"), x)

            def by(kind, how=how, x=x):
                wide = x.detach().to(kind).requires_grad_()
                g = plain_goodness(wide, how["groups"], how["power"], True, how["positions"])
                loss = F.softplus(-4 * (g[:3] - g[3:])).mean()
                return g.detach(), torch.autograd.grad(loss, wide)[0]

            for name, got, exact, plain in zip(
                ("goodness", "grad"), (g.detach(), grad), by(torch.float64), by(compute), strict=True
            ):
                assert_as_exact(name, got, exact, plain, exact.abs() + exact.abs().max())
    for how in NORMALIZATIONS[1:]:
        y = ff.normalize(x, how, 2, impl=impl)
        seed = torch.randn_like(x)
        got = y.detach(), torch.autograd.grad(y, x, seed)[0]

        def by(kind, how=how, seed=seed):
            wide = x.detach().to(kind).requires_grad_()
            y = plain_normalized(wide, how, 2)
            return y.detach(), torch.autograd.grad(y, wide, seed.to(kind))[0]

        for name, value, exact, plain in zip(
            (how, f"{how} gradient"), got, by(torch.float64), by(compute), strict=True
        ):
            assert_as_exact(name, value, exact, plain, exact.abs() + exact.abs().max())


@pytest.mark.skipif(TRITON, reason="of PyTorch's machinery, not of a kernel")
@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_opcheck_and_second_derivatives(impl):
    x = torch.randn(4, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    for groups, power, positions in [(3, 2, False), (4, 1, False), (1, 2, True)]:
        how = (groups, power, True, positions, impl)
        torch.library.opcheck(torch.ops.fastff.group_goodness.default, (x, *how))
        assert torch.autograd.gradgradcheck(lambda x, how=how: torch.ops.fastff.group_goodness(x, *how).square(), (x,))
    loss = Loss("cross_entropy", torch.tensor([0, 2, 1, 0]), margin=0.5, label_smoothing=0.1)
    step = Step(x.detach(), None, Groups(3), loss, Normalization("group_norm", 3))
    torch.library.opcheck(torch.ops.fastff.step.default, op_arguments(step, impl))
    torch.library.opcheck(torch.ops.fastff.normalize.default, (x, "l2_channels", 1, 1e-5, impl))


@pytest.mark.parametrize("impl", ["auto", *sorted({impl for _, impl in RUNS})])
def test_empty_batch(impl):
    x = torch.zeros(0, 6, 2, 2, requires_grad=True)
    g = ff.group_goodness(x, 3, impl=impl)
    assert g.shape == (0, 3)
    assert torch.autograd.grad(g.sum(), x)[0].shape == x.shape
    assert ff.normalize(x.detach(), "rms", impl=impl).shape == x.shape


@pytest.mark.parametrize("impl", sorted({impl for _, impl in RUNS}))
@pytest.mark.parametrize("layout", LABELS)
def test_step_of_labels_of_any_stride(impl, layout):
    """Labels may be a column of a matrix, or any other view. Around them lie numbers that are no labels."""
    x, target = (
        torch.randn(6, 7, 3, 3),
        torch.tensor([6] * 6) if layout == "expanded" else torch.tensor([3, 0, 6, 6, 1, 2]),
    )
    laid = LABELS[layout](target)
    assert torch.equal(laid, target)
    for call in (ff.group_goodness_step, ff.group_tail_step):
        got, want = (call(x, t, groups=7, reduction="none", impl=impl) for t in (laid, target))
        assert all(a is b is None or same_bits(a, b) for a, b in zip(got, want, strict=True))


def test_halves_of_nan_and_infinity():
    """A sample that is not a number spoils itself, no other."""
    x = torch.randn(4, 3, 2, 2)
    x[1, 0, 0, 0], x[2, 1, 1, 1] = float("nan"), float("inf")
    for row in ROWS:
        if row.can_run(x) is not None:
            continue
        step = ff.group_goodness_step(x, loss="softplus", reduction="none", normalize="rms", impl=row.name)
        assert torch.isfinite(step.loss[[0, 3]]).all()
        assert torch.isfinite(step.grad_x[[0, 3]]).all()
        assert step.loss[1].isnan()
        assert step.loss[2].isinf()


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"groups": 7}, ValueError, "groups: expected 1 to 6"),
        ({"power": 3}, ValueError, "power: expected 1 or 2"),
        ({"positions": True, "groups": 2}, ValueError, "positions: expected groups=1"),
        ({"loss": "hinge"}, ValueError, "loss: expected one of"),
        (
            {"loss": "softplus", "x": torch.ones(3, 6)},
            ValueError,
            "x: expected positive samples and as many negative ones",
        ),
        ({"loss": "softplus", "target": torch.tensor([0, 1, 0, 1])}, ValueError, "target: expected None for softplus"),
        ({"loss": "cross_entropy"}, ValueError, "target: expected .* for cross_entropy"),
        (
            {"loss": "cross_entropy", "target": torch.tensor([0, 1, 0, 9])},
            ValueError,
            r"target: expected labels in 0\.\.0, got 9",
        ),
        ({"normalize": "batch"}, ValueError, "normalize: expected one of"),
        ({"x": torch.ones(4, 6, dtype=torch.int64)}, TypeError, "x: expected float32"),
        ({"reduction": "max"}, ValueError, "reduction: expected"),
    ],
)
def test_bad_input(change, error, said):
    arguments = {"x": torch.ones(4, 6), "loss": "softplus"} | change
    with pytest.raises(error, match=said):
        ff.group_goodness_step(arguments.pop("x"), arguments.pop("target", None), **arguments)


def test_overlay_label():
    x = torch.rand(3, 1, 4, 4)
    before = x.clone()
    out = ff.overlay_label(x, torch.tensor([2, 0, 9]), 10)
    assert torch.equal(x, before)
    rows = out.flatten(1)
    assert torch.equal(rows[:, :10], F.one_hot(torch.tensor([2, 0, 9]), 10) * x.max())
    assert torch.equal(rows[:, 10:], x.flatten(1)[:, 10:])
    with pytest.raises(ValueError, match="label: expected int64"):
        ff.overlay_label(x, torch.tensor([1]), 10)
    with pytest.raises(ValueError, match="num_classes: expected 1 to 16"):
        ff.overlay_label(x, torch.tensor([1, 2, 3]), 17)


@pytest.mark.parametrize("how", NORMALIZATIONS[1:])
@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 3, 2)])
@pytest.mark.parametrize("groups", [3, 4])
def test_gradients_of_normalize(how, shape, groups):
    """The gradient that normalize has, which can be differentiated, against finite differences; and in float32, either layout."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    normalize = lambda x: ff.normalize(x, how, groups, 0.1)  # noqa: E731
    assert torch.autograd.gradcheck(normalize, (x,))
    assert torch.autograd.gradgradcheck(normalize, (x,))
    seed = torch.randn_like(x)
    (want,) = torch.autograd.grad(normalize(x), x, seed)
    for memory in (torch.contiguous_format, torch.channels_last)[: len(shape) - 2 or 1]:
        narrow = x.detach().float().contiguous(memory_format=memory).requires_grad_()
        y = normalize(narrow)
        assert y.stride() == narrow.stride()
        torch.testing.assert_close(y, normalize(x).float())
        torch.testing.assert_close(normalize(narrow.detach()), y.detach())
        torch.testing.assert_close(torch.autograd.grad(y, narrow, seed.float())[0], want.float(), rtol=1e-4, atol=1e-5)
        second, wanted = (second_derivative(normalize, t, seed.to(t)) for t in (narrow, x))
        torch.testing.assert_close(second, wanted.float(), rtol=1e-3, atol=1e-4)
    zero = torch.zeros(shape, requires_grad=True)
    for length in ("l2", "l2_channels"):
        assert not torch.autograd.grad(ff.normalize(zero, length), zero, torch.ones(shape))[0].any()


def second_derivative(normalize, x, seed):
    (grad,) = torch.autograd.grad(normalize(x), x, seed, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)[0]
