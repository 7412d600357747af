"""Ten thousand drawn calls of the compiled operators against the definitions in float64: shapes, layouts of every tensor, offsets, options, threads.

Coarser than the property tests beside each op, whose tolerances are derived, and much quicker a call. `make fuzz` draws 100,000 (FASTFF_DRAWS).

Every tensor handed in, small ones too, lies in memory in a layout of its own: strided, expanded, transposed, a slice of a larger tensor.
Around it are NaN, and around labels numbers that are no labels, so that an operator that reads a tensor as if it were contiguous gives
another result."""

import os

import pytest
import torch
import torch.nn.functional as F
from oracle import EVERY_LAYOUT, KINKS, LABELS, OVERLAPPING, layouts_of, same_bits
from torch import nn

import fastff.functional as ff
from fastff import reference, spec
from fastff.kernels import native
from fastff.nn import FFBlock

pytestmark = pytest.mark.skipif(bool(native.reason()), reason=native.reason() or "available")

DRAWS = int(os.environ.get("FASTFF_DRAWS", 10_000))
PARTS = 10


class Draw:
    """Everything random about one call, from its number alone, and the memory of all that is handed in."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        self.memories = []

    def between(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def of(self, *values):
        return values[self.between(0, len(values) - 1)]

    def values(self, *shape, scale=1.0):
        return torch.randn(shape, generator=self.generator) * scale

    def laid(self, values, writable=False):
        """In one of the layouts users hand in; in some of them the values are others."""
        if values is None:
            return None
        laid, memory = EVERY_LAYOUT[
            self.of(*(n for n in layouts_of(values.dim()) if not (writable and n in OVERLAPPING)))
        ](values)
        if not writable:
            self.memories.append((memory, memory.clone()))
        return laid

    def labels(self, classes, count):
        labels = LABELS[self.of(*LABELS)](torch.randint(classes, (count,), generator=self.generator))
        self.memories.append(
            (
                labels if labels._base is None else labels._base,
                labels.clone() if labels._base is None else labels._base.clone(),
            )
        )
        return labels

    def factor(self, *shapes):
        """A positive number as a tensor of one element."""
        return self.laid(torch.full(self.of(*shapes), self.of(0.5, 1.0, 2.0)))

    def maybe(self, *tensors):
        return [t if self.of(True, False) else None for t in tensors]

    def images(self, dtype=torch.float32):
        B, C, H, W = self.between(1, 5), self.of(1, 3, 8, 16, 17, 33), self.between(1, 12), self.between(1, 12)
        return self.laid(self.values(B, C, H, W).to(dtype))

    def untouched(self):
        return all(same_bits(memory, before) for memory, before in self.memories)


def close(name, got, want, size=None, loose=1.0):
    """Within 2e-4 of the greatest element (of the greatest term of its sums)."""
    assert (got is None) == (want is None), name
    if want is None:
        return
    assert got.shape == want.shape, f"{name}: {list(got.shape)} instead of {list(want.shape)}"
    if want.numel():
        scale = max(float(want.abs().max()), size or 0.0, 1e-6)
        off = float((got.double() - want).abs().max())
        assert off <= 2e-4 * scale * loose, f"{name}: off by {off:.2g}, sizes {scale:.2g}"


def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


def head(draw, C, B):
    K, grid = draw.of(1, 2, 7, 16, 40), draw.of(None, None, (2, 2), (4, 3))
    weight = draw.laid(draw.values(K, C, *draw.of((), (1, 1)), scale=(1 / C) ** 0.5))
    (bias,) = draw.maybe(draw.laid(draw.values(K, scale=0.5)))
    grid_weight = None if grid is None else draw.laid(draw.values(K, C, *grid, scale=(1 / C) ** 0.5))
    return weight, bias, grid_weight, draw.labels(K, B), draw.of("direct", "second_moment")


def hidden_layer(draw, x, grid_weight):
    """(grid_weight of another shape, a Hidden layer on x, True) for half of the heads with a grid, else (grid_weight, None, True).

    False if its batch norm has values close to the kink of ReLU or close together: they are computed from x in float64."""
    if grid_weight is None or draw.of(True, False):
        return grid_weight, None, True
    M, C = draw.of(1, 5, 16, 70), x.shape[1]
    (known,) = draw.maybe((draw.laid(draw.values(M, scale=0.3)), draw.laid(draw.values(M).abs() + 0.1)))
    affine = draw.maybe(draw.laid(draw.values(M)), draw.laid(draw.values(M)))
    hidden = spec.Hidden(draw.laid(draw.values(M, C, scale=(1 / C) ** 0.5)), *affine, 1e-3, *(known or (None, None)))
    means = reference.cell_means(x.double(), grid_weight)
    _, _, h, _, var = reference.hidden_layer(means, *wide_hidden(hidden))
    fits = float(h.abs().min()) > 1e-4 and float(var.min()) > 1e-2
    shape = (len(grid_weight), M, *grid_weight.shape[2:])
    return draw.laid(draw.values(*shape, scale=(1 / M) ** 0.5)), hidden, fits


def wide_hidden(hidden):
    """The Hidden layer in float64, or None."""
    return hidden and spec.Hidden(*(t.double() if isinstance(t, torch.Tensor) else t for t in hidden))


def temperature(draw):
    """tau as a number or a learned one, and the factor of all gradients."""
    (grad_scale,) = draw.maybe(draw.factor((), (1,)))
    return draw.of(0.5, draw.factor(())), grad_scale


def step_gradients(x, weight, bias, grid_weight, hidden, target, tau, grad_scale):
    """{field of the step: its value, losses not reduced} by the definitions, and how much more may be off where goodness is large."""
    flat = weight.view(*weight.shape[:2], 1, 1)
    learned, tau = isinstance(tau, torch.Tensor), float(tau)
    g = reference.goodness(x, flat, bias, grid_weight, hidden=hidden)
    scale = (1.0 if grad_scale is None else float(grad_scale)) / len(x)
    d, grad_tau = reference.goodness_gradient(g, target, tau, scale=scale)
    found = {
        "loss": reference.margin_cross_entropy(g, target, tau).mean(),
        "goodness": g,
        "grad_tau": grad_tau if learned else None,
    }
    found |= zip(GRADIENTS, head_gradients(d, x, weight, bias, grid_weight, hidden), strict=False)
    found |= zip(("hidden_mean", "hidden_var"), (None, None), strict=True)
    if hidden is not None:
        found |= zip(
            ("hidden_mean", "hidden_var"),
            reference.hidden_layer(reference.cell_means(x, grid_weight), *hidden)[-2:],
            strict=True,
        )
    return found, max(1.0, tau * float(g.abs().max()) / 50)


GRADIENTS = (
    "grad_x", "grad_weight", "grad_bias", "grad_grid_weight", "grad_hidden_weight", "grad_hidden_bn_weight", "grad_hidden_bn_bias"
)  # fmt: skip


def head_gradients(d, x, weight, bias, grid_weight, hidden=None):
    """The GRADIENTS of the sum of d * g."""
    grad_x, grad_weight, grad_bias = reference.gradients_direct(d, x, weight.view(*weight.shape[:2], 1, 1), bias)
    grads = [None] * 4
    if grid_weight is not None:
        spread, *found = reference.gradients_grid(d, x, grid_weight, hidden)
        grad_x = grad_x + spread
        present = (True, *(t is not None for t in (hidden or ())[:3]))
        grads = [grad if here else None for grad, here in zip(found, present, strict=True)] + [None] * (4 - len(found))
    return grad_x, grad_weight.view(weight.shape), grad_bias if bias is not None else None, *grads


def goodness(draw):
    x = draw.images()
    weight, bias, grid_weight, target, algorithm = head(draw, x.shape[1], len(x))
    grid_weight, hidden, fits = hidden_layer(draw, x, grid_weight)
    if not fits:
        return
    need, normalize = draw.of(True, False), draw.of("layer_norm", None)
    tau, grad_scale = temperature(draw)
    step = ff.goodness_step(
        x, weight, bias, target, grid_weight=grid_weight, hidden=hidden, tau=tau, grad_scale=grad_scale, algorithm=algorithm, impl="native",
        normalize=normalize, need_grad_x=need,
    )  # fmt: skip
    want, loose = step_gradients(*wide(x, weight, bias, grid_weight), wide_hidden(hidden), target, tau, grad_scale)
    for name, exact in (want | ({} if need else {"grad_x": None})).items():
        close(name, getattr(step, name), exact, 1.0 if name == "loss" else 0.1, loose)
    if normalize and x[0].numel() > 1:
        close("normalized", step.normalized, reference.normalized(x.double(), "layer_norm"), 1.0)


def differentiated(draw):
    """Goodness and its gradients by autograd, from a gradient in a layout of its own."""
    x = draw.images()
    weight, bias, grid_weight, _, algorithm = head(draw, x.shape[1], len(x))
    leaves = [t.requires_grad_() for t in (x, weight, bias, grid_weight) if t is not None]
    g = ff.goodness(x, weight, bias, grid_weight=grid_weight, algorithm=algorithm, impl="native")
    d = draw.laid(draw.values(*g.shape))
    found = iter(torch.autograd.grad(g, leaves, d))
    got = [None if t is None else next(found) for t in (x, weight, bias, grid_weight)]
    exact = wide(*(None if t is None else t.detach() for t in (x, weight, bias, grid_weight)))
    close("g", g.detach(), reference.goodness(exact[0], exact[1].view(*weight.shape[:2], 1, 1), *exact[2:]), 0.1)
    for name, a, b in zip(
        ("x", "weight", "bias", "grid_weight"), got, head_gradients(d.double(), *exact), strict=False
    ):
        close(f"dL/d{name}", a, b, 0.1)


def epilogue_step(draw):
    y = draw.images()
    C = y.shape[1]
    if y.numel() == C:
        return
    weight, bias, grid_weight, target, algorithm = head(draw, C, len(y))
    residual, gamma, beta = draw.maybe(*(draw.laid(draw.values(*shape)) for shape in (y.shape, (C,), (C,))))
    tau, grad_scale = temperature(draw)
    activation = draw.of(*reference.ACTIVATIONS)
    x, h, mean, var = reference.epilogue(*wide(y, gamma, beta), 1e-5, *wide(residual), activation)
    if any(float((h - kink).abs().min()) < 1e-4 for kink in KINKS.get(activation, ())) or float(var.min()) < 1e-3:
        return
    grid_weight, hidden, fits = hidden_layer(draw, x, grid_weight)
    if not fits:
        return
    step = ff.tail_step(
        y, weight, bias, target, bn_weight=gamma, bn_bias=beta, residual=residual, activation=activation, grid_weight=grid_weight, tau=tau,
        hidden=hidden, grad_scale=grad_scale, algorithm=algorithm, impl="native",
    )  # fmt: skip
    expected, loose = step_gradients(x, *wide(weight, bias, grid_weight), wide_hidden(hidden), target, tau, grad_scale)
    expected["grad_x"], grad_h, grad_gamma, grad_beta = reference.epilogue_gradients(
        expected["grad_x"], y.double(), h, mean, var, *wide(gamma), 1e-5, activation
    )
    expected["grad_residual"] = None if residual is None else grad_h
    expected["grad_bn_weight"] = None if gamma is None else grad_gamma
    expected["grad_bn_bias"] = None if beta is None else grad_beta
    for name, exact in expected.items():
        close(name, getattr(step, name), exact, 1.0, loose)
    close("mean", step.mean, mean, 1.0)
    close("var", step.var, var, 1.0)


def convolution(draw):
    x = draw.images()
    kernel, stride = draw.of(1, 2, 3, 5), draw.of(1, 2, 3)
    padding, D = draw.between(0, kernel), draw.of(1, 5, 6, 13)
    if min(x.shape[2:]) + 2 * padding < kernel:
        return
    P, Q = ((n + 2 * padding - kernel) // stride + 1 for n in x.shape[2:])
    grad = draw.laid(draw.values(len(x), D, P, Q))
    got = torch.ops.fastff.convolution_weight_gradient(grad, x, kernel, stride, padding, "native")
    want = torch.nn.grad.conv2d_weight(x.double(), (D, x.shape[1], kernel, kernel), grad.double(), stride, padding)
    close("weight", got, want, 1.0)
    if (kernel, stride) == (3, 1) and padding < 3:
        weight, ops = draw.laid(draw.values(D, x.shape[1], 3, 3)), torch.ops.fastff
        close("weight", ops.convolution_winograd_gradient_native(grad, x, padding, draw.of(True, False)), want, 1.0)
        exact = F.conv2d(x.double(), weight.double(), padding=padding)
        close("y", ops.convolution_winograd_native(x, weight, None, padding, False), exact, 1.0)
        exact = F.conv_transpose2d(grad.double(), weight.double(), padding=padding)
        close("x", ops.convolution_winograd_native(grad, weight, None, 2 - padding, True), exact, 1.0)


def depthwise(draw):
    x = draw.images()
    kernel, stride = draw.of(3, 5), draw.of(1, 2)
    padding = draw.between(0, kernel - 1)
    if min(x.shape[2:]) + 2 * padding < kernel:
        return
    weight = draw.laid(draw.values(x.shape[1], 1, kernel, kernel))
    y = torch.ops.fastff.depthwise(x, weight, stride, padding, "native")
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    exact = F.conv2d(*leaves, stride=stride, padding=padding, groups=len(weight))
    grad = draw.laid(draw.values(*y.shape))
    dx, dw = torch.ops.fastff.depthwise_backward(grad, x, weight, stride, padding, True, "native")
    want = torch.autograd.grad(exact, leaves, grad.double())
    close("y", y, exact.detach(), 1.0)
    close("dL/dx", dx, want[0], 1.0)
    close("dL/dweight", dw, want[1], 1.0)


def sixteen_bits(draw):
    """A step on 16-bit images, the first of which may be black, by autograd of the definition on the same images in float64."""
    dtype = draw.of(torch.bfloat16, torch.float16)
    x = draw.images(dtype)
    if draw.of(True, False) and 0 not in x.stride():
        x[0] = 0
        draw.memories = [(memory, memory.clone()) for memory, _ in draw.memories]
    weight, bias, grid_weight, target, algorithm = head(draw, x.shape[1], len(x))
    options = {"margin": draw.of(0.0, 0.5), "label_smoothing": draw.of(0.0, 0.2), "tau": 0.3}
    need, normalize = draw.of(True, False), draw.of(None, *spec.NORMALIZATIONS[1:])
    if normalize == "group_norm" and len(weight) > x.shape[1]:
        return
    step = ff.goodness_step(
        x, weight, bias, target, grid_weight=grid_weight, **options, algorithm=algorithm, impl="native", normalize=normalize,
        need_grad_x=need, eps=1e-3,
    )  # fmt: skip
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias, grid_weight) if t is not None]
    rest = iter(leaves[1:])
    _, *parameters = (t is not None and next(rest) for t in (None, weight, bias, grid_weight))
    flat, *others = (t if isinstance(t, torch.Tensor) else None for t in parameters)
    g = reference.goodness(leaves[0], flat.view(*flat.shape[:2], 1, 1), *others)
    loss = reference.margin_cross_entropy(
        g, target, options["tau"], options["margin"], options["label_smoothing"]
    ).mean()
    found, loose = iter(torch.autograd.grad(loss, leaves)), max(1.0, float(g.detach().abs().max()) / 50)
    want = [None if t is None else next(found) for t in (x, weight, bias, grid_weight)]
    rounded = loose + torch.finfo(dtype).eps / 2e-4  # results of 16 bits
    close("loss", step.loss, loss.detach(), 1.0, loose)
    close("grad_x", step.grad_x, want[0] if need else None, 1e-3, rounded)
    for name, exact in zip(("grad_weight", "grad_bias", "grad_grid_weight"), want[1:], strict=True):
        close(name, getattr(step, name), exact, 0.1, loose)
    if normalize:
        close(
            "normalized", step.normalized, reference.normalized(x.double(), normalize, len(weight), 1e-3), 1.0, rounded
        )


def group_goodness(draw):
    """Goodness without weights, alone or behind batch norm, against the same computed by PyTorch in float64."""
    x = draw.images()
    C = x.shape[1]
    groups = draw.between(1, C)
    loss = draw.of("cross_entropy", "softplus", "swish", "symba") if len(x) % 2 == 0 else "cross_entropy"
    target = draw.labels(groups, len(x)) if loss == "cross_entropy" else None
    options = {"groups": groups, "loss": loss, "power": draw.of(1, 2), "mean": draw.of(True, False), "theta": 0.5}
    options["normalize"] = draw.of(None, *spec.NORMALIZATIONS)
    (options["grad_scale"],) = draw.maybe(draw.factor((), (1,)))
    if draw.of(True, False) or x.numel() == C:
        step, fields = ff.group_goodness_step, ff.GroupGoodnessStep._fields
    else:
        step, fields = ff.group_tail_step, ff.GroupTailStep._fields
        bn_weight, bn_bias, residual = draw.maybe(*(draw.laid(draw.values(*shape)) for shape in ((C,), (C,), x.shape)))
        options |= {
            "bn_weight": bn_weight, "bn_bias": bn_bias, "residual": residual, "activation": draw.of("none", "silu", "gelu"),
        }  # fmt: skip
        if float(x.double().var((0, 2, 3)).min()) < 1e-2:
            return
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    want = step(x.double(), target, **exact, eps=1e-3, impl="torch")
    got = step(x, target, **options, eps=1e-3, impl="native")
    for name, a, b in zip(fields, got, want, strict=True):
        close(name, a, b, 1.0, max(1.0, float(want.goodness.abs().max()) / 1000))


def group_differentiated(draw):
    """Goodness without weights, and the norms, by autograd from a gradient in a layout of its own."""
    x = draw.images().requires_grad_()
    groups, how = draw.between(1, x.shape[1]), draw.of(*spec.NORMALIZATIONS[1:])
    power, mean, positions = draw.of(1, 2), draw.of(True, False), draw.of(True, False)
    groups = 1 if positions else groups
    eps = 1e-3
    call = draw.of(
        lambda x, impl: ff.group_goodness(x, groups, power=power, mean=mean, positions=positions, impl=impl),
        lambda x, impl: ff.normalize(x, how, groups, eps, impl=impl),
        lambda x, impl: ff.layer_norm(x, eps, impl=impl),
    )
    y = call(x, "native")
    d = draw.laid(draw.values(*y.shape))
    exact = x.detach().double().requires_grad_()
    want = call(exact, "torch")
    close("y", y.detach(), want.detach(), 1.0)
    close("dL/dx", torch.autograd.grad(y, x, d)[0], torch.autograd.grad(want, exact, d.double())[0], 1.0)


def block(draw):
    """A block that trains itself, its parameters and running statistics in layouts of their own, against one in float64."""
    B, C, D, K, size = draw.between(2, 5), draw.of(1, 3, 16, 17), draw.of(1, 5, 16), draw.of(1, 7), draw.between(3, 9)
    x, target, groups = draw.laid(draw.values(B, C, size, size)), draw.labels(K, B), draw.of(1, C)
    grid = draw.of(0, 2)
    options = {"grid": grid, "hidden": draw.of(0, 5) if grid else 0, "bias": draw.of(True, False), "learn_tau": True}
    kernel = draw.of(1, 3)
    twins = []
    for _ in range(2):
        convolution = nn.Conv2d(C, C if groups > 1 else D, kernel, padding=kernel // 2, groups=groups, bias=False)
        norm = nn.BatchNorm2d(convolution.out_channels)
        twins.append(FFBlock(nn.Sequential(convolution, norm, nn.SiLU()), convolution.out_channels, K, **options))
    ours, exact = twins[0], twins[1].double()
    ours.head.impl = "native"
    state = {}
    for name, t in ours.state_dict(keep_vars=True).items():
        if t.is_floating_point():
            values = draw.values(*t.shape, scale=0.3)
            t.data = draw.laid(values.abs() if name.endswith("var") else values, writable="running" in name)
        state[name] = t.detach().double() if t.is_floating_point() else t.clone()
    exact.load_state_dict(state)
    with torch.no_grad():
        y = exact.module[0](x.double())
    if float(y.var((0, 2, 3)).min()) < 1e-2:
        return
    if options["hidden"]:
        with torch.no_grad():
            means = reference.cell_means(exact.module[1:](y), exact.head.grid_weight)
            _, _, h, _, var = reference.hidden_layer(means, *exact.head.goodness_spec().hidden)
        if float(h.abs().min()) < 1e-4 or float(var.min()) < 1e-3:
            return
        exact.load_state_dict(state)  # the running statistics, which y has moved
    (normalized, loss), (want, want_loss) = ours.local_step(x, target), exact.local_step(x.double(), target)
    close("loss", loss, want_loss, 1.0)
    close("normalized", normalized, want, 1.0)
    for (name, a), b in zip(ours.named_parameters(), exact.parameters(), strict=True):
        close(f"gradient of {name}", a.grad, b.grad, 1.0)
    for (name, a), b in zip(ours.named_buffers(), exact.buffers(), strict=True):
        close(name, a, b.double(), 1.0)


OPS = (
    goodness,
    differentiated,
    epilogue_step,
    convolution,
    depthwise,
    group_goodness,
    group_differentiated,
    block,
    sixteen_bits,
)


@pytest.mark.parametrize("part", range(PARTS))
def test_drawn_calls(part):
    threads = torch.get_num_threads()
    try:
        for seed in range(part * DRAWS // PARTS, (part + 1) * DRAWS // PARTS):
            torch.set_num_threads(1 + seed // len(OPS) % 2)
            op, draw = OPS[seed % len(OPS)], Draw(seed)
            try:
                op(draw)
            except Exception as error:
                raise AssertionError(f"draw {seed}, {op.__name__}: {error}") from error
            assert draw.untouched(), f"draw {seed}, {op.__name__}: an argument was written to"
    finally:
        torch.set_num_threads(threads)
