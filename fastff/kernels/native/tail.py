"""The tail of a block by the compiled library, float32 on the CPU (csrc/cpu/tail.cpp). Heads it has no kernel for (native/goodness.py) and the
next input normalised over channels go through PyTorch's own operators."""

import torch

from fastff.kernels.composed import tail as composed
from fastff.kernels.composed.goodness import dense, empty_like, is_rows
from fastff.kernels.native.goodness import Call, fits


def tail_step(y, tail, head, step):
    """(what goodness_step gives, Gradients)."""
    weight, bias, grid_weight, padding, plan, dtype, loss, normalize, eps = head
    if not fits(y, weight, padding, plan, dtype) or normalize == "layer_norm_channels":
        return composed.tail_step(y, tail, head, step)
    call = Call(y, weight, bias, grid_weight, loss)
    out = call.outputs(losses=True, grad_x=True, gradients=True, normalized=normalize == "layer_norm")
    y, none, C = call.x, call.none, y.shape[1]
    residual = none if tail.residual is None else dense(tail.residual)
    if tail.residual is not None and is_rows(residual) != is_rows(y):
        residual = empty_like(y).copy_(residual)
    grad_residual = empty_like(y) if tail.need_residual else none
    sums, mean, var = y.new_empty((2, C)), y.new_empty(C), y.new_empty(C)
    own = (none if t is None else t.float().contiguous() for t in (tail.weight, tail.bias))
    torch.ops.fastff.tail_native(
        *call.tensors, residual, *own, tail.eps, composed.ACTIVATIONS.index(tail.activation), *call.sizes(plan, eps), *out, grad_residual,
        sums, mean, var,
    )  # fmt: skip
    gradients = composed.Gradients(out[3], grad_residual if tail.need_residual else None, sums[1], sums[0], mean, var)
    return call.step(loss, normalize), gradients
