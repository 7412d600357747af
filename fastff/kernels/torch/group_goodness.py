"""Goodness of groups of channels on PyTorch's operators: the definitions of fastff/reference.py, with 16-bit tensors in float32."""

from fastff import reference
from fastff.kernels.layout import as_result_of, widened
from fastff.kernels.torch import normalization as of_any_dtype
from fastff.kernels.torch.epilogue import completed
from fastff.spec import StepResult


def goodness(x, groups):
    return reference.group_goodness(widened(x), *groups)


def goodness_backward(d, x, groups):
    return as_result_of(x, reference.group_goodness_gradient(d, widened(x), *groups))


def normalize(x, normalization):
    y = of_any_dtype.normalize(widened(x), normalization)
    return y if y is None else as_result_of(x, y)


def step(local):
    return completed(local, _step, normalize)


def _step(local):
    g = goodness(local.x, local.goodness)
    losses, (d, _) = reference.losses(g, local.loss), reference.loss_gradient(g, local.loss, local.loss.scale(len(g)))
    return StepResult(losses, g, goodness_backward(d, local.x, local.goodness) if local.need_grad_x else None)
