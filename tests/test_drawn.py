"""Ten thousand drawn calls of the compiled operators against the definitions in float64: shapes, layouts, offsets, options, threads.

Coarser than the property tests beside each op, whose tolerances are derived, and much quicker a call. `make fuzz` draws 100,000 (FASTFF_DRAWS)."""

import os

import pytest
import torch
from oracle import KINKS, LAYOUTS, same_bits

import fastff.functional as ff
from fastff import reference
from fastff.kernels import native
from fastff.spec import NORMALIZATIONS

pytestmark = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "available")

DRAWS = int(os.environ.get("FASTFF_DRAWS", 10_000))
PARTS = 10


class Draw:
    """Everything random about one call, from its number alone."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def between(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def of(self, *values):
        return values[self.between(0, len(values) - 1)]

    def values(self, *shape, scale=1.0):
        return torch.randn(shape, generator=self.generator) * scale

    def laid(self, values):
        """(in one of the layouts users hand in, the memory around it)."""
        return LAYOUTS[self.of(*sorted(LAYOUTS.keys() - {"expanded"}))](values)

    def images(self):
        B, C, H, W = self.between(1, 5), self.of(1, 3, 8, 16, 17, 33), self.between(1, 12), self.between(1, 12)
        return self.laid(self.values(B, C, H, W))


def close(name, got, want, size=None):
    """Within 2e-4 of the greatest element (of the greatest term of its sums)."""
    assert got.shape == want.shape, f"{name}: {list(got.shape)} instead of {list(want.shape)}"
    if want.numel():
        scale = max(float(want.abs().max()), size or 0.0, 1e-6)
        off = float((got.double() - want).abs().max())
        assert off <= 2e-4 * scale, f"{name}: off by {off:.2g}, sizes {scale:.2g}"


def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


def head(draw, C, B):
    K, grid = draw.of(1, 2, 7, 16, 40), draw.of(None, None, (2, 2), (4, 3))
    weight = draw.values(K, C, 1, 1, scale=(1 / C) ** 0.5)
    bias = draw.values(K, scale=0.5) if draw.of(True, False) else None
    grid_weight = None if grid is None else draw.values(K, C, *grid, scale=(1 / C) ** 0.5)
    target = torch.randint(K, (B,), generator=draw.generator)
    return weight, bias, grid_weight, target, draw.of("direct", "second_moment")


def step_gradients(x, weight, bias, grid_weight, target, tau):
    """(losses, g, grad_x, grad_weight, grad_bias, grad_grid) by the definitions."""
    g = reference.goodness(x, weight, bias, grid_weight)
    d, _ = reference.goodness_gradient(g, target, tau, scale=1 / len(x))
    grad_x, grad_weight, grad_bias = reference.gradients_direct(d, x, weight, bias)
    grad_grid = None
    if grid_weight is not None:
        spread, grad_grid = reference.gradients_grid(d, x, grid_weight)
        grad_x = grad_x + spread
    return (
        reference.margin_cross_entropy(g, target, tau),
        g,
        grad_x,
        grad_weight,
        grad_bias if bias is not None else None,
        grad_grid,
    )


def goodness(draw):
    x, memory = draw.images()
    weight, bias, grid_weight, target, algorithm = head(draw, x.shape[1], len(x))
    need, normalize = draw.of(True, False), draw.of("layer_norm", None)
    before = memory.clone()
    step = ff.goodness_step(
        x,
        weight,
        bias,
        target,
        grid_weight=grid_weight,
        tau=0.5,
        algorithm=algorithm,
        impl="native",
        normalize=normalize,
        need_grad_x=need,
    )
    want = step_gradients(*wide(x, weight, bias, grid_weight), target, 0.5)
    close("loss", step.loss, want[0].mean(), 1.0)
    for name, got, exact in zip(
        ("goodness", "grad_x", "grad_weight", "grad_bias", "grad_grid_weight"), step[1:6], want[1:], strict=True
    ):
        assert (got is None) == (exact is None or (name == "grad_x" and not need)), name
        if got is not None:
            close(name, got, exact, 0.1)
    if normalize and x[0].numel() > 1:
        close("normalized", step.normalized.flatten(1), reference.layer_norm(x.double()), 1.0)
    return same_bits(memory, before)


def tail(draw):
    y, memory = draw.images()
    if y.numel() == y.shape[1]:
        return True
    weight, bias, grid_weight, target, algorithm = head(draw, y.shape[1], len(y))
    residual = draw.laid(draw.values(*y.shape))[0] if draw.of(True, False) else None
    gamma, beta = (draw.values(y.shape[1]) if draw.of(True, False) else None for _ in range(2))
    activation, before = draw.of(*reference.ACTIVATIONS), memory.clone()
    x, h, mean, var = reference.epilogue(
        *wide(y, gamma, beta), 1e-5, None if residual is None else residual.double(), activation
    )
    if any(float((h - kink).abs().min()) < 1e-4 for kink in KINKS.get(activation, ())) or float(var.min()) < 1e-3:
        return True
    step = ff.tail_step(
        y, weight, bias, target, bn_weight=gamma, bn_bias=beta, residual=residual, activation=activation, grid_weight=grid_weight, tau=0.5,
        algorithm=algorithm, impl="native",
    )  # fmt: skip
    _, g, grad_x, *grads = step_gradients(x, *wide(weight, bias, grid_weight), target, 0.5)
    grad_y, grad_h, grad_gamma, grad_beta = reference.epilogue_gradients(
        grad_x, y.double(), h, mean, var, None if gamma is None else gamma.double(), 1e-5, activation
    )
    expected = (g, grad_y, grad_h if residual is not None else None)
    expected += (None if gamma is None else grad_gamma, None if beta is None else grad_beta, *grads)
    names = (
        "goodness",
        "grad_y",
        "grad_residual",
        "grad_bn_weight",
        "grad_bn_bias",
        "grad_weight",
        "grad_bias",
        "grad_grid_weight",
    )
    for name, exact in zip(names, expected, strict=True):
        got = getattr(step, name)
        assert (got is None) == (exact is None), name
        if got is not None:
            close(name, got, exact, 1.0)
    return same_bits(memory, before)


def convolution(draw):
    x, memory = draw.images()
    kernel, stride = draw.of(1, 2, 3, 5), draw.of(1, 2, 3)
    padding, D = draw.between(0, kernel), draw.of(1, 5, 6, 13)
    if min(x.shape[2:]) + 2 * padding < kernel:
        return True
    P, Q = ((n + 2 * padding - kernel) // stride + 1 for n in x.shape[2:])
    grad, before = draw.laid(draw.values(len(x), D, P, Q))[0], memory.clone()
    got = torch.ops.fastff.convolution_weight_gradient(grad, x, kernel, stride, padding, "native")
    close("weight", got, reference.convolution_weight_gradient(grad.double(), x.double(), kernel, stride, padding), 1.0)
    return same_bits(memory, before)


def depthwise(draw):
    x, memory = draw.images()
    kernel, stride = draw.of(3, 5), draw.of(1, 2)
    padding = draw.between(0, kernel - 1)
    if min(x.shape[2:]) + 2 * padding < kernel:
        return True
    weight, before = draw.values(x.shape[1], 1, kernel, kernel), memory.clone()
    y, sums = torch.ops.fastff.depthwise(x, weight, stride, padding, "native")
    exact = reference.depthwise(x.double(), weight.double(), stride, padding)
    grad = draw.laid(draw.values(*y.shape))[0]
    dx, dw = torch.ops.fastff.depthwise_backward(grad, x, weight, stride, padding, True, "native")
    want = reference.depthwise_gradients(grad.double(), x.double(), weight.double(), stride, padding)
    close("y", y, exact, 1.0)
    close("sums", sums, torch.stack([exact.sum((0, 2, 3)), exact.square().sum((0, 2, 3))]), 1.0)
    close("dL/dx", dx, want[0], 1.0)
    close("dL/dweight", dw, want[1], 1.0)
    return same_bits(memory, before)


def group_goodness(draw):
    """Goodness without weights, alone or behind batch norm, against the same on PyTorch's operators in float64."""
    x, memory = draw.images()
    C, before = x.shape[1], memory.clone()
    groups = draw.between(1, C)
    loss = draw.of("cross_entropy", "softplus", "swish", "symba") if len(x) % 2 == 0 else "cross_entropy"
    target = torch.randint(groups, (len(x),), generator=draw.generator) if loss == "cross_entropy" else None
    options = {"groups": groups, "loss": loss, "power": draw.of(1, 2), "mean": draw.of(True, False), "theta": 0.5}
    options["normalize"] = draw.of(None, *NORMALIZATIONS)
    if draw.of(True, False) or x.numel() == C:
        step = ff.group_goodness_step
    else:
        step = ff.group_tail_step
        options |= {
            "bn_weight": draw.values(C),
            "bn_bias": draw.values(C),
            "activation": draw.of("none", "silu", "gelu"),
        }
        if float(x.double().var((0, 2, 3)).min()) < 1e-2:
            return True
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    want = step(x.double(), target, **exact, eps=1e-3, impl="torch")
    got = step(x, target, **options, eps=1e-3, impl="native")
    for name, a, b in zip(got._fields, got, want, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            close(name, a, b, 1.0)
    return same_bits(memory, before)


OPS = (goodness, tail, convolution, depthwise, group_goodness)


@pytest.mark.parametrize("part", range(PARTS))
def test_drawn_calls(part):
    threads = torch.get_num_threads()
    try:
        for seed in range(part * DRAWS // PARTS, (part + 1) * DRAWS // PARTS):
            torch.set_num_threads(1 + seed // len(OPS) % 2)
            op = OPS[seed % len(OPS)]
            try:
                untouched = op(Draw(seed))
            except Exception as error:
                raise AssertionError(f"draw {seed}, {op.__name__}: {error}") from error
            assert untouched, f"draw {seed}, {op.__name__}: an argument was written to"
    finally:
        torch.set_num_threads(threads)
