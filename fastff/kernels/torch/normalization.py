"""Normalizations of fastff/spec.py on PyTorch's operators: each result is dense, channels_last where x is."""

import torch.nn.functional as F

from fastff import reference
from fastff.kernels.layout import as_result_of, empty_like, is_channels_last, samples, widened

ELEMENTS = 1 << 18  # of some samples at a time, which are widened, with temporaries of their size


def layer_norm(x, eps):
    """Normalize each sample of x [B, C, H, W] over all its elements."""
    flat, back = samples(x, is_channels_last(x))
    return back(F.layer_norm(flat, flat.shape[1:], eps=eps))


def layer_norm_channels(x, eps):
    """Normalize x [B, C, H, W] over C at each position."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=eps).permute(0, 3, 1, 2)


def normalize(x, normalization):
    """Return x normalized, or None for "none"."""
    name, groups, eps = normalization
    if name == "none":
        return None
    if name == "layer_norm":
        return layer_norm(x, eps)
    if name == "layer_norm_channels":
        return as_result_of(x, layer_norm_channels(x, eps))
    result, some = empty_like(x), max(1, ELEMENTS // max(1, x[:1].numel()))
    for part, own in zip(x.split(some), result.split(some), strict=True):
        own.copy_(reference.normalized(widened(part), name, groups, eps))
    return result
