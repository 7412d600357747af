"""The tail of a block on PyTorch's own operators, around whichever goodness step: batch norm, residual, activation, and their gradients.

Formulas: fastff/reference.py. Arithmetic is in float32 (float64 for float64).
"""

from typing import NamedTuple

import torch

from fastff import reference
from fastff.kernels.composed.goodness import empty_like
from fastff.reference import channels

ACTIVATIONS = tuple(reference.ACTIVATIONS)


class Tail(NamedTuple):
    """What stands between the last convolution's output and the head: batch norm's weight [C] and bias [C] (or None), what it adds to the
    variance, the residual (as y, or None) and whether its gradient is wanted, the activation's name."""

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    eps: float
    residual: torch.Tensor | None
    need_residual: bool
    activation: str


class Gradients(NamedTuple):
    """dL/dy, dL/dresidual or None, batch norm's dL/dweight and dL/dbias [C] (wanted or not), the batch's mean and biased variance [C]."""

    y: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor


def tail_step(y, tail, head, step):
    """(what step gives, Gradients). `step(x)` is the goodness step on x; `head` is for implementations that fuse it."""
    wide = torch.promote_types(y.dtype, torch.float32)
    var, mean = torch.var_mean(y.to(wide), (0, 2, 3), correction=0)
    scale = (var + tail.eps).rsqrt()
    if tail.weight is not None:
        scale = scale * tail.weight.to(wide)
    h = (y.to(wide) - channels(mean)).mul_(channels(scale))
    if tail.bias is not None:
        h += channels(tail.bias.to(wide))
    if tail.residual is not None:
        h += tail.residual
    activation, derivative = reference.ACTIVATIONS[tail.activation]
    x = empty_like(y).copy_(activation(h))
    results = step(x)
    grad_h = results[2] * derivative(h)
    del h, x
    normal = (y.to(wide) - channels(mean)).mul_(channels((var + tail.eps).rsqrt()))
    grad_bias, grad_weight = grad_h.sum((0, 2, 3)), (grad_h * normal).sum((0, 2, 3))
    n = y.numel() / y.shape[1]
    normal.mul_(channels(grad_weight / -n)).add_(grad_h).sub_(channels(grad_bias / n)).mul_(channels(scale))
    grad_residual = empty_like(y).copy_(grad_h) if tail.need_residual else None
    return results, Gradients(empty_like(y).copy_(normal), grad_residual, grad_weight, grad_bias, mean, var)
