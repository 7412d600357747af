"""The epilogue of a block on PyTorch's operators, forward and backward, around any step on its output.

Formulas: reference.epilogue and reference.epilogue_gradients. The arithmetic is in float32 (float64 for float64)."""

import torch

from fastff import reference
from fastff.kernels.layout import as_result_of, empty_like, widened
from fastff.reference import channels
from fastff.spec import Normalization


def before_activation(y, epilogue):
    """Return h = batch_norm(y) + residual, and the mean and the biased variance [C] of the batch."""
    wide = widened(y)
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    h = (wide - channels(mean)).mul_(channels(_scale(epilogue, var)))
    if epilogue.bias is not None:
        h += channels(widened(epilogue.bias))
    if epilogue.residual is not None:
        h += epilogue.residual
    return h, mean, var


def batch_norm_gradients(grad_h, y, epilogue, mean, var):
    """Return the gradients of y, weight and bias from dL/dh, which is also that of the residual."""
    normal = (widened(y) - channels(mean)).mul_(channels((var + epilogue.eps).rsqrt()))
    grad_bias, grad_weight = grad_h.sum((0, 2, 3)), (grad_h * normal).sum((0, 2, 3))
    n = y.numel() / y.shape[1]
    normal.mul_(channels(grad_weight / -n)).add_(grad_h).sub_(channels(grad_bias / n))
    return as_result_of(y, normal.mul_(channels(_scale(epilogue, var)))), grad_weight, grad_bias


def _scale(epilogue, var):
    scale = (var + epilogue.eps).rsqrt()
    return scale if epilogue.weight is None else scale * epilogue.weight.to(scale.dtype)


def completed(local, run, normalize):
    """Return the StepResult of any Step, where run(step) computes its goodness, loss and gradients alone.

    The epilogue is on PyTorch's operators; normalize(x, normalization) makes the next block's input."""
    if local.epilogue is not None:
        return _behind_epilogue(local, run, normalize)
    result = run(local._replace(normalization=Normalization()))
    return result._replace(normalized=normalize(local.x, local.normalization))


def _behind_epilogue(local, run, normalize):
    y, epilogue = local.x, local.epilogue
    h, mean, var = before_activation(y, epilogue)
    activation, derivative = reference.ACTIVATIONS[epilogue.activation]
    x = empty_like(y).copy_(activation(h))
    result = completed(local._replace(x=x, epilogue=None, need_grad_x=True), run, normalize)
    grad_h = result.grad_x * derivative(h)
    del h, x
    grad_y, grad_weight, grad_bias = batch_norm_gradients(grad_h, y, epilogue, mean, var)
    return result._replace(
        grad_x=grad_y, grad_residual=grad_h, grad_bn_weight=grad_weight, grad_bn_bias=grad_bias, mean=mean, var=var
    )
