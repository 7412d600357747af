"""Layer normalisation of x [B, n], each sample over all its elements, without affine: y = (x - mean) / sqrt(variance + eps).

A program takes a sample: the sum of x - x[0] and squares about the mean in one sweep, then y, with x read again, out of L2 up to samples of some
megabytes. Floor: one read, one write. Long samples are cut into parts: one launch for partial sums, which are joined in a fixed order, one for y.

Never run on a GPU yet: interpreted and compiled ahead of time only (tests/test_triton.py).
"""

import torch
import triton
import triton.language as tl

from fastff.kernels.layout import dense, empty_like
from fastff.kernels.triton.launch import multiprocessors, on_device, shares
from fastff.kernels.triton.normalization import between, joined, joined_parts, lane_counts, statistics

BLOCK = 4096  # elements a program has in registers: 16 a thread with 8 warps


@triton.jit
def kernel(x, y, sums, B, n, share, xb, eps, SUMS: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    """Program (b, j): elements j share .. (j + 1) share - 1 of sample b. sums [parts, 2, B] written (SUMS) or, of one part, read (WRITE alone)."""
    b = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    base = x + b * xb
    start = part.to(tl.int64) * share
    shift = tl.load(base).to(tl.float32)
    at = tl.arange(0, BLOCK)
    if SUMS:
        total = tl.zeros([BLOCK], tl.float32)
        square = tl.zeros([BLOCK], tl.float32)
        for i in range(0, share, BLOCK):
            mask = start + i + at < n
            off = tl.where(mask, tl.load(base + start + i + at, mask=mask, other=0.0).to(tl.float32) - shift, 0.0)
            square += tl.where(mask, between(total, i / BLOCK, off, 1.0), 0.0)
            total += off
        own = tl.minimum(n - start, share)
        whole, squares = joined(total[None, :], square[None, :], lane_counts(own, at, BLOCK)[None, :], own)
        one = sums + part * 2 * B + b + tl.arange(0, 1)
        tl.store(one, whole)
        tl.store(one + B, squares)
    if WRITE:
        if SUMS:
            tl.debug_barrier()
        mean, rstd = statistics(sums, b, B, n, shift, eps)
        for i in range(0, share, BLOCK):
            mask = start + i + at < n
            value = tl.load(base + start + i + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(y + b * n + start + i + at, ((value - mean) * rstd).to(y.dtype.element_ty), mask=mask)


def layer_norm(x, eps):
    """x [B, C, H, W] -> the same shape and dtype, dense, channels_last where x is."""
    x = dense(x)
    B, n, y = len(x), x[0].numel(), empty_like(x)
    with on_device(x):
        blocks = -(-n // BLOCK)
        share, parts = shares(blocks, min(2 * multiprocessors(x.device) // B, blocks // 4))
        share *= BLOCK
        sums = torch.empty(parts, 2, B, device=x.device, dtype=torch.float32)
        arguments = {
            "x": x, "B": B, "n": n, "share": share, "xb": x.stride(0), "eps": eps, "BLOCK": BLOCK, "num_warps": 8
        }  # fmt: skip
        if parts == 1:
            kernel[(B, 1)](y=y, sums=sums, SUMS=True, WRITE=True, **arguments)
        else:
            kernel[(B, parts)](y=y, sums=sums, SUMS=True, WRITE=False, **arguments)
            kernel[(B, parts)](y=y, sums=joined_parts(sums, n, share), SUMS=False, WRITE=True, **arguments)
    return y
