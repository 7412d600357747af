"""torch.ops.fastff.tail_step: batch norm, residual, activation and goodness_step at the end of a block, with all their gradients.

    y [B, C, H, W]  the last convolution's output; residual as y, or None
    h = batch_norm(y) + residual;  x = activation(h);  goodness_step on x;  dL/dh = dL/dx activation'(h);  dL/dy through batch norm

x itself is never returned, and where kernels fuse it never written. The batch's mean and biased variance are returned for the running
statistics. The head's arguments are those of goodness_step (fastff/ops/goodness.py). Formulas: fastff/reference.py.
"""

import torch

from fastff import reference
from fastff.kernels.composed import goodness as composed_goodness
from fastff.kernels.composed import tail as composed
from fastff.kernels.composed.tail import Gradients, Tail
from fastff.kernels.native import tail as native_tail
from fastff.ops import goodness as goodness_op
from fastff.ops.table import Implementation, Lazy, always, choose, implement


class Reference:
    """The definitions of fastff/reference.py, around the reference's goodness step."""

    @staticmethod
    def tail_step(y, tail, head, step):
        wide = torch.promote_types(y.dtype, torch.float32)
        weight, bias, residual = (None if t is None else t.to(wide) for t in (tail.weight, tail.bias, tail.residual))
        x, h, mean, var = reference.tail(y.to(wide), weight, bias, tail.eps, residual, tail.activation)
        results = step(composed_goodness.empty_like(y).copy_(x))
        grad_y, grad_h, *grads = reference.tail_gradients(
            results[2].to(wide), y.to(wide), h, mean, var, weight, tail.eps, tail.activation
        )
        grad_y, grad_h = (composed_goodness.empty_like(y).copy_(g) for g in (grad_y, grad_h))
        return results, Gradients(grad_y, grad_h if tail.need_residual else None, *grads, mean, var)


_native = goodness_op.ROWS[1]
ROWS = [
    Implementation("triton", goodness_op.ROWS[0].can_run, Lazy("fastff.kernels.triton.tail")),
    Implementation("native", _native.can_run, native_tail, "what goodness leaves to others", _native.passed_over),
    Implementation("composed", always, composed),
    Implementation("reference", always, Reference),
]

_lib = torch.library.Library("fastff", "FRAGMENT")
_lib.define(
    "tail_step(Tensor y, Tensor? bn_weight, Tensor? bn_bias, float bn_eps, Tensor? residual, bool need_residual, str activation, "
    "Tensor? weight, Tensor? bias, Tensor? grid_weight, Tensor target, float tau, Tensor? learned_tau, float margin, float label_smoothing, "
    "str reduction, Tensor? grad_scale, str normalize, float eps, SymInt[2] padding, str impl, str algorithm) "
    "-> (Tensor loss, Tensor goodness, Tensor grad_y, Tensor grad_weight, Tensor grad_bias, Tensor grad_grid_weight, Tensor grad_tau, "
    "Tensor normalized, Tensor grad_residual, Tensor grad_bn_weight, Tensor grad_bn_bias, Tensor mean, Tensor var)"
)


@torch.no_grad()
def _tail_step(
    y, bn_weight, bn_bias, bn_eps, residual, need_residual, activation, weight, bias, grid_weight, target, tau, learned_tau, margin,
    label_smoothing, reduction, grad_scale, normalize, eps, padding, impl, algorithm,
):  # fmt: skip
    run = choose("tail", ROWS, impl, y).run
    loss = goodness_op.loss_of(
        y, weight, grid_weight, target, tau, learned_tau, margin, label_smoothing, reduction, grad_scale
    )
    how = goodness_op.planned_row(y, weight, grid_weight, padding, impl, algorithm)
    head = (weight, bias, grid_weight, tuple(padding), how[1], how[2], loss, normalize, eps)

    def step(x):
        return goodness_op.row_step(x, weight, bias, grid_weight, padding, how, loss, True, normalize, eps, impl)

    tail = Tail(bn_weight, bn_bias, bn_eps, residual, need_residual and residual is not None, activation)
    results, grads = run.tail_step(y, tail, head, step)
    loss, g, _, *rest = goodness_op.results_of(results, y, weight, bias, grid_weight, reduction)
    return (
        loss,
        g,
        composed_goodness.laid_as(y, grads.y),
        *rest,
        *own_results(grads, y, bn_weight, bn_bias),
    )


def own_results(grads, y, bn_weight, bn_bias):
    """grad_residual, grad_bn_weight, grad_bn_bias, mean, var as the ops return them: empty where there is no such thing."""
    parameters = [
        y.new_empty(0) if parameter is None else grad.to(parameter.dtype)
        for grad, parameter in ((grads.weight, bn_weight), (grads.bias, bn_bias))
    ]
    grad_residual = y.new_empty(0) if grads.residual is None else composed_goodness.laid_as(y, grads.residual)
    return grad_residual, *parameters, grads.mean, grads.var


def own_fake(y, bn_weight, bn_bias, residual, need_residual):
    """Their shapes."""
    grad_residual = composed_goodness.empty_like(y) if need_residual and residual is not None else y.new_empty(0)
    parameters = [y.new_empty(0) if p is None else torch.empty_like(p) for p in (bn_weight, bn_bias)]
    wide = torch.promote_types(y.dtype, torch.float32)
    return grad_residual, *parameters, *(y.new_empty(y.shape[1], dtype=wide) for _ in range(2))


def _tail_step_fake(
    y, bn_weight, bn_bias, bn_eps, residual, need_residual, activation, weight, bias, grid_weight, target, tau, learned_tau, margin,
    label_smoothing, reduction, grad_scale, normalize, eps, padding, impl, algorithm,
):  # fmt: skip
    results = goodness_op._goodness_step_fake(
        y, weight, bias, grid_weight, target, tau, learned_tau, margin, label_smoothing, reduction, grad_scale, normalize, eps, True,
        padding, impl, algorithm,
    )  # fmt: skip
    return *results, *own_fake(y, bn_weight, bn_bias, residual, need_residual)


implement(_lib, "tail_step", _tail_step, _tail_step_fake)


# its results are gradients already: nothing of it is recorded for autograd, whatever its inputs require
_lib.impl("tail_step", torch.library.fallthrough_kernel, "Autograd")
