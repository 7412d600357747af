"""Depthwise convolution by PyTorch's grouped convolution."""

import torch
import torch.nn.functional as F

from fastff.kernels.layout import is_channels_last


def forward(x, weight, stride, padding):
    return F.conv2d(x, weight, stride=stride, padding=padding, groups=len(weight))


def backward(grad, x, weight, stride, padding, need_grad_x):
    if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16):  # as in convolution.py
        found = backward(grad.float(), x.float(), weight.float(), stride, padding, need_grad_x)
        return tuple(t if t is None else t.to(x.dtype) for t in found)
    pairs = [stride] * 2, [padding] * 2, [1, 1]
    wanted = [need_grad_x, True, False]
    dx, dw, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *pairs, False, [0, 0], len(weight), wanted)
    return dx, dw


def out_shape(x, weight, stride, padding):
    """Return the shape of y."""
    return [*x.shape[:2], *((n + 2 * padding - weight.shape[2]) // stride + 1 for n in x.shape[2:])]


def out_like(x, weight, stride, padding):
    """Return uninitialised memory for y: dense, channels_last where x is."""
    rows, columns = out_shape(x, weight, stride, padding)[2:]
    if is_channels_last(x):
        return x.new_empty((x.shape[0], rows, columns, x.shape[1])).permute(0, 3, 1, 2)
    return x.new_empty((*x.shape[:2], rows, columns))
