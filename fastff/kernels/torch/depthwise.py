"""Depthwise convolution by PyTorch's grouped convolution. The sums for batch norm take two more passes."""

import torch
import torch.nn.functional as F

from fastff.kernels.layout import is_channels_last, widened


def forward(x, weight, stride, padding, sums=True):
    """Return y and sums [2, C] of y and y^2, or None instead of them."""
    y = F.conv2d(x, weight, stride=stride, padding=padding, groups=len(weight))
    return y, sums_of(y) if sums else None


def backward(grad, x, weight, stride, padding, need_grad_x):
    """Return dL/dx, or None unless it is needed, and dL/dweight."""
    pairs = [stride] * 2, [padding] * 2, [1, 1]
    wanted = [need_grad_x, True, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *pairs, False, [0, 0], len(weight), wanted)
    return dx, dw


def sums_of(y):
    """Return the sums [2, C] of y and y^2 over everything but the channels."""
    wide = widened(y)
    return torch.stack([wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))])


def out_shape(x, weight, stride, padding):
    """Return the shape of y."""
    return [*x.shape[:2], *((n + 2 * padding - weight.shape[2]) // stride + 1 for n in x.shape[2:])]


def out_like(x, weight, stride, padding):
    """Return uninitialised memory for y: dense, channels_last where x is."""
    rows, columns = out_shape(x, weight, stride, padding)[2:]
    if is_channels_last(x):
        return x.new_empty((x.shape[0], rows, columns, x.shape[1])).permute(0, 3, 1, 2)
    return x.new_empty((*x.shape[:2], rows, columns))
