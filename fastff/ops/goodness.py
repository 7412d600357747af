"""torch.ops.fastff.goodness, .goodness_backward and .goodness_step: the goodness of a block's output, its loss and local gradient.

Canonical arguments (fastff/functional.py makes and checks them): x [B, C, H, W], weight [K, C, k, k] or None (no squares), bias [K] or
None, grid_weight [K, C, G, G] or None, target [B] int64. Absent results are empty tensors. Formulas: fastff/reference.py.
"""

import math

import torch

from fastff import reference
from fastff.kernels import native, triton
from fastff.kernels.composed import goodness as composed
from fastff.kernels.native import goodness as native_goodness
from fastff.ops import layer_norm as layer_norm_op
from fastff.ops.plan import plan
from fastff.ops.table import Implementation, Lazy, always, choose, implement

NORMALIZATIONS = ("layer_norm", "layer_norm_channels", "none")


class Composed:
    """Batched matrix products, by the planned algorithm (fastff/kernels/composed/goodness.py)."""

    goodness = staticmethod(composed.goodness)
    goodness_backward = staticmethod(composed.goodness_backward)
    goodness_step = staticmethod(composed.goodness_step)


class Reference:
    """The definitions of fastff/reference.py, whole tensors at a time."""

    @staticmethod
    def goodness(x, weight, bias, grid_weight, padding, how, dtype):
        wide = [None if t is None else t.to(dtype) for t in (x, weight, bias, grid_weight)]
        if how.algorithm != "second_moment" or weight is None:
            return reference.goodness(*wide, padding)
        g = reference.goodness_second_moment(*wide[:3], padding)
        return g if grid_weight is None else g + reference.goodness(wide[0], grid_weight=wide[3])

    @staticmethod
    def goodness_backward(d, x, weight, bias, grid_weight, padding, how, dtype, need_x):
        d = d.to(dtype)
        wide = [None if t is None else t.to(dtype) for t in (x, weight, bias, grid_weight)]
        grad_x, grad_weight, grad_bias, grad_grid = torch.zeros_like(wide[0]), None, None, None
        if weight is not None:
            second = how.algorithm == "second_moment"
            gradients = reference.gradients_second_moment if second else reference.gradients_direct
            grad_x, grad_weight, grad_bias = gradients(d, *wide[:3], padding)
        if grid_weight is not None:
            spread, grad_grid = reference.gradients_grid(d, wide[0], wide[3])
            grad_x = grad_x + spread
        grad_x = composed.empty_like(x).copy_(grad_x) if need_x else None
        return grad_x, grad_weight, grad_bias if bias is not None else None, grad_grid

    @classmethod
    def goodness_step(cls, x, weight, bias, grid_weight, padding, how, dtype, loss, need_x, normalize, eps):
        g = cls.goodness(x, weight, bias, grid_weight, padding, how, dtype)
        losses, d, dtau = composed.loss_gradient(g, slice(None), loss)
        return (
            losses,
            g,
            *cls.goodness_backward(d, x, weight, bias, grid_weight, padding, how, dtype, need_x),
            dtau,
            None,
        )


def _triton_can_run(x):
    channels, most = x.shape[1], 256 if x.dtype == torch.float32 else 1024
    if channels > most:
        return f"a Triton program holds all channels of a position, at most {most} of {x.dtype}, x has {channels}"
    return triton.reason(x)


def _native_can_run(x):
    if x.device.type != "cpu":
        return f"the compiled kernel runs on the CPU, x is on {x.device.type}"
    if x.dtype == torch.float64:
        return "the compiled kernel's arithmetic is float32, x is torch.float64"
    return native.reason() or None


ROWS = [
    Implementation("triton", _triton_can_run, Lazy("fastff.kernels.triton.goodness"), "3 x 3 and 5 x 5 heads by cuDNN"),
    Implementation(
        "native",
        _native_can_run,
        native_goodness,
        "3 x 3 and 5 x 5 heads by oneDNN, large direct products by BLAS",
        native.slow,
    ),
    Implementation("composed", always, Composed),
    Implementation("reference", always, Reference),
]

_lib = torch.library.Library("fastff", "FRAGMENT")
_HEAD = "Tensor x, Tensor? weight, Tensor? bias, Tensor? grid_weight"
_HOW = "SymInt[2] padding, str impl, str algorithm"
_lib.define(f"goodness({_HEAD}, {_HOW}) -> Tensor")
_lib.define(f"goodness_backward(Tensor d, {_HEAD}, {_HOW}, bool need_x) -> (Tensor, Tensor, Tensor, Tensor)")
_lib.define(
    f"goodness_step({_HEAD}, Tensor target, float tau, Tensor? learned_tau, float margin, float label_smoothing, str reduction, "
    f"Tensor? grad_scale, str normalize, float eps, bool need_x, {_HOW}) "
    "-> (Tensor loss, Tensor goodness, Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_grid_weight, Tensor grad_tau, "
    "Tensor normalized)"
)


def compute_dtype(x, weight, grid_weight):
    """float64 where an argument is, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in (x, weight, grid_weight))
    return torch.float64 if wide else torch.float32


def _classes(weight, grid_weight):
    return len(weight if weight is not None else grid_weight)


def plan_for(x, weight, grid_weight, padding, algorithm="auto", impl="auto"):
    """The Plan for these arguments."""
    return _planned(choose("goodness", ROWS, impl, x).run, x, weight, padding, algorithm)


def _planned(run, x, weight, padding, algorithm):
    B, C, H, W = x.shape
    if weight is None:
        return plan(B, C, H * W, 0, algorithm="direct", device_type=x.device.type)
    kernel = tuple(weight.shape[2:])
    P = (H + 2 * padding[0] - kernel[0] + 1) * (W + 2 * padding[1] - kernel[1] + 1)
    most, cost = getattr(run, "SECOND_MOMENT_CHANNELS", math.inf), getattr(run, "SECOND_MOMENT_COST", 1.0)
    return plan(B, C, P, len(weight), kernel, algorithm, x.device.type, most, cost)


def check_labels(target, num_classes):
    """Labels out of range raise where looking is free; on a GPU they make the loss NaN (loss_gradient)."""
    if target.device.type == "cpu" and len(target):
        low, high = (int(v) for v in target.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"target: expected labels in 0..{num_classes - 1}, got {low if low < 0 else high}")


def _gradients(grads, x, *parameters):
    """Of x and the parameters in their dtypes, laid out as _empty_head says; empty tensors for absent ones."""
    grad_x, *grads = grads
    return (
        x.new_empty(0) if grad_x is None else composed.laid_as(x, grad_x.to(x.dtype)),
        *(
            x.new_empty(0) if grad is None else grad.to(parameter.dtype).contiguous()
            for grad, parameter in zip(grads, parameters, strict=True)
        ),
    )


def _goodness(x, weight, bias, grid_weight, padding, impl, algorithm):
    run = choose("goodness", ROWS, impl, x).run
    how = _planned(run, x, weight, padding, algorithm)
    g = run.goodness(x, weight, bias, grid_weight, tuple(padding), how, compute_dtype(x, weight, grid_weight))
    return g.to(_result_dtype(x, weight, grid_weight)).contiguous()


def _result_dtype(x, weight, grid_weight):
    """float32 for 16-bit inputs: goodness goes into a softmax, and its squares overflow float16."""
    return compute_dtype(x, weight, grid_weight)


def _goodness_fake(x, weight, bias, grid_weight, padding, impl, algorithm):
    return x.new_empty((x.shape[0], _classes(weight, grid_weight)), dtype=_result_dtype(x, weight, grid_weight))


def _goodness_backward(d, x, weight, bias, grid_weight, padding, impl, algorithm, need_x):
    run = choose("goodness", ROWS, impl, x).run
    how = _planned(run, x, weight, padding, algorithm)
    dtype = compute_dtype(x, weight, grid_weight)
    grads = run.goodness_backward(d, x, weight, bias, grid_weight, tuple(padding), how, dtype, need_x)
    return _gradients(grads, x, weight, bias, grid_weight)


def _empty_head(x, weight, bias, grid_weight, need_x):
    head = [
        x.new_empty(0) if t is None else torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (weight, bias, grid_weight)
    ]
    return composed.empty_like(x) if need_x else x.new_empty(0), *head


def _goodness_backward_fake(d, x, weight, bias, grid_weight, padding, impl, algorithm, need_x):
    return _empty_head(x, weight, bias, grid_weight, need_x)


@torch.no_grad()
def _goodness_step(
    x, weight, bias, grid_weight, target, tau, learned_tau, margin, label_smoothing, reduction, grad_scale, normalize, eps, need_x,
    padding, impl, algorithm,
):  # fmt: skip
    loss = loss_of(x, weight, grid_weight, target, tau, learned_tau, margin, label_smoothing, reduction, grad_scale)
    how = planned_row(x, weight, grid_weight, padding, impl, algorithm)
    step = row_step(x, weight, bias, grid_weight, padding, how, loss, need_x, normalize, eps, impl)
    return results_of(step, x, weight, bias, grid_weight, reduction)


def loss_of(x, weight, grid_weight, target, tau, learned_tau, margin, label_smoothing, reduction, grad_scale):
    """The Loss that rows are handed; labels are checked."""
    check_labels(target, _classes(weight, grid_weight))
    scale = 1 / len(x) if reduction == "mean" else 1.0
    return composed.Loss(target, tau, learned_tau, margin, label_smoothing, scale, grad_scale)


def planned_row(x, weight, grid_weight, padding, impl, algorithm):
    """(what runs, its Plan, the dtype of its arithmetic)."""
    run = choose("goodness", ROWS, impl, x).run
    return run, _planned(run, x, weight, padding, algorithm), compute_dtype(x, weight, grid_weight)


def row_step(x, weight, bias, grid_weight, padding, how, loss, need_x, normalize, eps, impl):
    """goodness_step as rows return it, with x normalised whether the row does that or not."""
    run, plan, dtype = how
    *step, normalized = run.goodness_step(
        x, weight, bias, grid_weight, tuple(padding), plan, dtype, loss, need_x, normalize, eps
    )
    return *step, _normalized(x, normalize, eps, impl) if normalized is None else normalized


def results_of(step, x, weight, bias, grid_weight, reduction):
    """What the op returns from what a row does: the loss reduced, gradients in their parameters' dtypes, empty tensors for absent ones."""
    losses, g, *grads, grad_tau, normalized = step
    loss = reference.reduced(losses, reduction)
    grads = _gradients(grads, x, weight, bias, grid_weight)
    normalized = x.new_empty(0) if normalized is None or not normalized.numel() else composed.laid_as(x, normalized)
    return loss, g.contiguous(), *grads, g.new_zeros(()) if grad_tau is None else grad_tau, normalized


def _normalized(x, normalize, eps, impl):
    if normalize == "none":
        return x.new_empty(0)
    if normalize == "layer_norm_channels":
        return composed.empty_like(x).copy_(layer_norm_op.over_channels(x, eps))
    # an implementation of goodness_step need not exist for layer_norm too: then its own order decides
    rows = layer_norm_op.ROWS
    return layer_norm_op.run(x, eps, impl if impl in [row.name for row in rows] else "auto")


def _goodness_step_fake(
    x, weight, bias, grid_weight, target, tau, learned_tau, margin, label_smoothing, reduction, grad_scale, normalize, eps, need_x,
    padding, impl, algorithm,
):  # fmt: skip
    g = _goodness_fake(x, weight, bias, grid_weight, padding, impl, algorithm)
    loss = g.new_empty((x.shape[0],) if reduction == "none" else ())
    normalized = x.new_empty(0) if normalize == "none" else composed.empty_like(x)
    return loss, g, *_empty_head(x, weight, bias, grid_weight, need_x), g.new_empty(()), normalized


implement(_lib, "goodness", _goodness, _goodness_fake)
implement(_lib, "goodness_backward", _goodness_backward, _goodness_backward_fake)
implement(_lib, "goodness_step", _goodness_step, _goodness_step_fake)


def _save(ctx, inputs, output):
    *tensors, ctx.padding, ctx.impl, ctx.algorithm = inputs[:7]
    ctx.save_for_backward(*tensors)


def _backward(ctx, d):
    x, weight, bias, grid_weight = ctx.saved_tensors
    grads = torch.ops.fastff.goodness_backward(
        d, x, weight, bias, grid_weight, ctx.padding, ctx.impl, ctx.algorithm, ctx.needs_input_grad[0]
    )
    needed = zip(grads, ctx.needs_input_grad, strict=False)
    return *(grad if need else None for grad, need in needed), None, None, None


torch.library.register_autograd("fastff::goodness", _backward, setup_context=_save, lib=_lib)


def _save_backward(ctx, inputs, output):
    d, x, weight, bias, grid_weight, padding, _impl, _algorithm, need_x = inputs
    ctx.padding, ctx.need_x = tuple(padding), need_x
    ctx.save_for_backward(d, x, weight, bias, grid_weight)


def _double_backward(ctx, *cotangents):
    """The gradients are polynomials of the inputs: differentiate their definition (reference.py)."""
    given = ctx.saved_tensors
    present = [t is not None for t in given]

    def gradients(*tensors):
        tensors = iter(tensors)
        d, x, weight, bias, grid_weight = (next(tensors) if here else None for here in present)
        out = (
            list(reference.gradients_direct(d, x, weight, bias, ctx.padding)) if weight is not None else [0, None, None]
        )
        grad_grid = None
        if grid_weight is not None:
            spread, grad_grid = reference.gradients_grid(d, x, grid_weight)
            out[0] = out[0] + spread
        out = [out[0] if ctx.need_x else None, out[1], out[2] if bias is not None else None, grad_grid]
        return tuple(t for t in out if t is not None)

    kept = [ctx.need_x, *present[2:]]
    primals = [t for t in given if t is not None]
    out, pullback = torch.func.vjp(gradients, *primals)
    seeds = [c for c, keep in zip(cotangents, kept, strict=True) if keep]
    seeds = tuple(torch.zeros_like(o) if c is None else c for o, c in zip(out, seeds, strict=True))
    grads = iter(pullback(seeds))
    return *(next(grads) if here else None for here in present), None, None, None, None


torch.library.register_autograd("fastff::goodness_backward", _double_backward, setup_context=_save_backward, lib=_lib)


# its results are gradients already: nothing of it is recorded for autograd, whatever its inputs require
_lib.impl("goodness_step", torch.library.fallthrough_kernel, "Autograd")
