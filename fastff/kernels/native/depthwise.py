"""Depthwise convolution by the compiled library, float32 on the CPU (csrc/cpu/depthwise.cpp), for 3 x 3 and 5 x 5 filters; others by PyTorch."""

import torch

from fastff.kernels.composed import depthwise as composed

SIZES = (3, 5)


def forward(x, weight, stride, padding, sums=True):
    """(y, sums [2, C] or None)."""
    if weight.shape[2] not in SIZES or x.numel() == 0:
        return composed.forward(x, weight, stride, padding, sums)
    y, found = torch.ops.fastff.depthwise_native(x, weight, stride, padding, sums)
    return y, found if sums else None


def backward(grad, x, weight, stride, padding, need_x):
    """(dL/dx or None, dL/dweight)."""
    if weight.shape[2] not in SIZES or x.numel() == 0:
        return composed.backward(grad, x, weight, stride, padding, need_x)
    dx, dw = torch.ops.fastff.depthwise_backward_native(grad, x, weight, stride, padding, need_x)
    return (dx if need_x else None), dw
