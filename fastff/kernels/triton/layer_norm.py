"""Layer normalisation of x [B, n], each sample over all its elements, without affine: y = (x - mean) / sqrt(variance + eps).

A program takes a sample: the sum of x - x[0] and squares about the mean in one sweep, then y, with x read again, out of L2 up to samples of some
megabytes. Floor: one read, one write. Long samples are cut into parts: one launch for partial sums, which are joined in a fixed order, one for y.

Never run on a GPU yet: interpreted and compiled ahead of time only (tests/test_triton.py).
"""

import math

import torch
import triton
import triton.language as tl

from fastff.kernels.layout import dense, empty_like
from fastff.kernels.triton.launch import multiprocessors, on_device, shares
from fastff.kernels.triton.normalization import between, joined, joined_programs, lane_counts

BLOCK = 4096  # elements a program has in registers: 16 a thread with 8 warps
PARTS = 32  # of a sample, whose sums a program loads at once
UNIT = 16  # elements: samples of a multiple of so many, or of a divisor of it, are accessed by so many at once


@triton.jit(do_not_specialize=["B", "units", "blocks", "parts", "eps"])
def kernel(
    x, y, sums, B, units, blocks, parts, eps, UNIT: tl.constexpr, SUMS: tl.constexpr, WRITE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, j): the j-th `blocks` blocks of the UNIT units elements of sample b. SUMS computes their sums, WRITE writes y.
    A launch that does one of the two alone writes or reads sums [parts, 2, B]."""
    n = units.to(tl.int64) * UNIT
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    base = x + b * n
    start = part.to(tl.int64) * blocks * BLOCK
    shift = tl.load(base).to(tl.float32)
    left = tl.minimum(n - start, blocks * BLOCK).to(tl.int32)
    base += start
    at = tl.arange(0, BLOCK)
    one = b + tl.arange(0, 1)
    if SUMS:
        total = tl.zeros([BLOCK], tl.float32)
        square = tl.zeros([BLOCK], tl.float32)
        for i in range(0, left, BLOCK):
            mask = i + at < left
            off = tl.where(mask, tl.load(base + i + at, mask=mask, other=0.0).to(tl.float32) - shift, 0.0)
            square += tl.where(mask, between(total, i / BLOCK, off, 1.0), 0.0)
            total += off
        whole, squares = joined(total[None, :], square[None, :], lane_counts(left, at, BLOCK)[None, :], left)
    else:
        whole, squares = joined_programs(sums, one, B, 2 * B, parts, n, blocks * BLOCK, PARTS, 1)
    if WRITE:
        mean = tl.sum(whole, 0) / n + shift
        rstd = 1 / tl.sqrt(tl.sum(squares, 0) / n + eps)
        for i in range(0, left, BLOCK):
            mask = i + at < left
            value = tl.load(base + i + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(y + b * n + start + i + at, ((value - mean) * rstd).to(y.dtype.element_ty), mask=mask)
    else:
        tl.store(sums + part * 2 * B + one, whole)
        tl.store(sums + part * 2 * B + B + one, squares)


def layer_norm(x, eps):
    """x [B, C, H, W] -> the same shape and dtype, dense, channels_last where x is."""
    x = dense(x)
    B, n, y = len(x), x[0].numel(), empty_like(x)
    with on_device(x):
        blocks, unit = -(-n // BLOCK), math.gcd(n, UNIT)
        share, parts = shares(blocks, min(2 * multiprocessors(x.device) // B, blocks // 4))
        sums = None if parts == 1 else torch.empty(parts, 2, B, device=x.device, dtype=torch.float32)
        for stages in ((True, True),) if parts == 1 else ((True, False), (False, True)):
            kernel[(B, parts)](x, y, sums, B, n // unit, share, parts, eps, unit, *stages, PARTS, BLOCK, num_warps=8)
    return y
