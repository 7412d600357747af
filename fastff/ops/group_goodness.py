"""torch.ops.fastff.group_goodness, .group_goodness_backward, .group_goodness_step, .normalize: goodness without weights, as most Forward-Forward code
has it.

x [B, C, H, W] -> g [B, K] over K groups of neighbouring channels, or g [B, P] over the channels at each position (K = 1). A step is g, a loss over
classes or over a positive and a negative half of the batch, dL/dx, and the next layer's input. Formulas: fastff/reference.py.
"""

import torch

from fastff import reference
from fastff.kernels import native, triton
from fastff.kernels.composed import group_goodness as composed
from fastff.kernels.composed.goodness import empty_like, laid_as
from fastff.kernels.composed.group_goodness import Goodness, Loss
from fastff.kernels.native import group_goodness as native_group_goodness
from fastff.ops.goodness import check_labels
from fastff.ops.table import Implementation, Lazy, always, choose, implement


def _native_can_run(x):
    if x.device.type != "cpu":
        return f"the compiled kernel runs on the CPU, x is on {x.device.type}"
    return native.reason() or None


ROWS = [
    Implementation("triton", triton.reason, Lazy("fastff.kernels.triton.group_goodness")),
    Implementation("native", _native_can_run, native_group_goodness),
    Implementation("composed", always, composed),
    Implementation("reference", always, composed, "the same as composed"),
]

_lib = torch.library.Library("fastff", "FRAGMENT")
_HOW = "int groups, int power, bool mean, bool positions"
_lib.define("normalize(Tensor x, str how, int groups, float eps, str impl) -> Tensor")
_lib.define(f"group_goodness(Tensor x, {_HOW}, str impl) -> Tensor")
_lib.define(f"group_goodness_backward(Tensor d, Tensor x, {_HOW}, str impl) -> Tensor")
_lib.define(
    f"group_goodness_step(Tensor x, {_HOW}, str loss, float theta, Tensor? target, float tau, float margin, float label_smoothing, "
    "str reduction, Tensor? grad_scale, str normalize, float eps, bool need_x, str impl) "
    "-> (Tensor loss, Tensor goodness, Tensor grad_x, Tensor normalized)"
)


def _dtype(x):
    return torch.promote_types(x.dtype, torch.float32)


def _goodness(x, groups, power, mean, positions, impl):
    if x.numel() == 0:
        return _goodness_fake(x, groups, power, mean, positions, impl)
    run = choose("group_goodness", ROWS, impl, x).run
    return run.goodness(x, Goodness(groups, power, mean, positions)).contiguous()


def _goodness_fake(x, groups, power, mean, positions, impl):
    how = Goodness(groups, power, mean, positions)
    return x.new_empty((x.shape[0], how.count(x)), dtype=_dtype(x))


def _backward(d, x, groups, power, mean, positions, impl):
    if x.numel() == 0:
        return empty_like(x)
    run = choose("group_goodness", ROWS, impl, x).run
    return laid_as(x, run.goodness_backward(d, x, Goodness(groups, power, mean, positions)))


def _backward_fake(d, x, groups, power, mean, positions, impl):
    return empty_like(x)


def loss_of(x, groups, loss, theta, target, tau, margin, label_smoothing, reduction, grad_scale):
    """The Loss of a step on x, labels checked."""
    if target is not None:
        check_labels(target, groups)
    wanted = Loss(loss, theta, target, tau, margin, label_smoothing, 1.0, grad_scale)
    return wanted._replace(scale=1 / wanted.count(len(x)) if reduction == "mean" else 1.0)


@torch.no_grad()
def _step(
    x, groups, power, mean, positions, loss, theta, target, tau, margin, label_smoothing, reduction, grad_scale, normalize, eps, need_x, impl,
):  # fmt: skip
    how = Goodness(groups, power, mean, positions)
    wanted = loss_of(x, groups, loss, theta, target, tau, margin, label_smoothing, reduction, grad_scale)
    run = choose("group_goodness", ROWS, impl, x).run
    g, losses, grad_x, normalized = run.goodness_step(x, how, wanted, normalize, eps, need_x)
    none = x.new_empty(0)
    return (
        reference.reduced(losses, reduction),
        g.contiguous(),
        laid_as(x, grad_x) if need_x else none,
        none if normalize == "none" else laid_as(x, normalized),
    )


def _step_fake(
    x, groups, power, mean, positions, loss, theta, target, tau, margin, label_smoothing, reduction, grad_scale, normalize, eps, need_x, impl,
):  # fmt: skip
    g = _goodness_fake(x, groups, power, mean, positions, impl)
    count = Loss(loss, theta, target, tau, margin, label_smoothing, 1.0, grad_scale).count(len(x))
    losses = g.new_empty((count,) if reduction == "none" else ())
    none = x.new_empty(0)
    return losses, g, empty_like(x) if need_x else none, none if normalize == "none" else empty_like(x)


def _normalize(x, how, groups, eps, impl):
    if x.numel() == 0:
        return empty_like(x)
    return laid_as(x, choose("group_goodness", ROWS, impl, x).run.normalize(x, how, groups, eps))


def _normalize_fake(x, how, groups, eps, impl):
    return empty_like(x)


implement(_lib, "normalize", _normalize, _normalize_fake)
implement(_lib, "group_goodness", _goodness, _goodness_fake)
implement(_lib, "group_goodness_backward", _backward, _backward_fake)
implement(_lib, "group_goodness_step", _step, _step_fake)


def _save(ctx, inputs, output):
    x, *ctx.how = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx, d):
    (x,) = ctx.saved_tensors
    return torch.ops.fastff.group_goodness_backward(d, x, *ctx.how), *[None] * 5


def _save_normalize(ctx, inputs, output):
    x, *ctx.how = inputs
    ctx.save_for_backward(x)


def _differentiate_normalize(ctx, grad):
    (x,) = ctx.saved_tensors
    how, groups, eps, _ = ctx.how
    wide = torch.promote_types(x.dtype, torch.float32)
    _, pullback = torch.func.vjp(lambda x: reference.normalized(x.to(wide), how, groups, eps).to(x.dtype), x)
    return pullback(grad)[0], None, None, None, None


def _save_backward(ctx, inputs, output):
    d, x, *ctx.how = inputs
    ctx.save_for_backward(d, x)


def _differentiate_backward(ctx, grad):
    """The gradient is power * d * x^(power - 1) / n: linear in d, and in x for power 2."""
    d, x = ctx.saved_tensors
    *how, _ = ctx.how
    _, pullback = torch.func.vjp(lambda d, x: reference.group_goodness_gradient(d, x, *how), d, x)
    return *pullback(grad), *[None] * 5


torch.library.register_autograd("fastff::normalize", _differentiate_normalize, setup_context=_save_normalize, lib=_lib)
torch.library.register_autograd("fastff::group_goodness", _differentiate, setup_context=_save, lib=_lib)
torch.library.register_autograd(
    "fastff::group_goodness_backward", _differentiate_backward, setup_context=_save_backward, lib=_lib
)

# its results are gradients already: nothing of it is recorded for autograd
_lib.impl("group_goodness_step", torch.library.fallthrough_kernel, "Autograd")
