"""Memory layouts of tensors [B, C, H, W]. A result is dense: channels_last where its input is, contiguous otherwise."""

import torch

from fastff.kernels import native


def is_channels_last(x):
    """Return whether x [B, C, H, W] lies in memory as dense [B, H, W, C]."""
    return x.permute(0, 2, 3, 1).is_contiguous()


def laid(x, channels_last):
    """Return x [B, C, H, W] itself if it is in channels_last, or contiguous, as asked for, else a copy that is. Without a gradient."""
    wanted = torch.channels_last if channels_last else torch.contiguous_format
    if x.is_contiguous(memory_format=wanted):
        return x
    dense = x.is_contiguous() if channels_last else is_channels_last(x)
    if dense and x.dtype == torch.float32 and x.is_cpu and x.numel() and not native.reason():
        return torch.ops.fastff.layout_native(x.detach(), channels_last)
    return x.contiguous(memory_format=wanted)


def result_strides(x):
    """Return the strides of a result of x's shape."""
    _, c, h, w = x.shape
    c, h, w = c or 1, h or 1, w or 1
    return (h * w * c, 1, w * c, c) if is_channels_last(x) else (c * h * w, h * w, w, 1)


def empty_like(x, dtype=None):
    """Return uninitialised memory for a result of x's shape."""
    return x.new_empty_strided(x.shape, result_strides(x), dtype=dtype or x.dtype)


def as_result_of(x, y):
    """Return y in the dtype and with the strides of a result of x's shape, copied only if it must."""
    strides = result_strides(x)
    if y.dtype == x.dtype and y.stride() == strides:
        return y
    if y.dtype != x.dtype or not (is_channels_last(y) if is_channels_last(x) else y.is_contiguous()):
        return empty_like(x).copy_(y)
    return y.as_strided(y.shape, strides)  # they differ in dimensions of one element alone


def dense(x):
    """Return x itself if it is dense in either layout, else a contiguous copy."""
    return x if is_channels_last(x) else x.contiguous()


def matrices(x):
    """View a dense x as [B, C, P], in either layout."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).mT if is_channels_last(x) else x.flatten(2)


def samples(x, channels_last):
    """Return x as [B, C*H*W], channels varying fastest if `channels_last`, and the function that brings such a matrix back to x's shape.

    Statistics of a whole sample do not depend on the order of its elements, so a dense x need not be copied into another layout."""
    b, c, h, w = x.shape
    if channels_last:
        return x.permute(0, 2, 3, 1).reshape(b, -1), lambda y: y.view(b, h, w, c).permute(0, 3, 1, 2)
    return x.reshape(b, -1), lambda y: y.view(x.shape)


def widened(x):
    """Return x in the dtype of its arithmetic: float32, or float64 for float64. None stays None."""
    return x if x is None else x.to(torch.promote_types(x.dtype, torch.float32))
