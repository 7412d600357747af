"""Normalisation of the next block's input, as device functions. Names and formulas: fastff/spec.py, fastff/reference.py."""

import triton
import triton.language as tl

from fastff import spec

NONE, LAYER_NORM, GROUP_NORM, L2, RMS, LAYER_NORM_CHANNELS, L2_CHANNELS, RMS_CHANNELS = (
    tl.constexpr(spec.NORMALIZATIONS.index(name))
    for name in ("none", "layer_norm", "group_norm", "l2", "rms", "layer_norm_channels", "l2_channels", "rms_channels")
)


def constant(normalization):
    """The number of a spec.Normalization in the kernels."""
    return spec.NORMALIZATIONS.index(normalization.name)


@triton.jit
def factors(total, square, n, eps, NORM: tl.constexpr):
    """(mean, factor) of a normalisation, from the sums of n elements and of their squares: y = (x - mean) factor."""
    mean = total / n
    if (NORM == L2) or (NORM == L2_CHANNELS):  # noqa: SIM109
        return mean * 0, tl.where(square == 0, 0.0, 1 / (tl.sqrt(square) + eps))
    if (NORM == RMS) or (NORM == RMS_CHANNELS):  # noqa: SIM109
        return mean * 0, 1 / tl.sqrt(square / n + eps)
    return mean, 1 / tl.sqrt(tl.maximum(square / n - mean * mean, 0.0) + eps)


@triton.jit
def statistics(sums, n, B, n_elements, shift, eps):
    """Mean and 1 / deviation of the samples n, from the sums of x - shift and of its square, sums [2, B]."""
    total = tl.load(sums + n, mask=n < B, other=0.0)
    square = tl.load(sums + B + n, mask=n < B, other=0.0)
    mean = total / n_elements
    variance = tl.maximum(square / n_elements - mean * mean, 0.0)
    return mean + shift, 1 / tl.sqrt(variance + eps)


@triton.jit
def store_normalized(X, normalized, at, mask, mean, rstd, C, eps, NORM: tl.constexpr):
    """Write a normalised tile [channels, rows]: over the sample, whose mean and rstd are given by row, or over the channels of each position."""
    wide = X.to(tl.float32)
    if NORM == LAYER_NORM_CHANNELS:
        mean = tl.sum(wide, 0) / C
        off = tl.where(mask, wide - mean[None, :], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(off * off, 0) / C + eps)
    tl.store(normalized + at, ((wide - mean[None, :]) * rstd[None, :]).to(normalized.dtype.element_ty), mask=mask)
