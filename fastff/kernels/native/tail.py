"""The tail of a block by the compiled library, float32 on the CPU (csrc/cpu/tail.cpp). Heads it has no kernel for (native/goodness.py) and the
next input normalised over channels go through PyTorch's own operators."""

import torch

from fastff.kernels.composed import tail as composed
from fastff.kernels.native.goodness import fits, head_of, step_of


def tail_step(y, tail, head, step):
    """(what goodness_step gives, Gradients)."""
    weight, bias, grid_weight, padding, plan, dtype, loss, normalize, eps = head
    if not fits(y, weight, padding, plan, dtype) or normalize == "layer_norm_channels":
        return composed.tail_step(y, tail, head, step)
    tensors, numbers = head_of(y, weight, bias, grid_weight, loss)
    own = (None if t is None else t.float() for t in (tail.weight, tail.bias))
    residual = None if tail.residual is None else tail.residual.float()
    *out, grad_residual, grad_weight, grad_bias, mean, var = torch.ops.fastff.tail_native(
        y.float(), *tensors, residual, *own, tail.eps, composed.ACTIVATIONS.index(tail.activation), plan.algorithm == "second_moment",
        *numbers, eps, tail.need_residual, normalize == "layer_norm",
    )  # fmt: skip
    grad_residual = grad_residual.to(y.dtype) if tail.need_residual else None
    gradients = composed.Gradients(out[3].to(y.dtype), grad_residual, grad_weight, grad_bias, mean, var)
    return step_of(out, y.dtype, weight, bias, grid_weight, loss, normalize), gradients
