"""The tail of a block whose goodness has no weights by the compiled library, float32 on the CPU (csrc/cpu/group_goodness.cpp)."""

import torch

from fastff.kernels.composed import tail as composed
from fastff.kernels.composed.tail import ACTIVATIONS, Gradients
from fastff.reference import LOSSES, NORMALIZATIONS


def tail_step(y, tail, head, step):
    """((losses, g, None, the normalised x or None), Gradients)."""
    if y.dtype == torch.float64:
        return composed.tail_step(y, tail, head, step)
    how, loss, normalize, eps = head
    weight, bias, residual, scale = (
        None if t is None else t.float() for t in (tail.weight, tail.bias, tail.residual, loss.grad_scale)
    )
    g, losses, grad_y, normalized, grad_residual, *own = torch.ops.fastff.group_tail_native(
        y.float(), residual, weight, bias, tail.eps, ACTIVATIONS.index(tail.activation), tail.need_residual, loss.target, scale, *how,
        LOSSES.index(loss.name), loss.theta, loss.tau, loss.margin, loss.label_smoothing, loss.scale, NORMALIZATIONS.index(normalize), eps,
    )  # fmt: skip
    grad_residual = grad_residual.to(y.dtype) if tail.need_residual else None
    normalized = None if normalize == "none" else normalized.to(y.dtype)
    return (losses, g, None, normalized), Gradients(grad_y.to(y.dtype), grad_residual, *own)
