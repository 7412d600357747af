"""Normalisation of the next block's input, as device functions. Names and formulas: fastff/spec.py, fastff/reference.py.

A variance comes from a sum and a sum of squares about the mean, of parts that are joined (Chan, Golub and LeVeque 1983): no squares cancel, wherever
the mean lies. `between`, `moments`, `joined` and `joined_programs` do this for two parts, a tile, lanes and programs.
"""

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
def between(total, n, more, m):
    """What the distance between the means of n numbers and of m more adds to their squares, from the sums `total` and `more`."""
    apart = more / tl.maximum(m, 1.0) - total / tl.maximum(n, 1.0)
    return apart * apart * (n * m / tl.maximum(n + m, 1.0))


@triton.jit
def moments(values, mask, n, axis: tl.constexpr):
    """Sums of values (zeros where not `mask`) along an axis, and of squares about the mean, of n numbers each."""
    total = tl.sum(values, axis)
    off = tl.where(mask, values - tl.expand_dims(total / n, axis), 0.0)
    return total, tl.sum(off * off, axis)


@triton.jit
def joined(total, square, count, n):
    """Sum and squares of n numbers by row, from those of `count` of them in each lane."""
    whole = tl.sum(total, 1)
    off = total / tl.maximum(count, 1.0) - (whole / n)[:, None]
    return whole, tl.sum(square + count * off * off, 1)


@triton.jit
def lane_counts(n, lane, SIZE: tl.constexpr):
    """How many of n numbers each of SIZE lanes has, which take them in turn."""
    return tl.maximum((n - lane + SIZE - 1) // SIZE, 0).to(tl.float32)


@triton.jit
def joined_programs(sums, at, STRIDE, STEP, parts, n, share, PARTS: tl.constexpr, SIZE: tl.constexpr):
    """Sum and squares of n numbers by row, [SIZE], from those of programs that had `share` of them each (the last the rest): sums + at and
    sums + at + STRIDE of the first program, STEP further for each of the others."""
    lane = tl.arange(0, PARTS)
    total = tl.zeros([SIZE, PARTS], tl.float32)
    square = tl.zeros([SIZE, PARTS], tl.float32)
    seen = tl.zeros([1, PARTS], tl.float32)
    for i in range(0, parts, PARTS):
        part = (i + lane).to(tl.int64)
        mask = (part < parts)[None, :] & (at < STRIDE)[:, None]
        first = sums + at[:, None] + part[None, :] * STEP
        count = tl.minimum(tl.maximum(n - part * share, 0), share).to(tl.float32)[None, :]
        more, squares = tl.load(first, mask=mask, other=0.0), tl.load(first + STRIDE, mask=mask, other=0.0)
        square += squares + between(total, seen, more, count)
        total += more
        seen += count
    return joined(total, square, seen, n)


@triton.jit
def factors(total, square, n, eps, NORM: tl.constexpr):
    """(mean, factor) of a normalisation, from the sum of n elements and of their squares about the mean: y = (x - mean) factor."""
    mean = total / n
    whole = square + total * mean  # squares about 0
    if (NORM == L2) or (NORM == L2_CHANNELS):  # noqa: SIM109
        return mean * 0, tl.where(whole == 0, 0.0, 1 / (tl.sqrt(whole) + eps))
    if (NORM == RMS) or (NORM == RMS_CHANNELS):  # noqa: SIM109
        return mean * 0, 1 / tl.sqrt(whole / n + eps)
    return mean, 1 / tl.sqrt(square / n + eps)


@triton.jit
def store_normalized(X, normalized, at, mask, mean, rstd, C, eps, NORM: tl.constexpr):
    """Write a normalised tile [channels, rows]: over the sample, whose mean and rstd are given by row, or over the channels of each position."""
    wide = X.to(tl.float32)
    if NORM == LAYER_NORM_CHANNELS:
        mean = tl.sum(wide, 0) / C
        off = tl.where(mask, wide - mean[None, :], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(off * off, 0) / C + eps)
    tl.store(normalized + at, ((wide - mean[None, :]) * rstd[None, :]).to(normalized.dtype.element_ty), mask=mask)
