"""The epilogue of a block by the compiled library, float32 on the CPU (csrc/cpu/epilogue_ops.cpp).

Normalizations other than layer norm over a sample go through fastff/kernels/torch/epilogue.py."""

import torch

from fastff import spec
from fastff.kernels.torch import epilogue as fallback
from fastff.spec import EpilogueGradients

ACTIVATIONS = {name: number for number, name in enumerate(spec.ACTIVATIONS)}


def forward(y, epilogue, normalization=None, need_x=True, statistics=None):
    """Return x or None, the normalized x or None, mean, var; `statistics` (mean, var) where they are known already."""
    if normalization is not None and normalization.name != "layer_norm":
        return fallback.forward(y, epilogue, normalization, need_x, statistics)
    normalize, eps = normalization is not None, 0.0 if normalization is None else normalization.eps
    x, normalized, *found = torch.ops.fastff.epilogue_forward_native(
        y, *_fields(epilogue), *(statistics or (None, None)), need_x, normalize, eps
    )
    return x if need_x else None, normalized if normalize else None, *(statistics or found)


def backward(
    y, epilogue, mean, var, grad_x=None, grad_normalized=None, normalization=None, added=None, overwrite=False
):
    """Return the EpilogueGradients from those of x and of the normalized x; `added` are those of another loss at the same place.

    overwrite: whether the results may take the memory of grad_x and of `added`."""
    if grad_normalized is not None and normalization.name != "layer_norm":
        return fallback.backward(y, epilogue, mean, var, grad_x, grad_normalized, normalization, added)
    eps = 0.0 if normalization is None else normalization.eps
    others = (None, None, None) if added is None else added[1:]
    grad_y, grad_residual, grad_weight, grad_bias = torch.ops.fastff.epilogue_backward_native(
        y, *_fields(epilogue), mean, var, grad_x, grad_normalized, eps, *others, overwrite
    )
    return EpilogueGradients(grad_y, grad_residual if epilogue.wants_residual else None, grad_weight, grad_bias)


def update_running_statistics(running_mean, running_var, tracked, mean, var, momentum, count):
    """Move running statistics [C], contiguous float32, by `momentum` towards mean and var, the biased variance of `count` values; count the batch."""
    torch.ops.fastff.update_running_statistics_native(running_mean, running_var, tracked, mean, var, momentum, count)


def _fields(e):
    return _float(e.weight), _float(e.bias), e.eps, _float(e.residual), e.need_grad_residual, ACTIVATIONS[e.activation]


def _float(t):
    return t if t is None or t.dtype is torch.float32 else t.float()
