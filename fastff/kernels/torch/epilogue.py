"""The epilogue of a block on PyTorch's operators, forward and backward, alone or around any step on its output.

Formulas: reference.epilogue and reference.epilogue_gradients. The arithmetic is in float32 (float64 for float64)."""

import torch

from fastff import reference
from fastff.kernels.layout import as_result_of, empty_like, widened
from fastff.kernels.torch.normalization import normalize as normalize_by_torch
from fastff.reference import channels
from fastff.spec import EpilogueGradients, Normalization


def forward(y, epilogue, normalization=None, need_x=True, statistics=None):
    """Return x or None, the normalized x or None, mean, var; `statistics` (mean, var) where they are known already."""
    h, mean, var = _before_activation(y, epilogue, statistics)
    x = empty_like(y).copy_(reference.ACTIVATIONS[epilogue.activation][0](h))
    normalized = None if normalization is None else normalize_by_torch(x, normalization)
    return x if need_x else None, normalized, mean, var


def backward(
    y, epilogue, mean, var, grad_x=None, grad_normalized=None, normalization=None, added=None, overwrite=False, h=None
):
    """Return the EpilogueGradients from those of x and of the normalized x; `added` are those of another loss at the same place."""
    if h is None:
        h, *_ = _before_activation(y, epilogue, (mean, var))
    activation, derivative = reference.ACTIVATIONS[epilogue.activation]
    total = 0 if grad_x is None else widened(grad_x)
    if grad_normalized is not None:
        with torch.enable_grad():
            x = activation(h).detach().requires_grad_()
            normalized = reference.normalized(x, *normalization)
        total = total + torch.autograd.grad(normalized, x, widened(grad_normalized))[0]
    grad_h = total * derivative(h)
    del h, total
    normal = (widened(y) - channels(mean)).mul_(channels((var + epilogue.eps).rsqrt()))
    grad_bias, grad_weight = grad_h.sum((0, 2, 3)), (grad_h * normal).sum((0, 2, 3))
    if added is not None:
        grad_h, grad_weight, grad_bias = grad_h + added.residual, grad_weight + added.weight, grad_bias + added.bias
    n = y.numel() / y.shape[1]
    grad_y = normal.mul_(channels(grad_weight / -n)).add_(grad_h).sub_(channels(grad_bias / n))
    grad_y = as_result_of(y, grad_y.mul_(channels(_scale(epilogue, var))))
    return EpilogueGradients(
        grad_y, as_result_of(y, grad_h) if epilogue.wants_residual else None, grad_weight, grad_bias
    )


@torch.no_grad()
def update_running_statistics(running_mean, running_var, tracked, mean, var, momentum, count):
    """Move running statistics [C] by `momentum` towards mean and var, the biased variance of `count` values; count the batch."""
    if tracked is not None:
        tracked.add_(1)
    running_mean.data.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.data.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)


def _before_activation(y, epilogue, statistics=None):
    """Return h = batch_norm(y) + residual, and the mean and the biased variance [C] of the batch."""
    wide = widened(y)
    mean, var = statistics or torch.var_mean(wide, (0, 2, 3), correction=0)[::-1]
    h = (wide - channels(mean)).mul_(channels(_scale(epilogue, var)))
    if epilogue.bias is not None:
        h += channels(widened(epilogue.bias))
    if epilogue.residual is not None:
        h += epilogue.residual
    return h, mean, var


def _scale(epilogue, var):
    scale = (var + epilogue.eps).rsqrt()
    return scale if epilogue.weight is None else scale * epilogue.weight.to(scale.dtype)


def completed(local, run, normalize):
    """Return the StepResult of any Step, where run(step) computes its goodness, loss and gradients alone.

    The epilogue is on PyTorch's operators; normalize(x, normalization) makes the next block's input."""
    y, epilogue = local.x, local.epilogue
    if epilogue is None:
        result = run(local._replace(normalization=Normalization()))
        return result._replace(normalized=normalize(local.x, local.normalization))
    h, mean, var = _before_activation(y, epilogue)
    x = empty_like(y).copy_(reference.ACTIVATIONS[epilogue.activation][0](h))
    result = completed(local._replace(x=x, epilogue=None, need_grad_x=True), run, normalize)
    del x
    return result.before_epilogue(backward(y, epilogue, mean, var, result.grad_x, h=h), mean, var)
