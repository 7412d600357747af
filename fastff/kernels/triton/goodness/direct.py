"""The direct algorithm: a = W X by tiles, g = mean a^2; dL/dx = (2/P) W^T (d * a) with a computed again."""

from collections import namedtuple

import triton
import triton.language as tl

from fastff.kernels.triton.epilogue import Source, load_tile, store_pair
from fastff.kernels.triton.goodness.arguments import (
    Config,
    Head,
    Result,
    Scratch,
    Shape,
    class_bias,
    class_weights,
    dot,
)
from fastff.kernels.triton.goodness.grid import Grid, cell_sums, store_cell_sums
from fastff.kernels.triton.goodness.sweep import Tile, loss_stage, store_gradient
from fastff.kernels.triton.loss import LossArguments
from fastff.kernels.triton.normalization import (
    LAYER_NORM,
    NONE,
    between,
    joined,
    lane_counts,
    moments,
    statistics,
    store_normalized,
)

Rows = namedtuple("Rows", "part start end first sample here c shift")
"""A program's part of the positions, start .. end - 1; first sample; sample of each row, and whether it exists; channels [BC]; shift: a number
near each row's values, which the sums for layer norm are relative to."""


@triton.jit
def rows_of_program(source: Source, shape: Shape, positions, config: Config):
    """Rows of program (i, j): samples i NS .. i NS + NS - 1, positions j positions .. (j + 1) positions - 1."""
    R: tl.constexpr = config.NS * config.BP
    part = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * config.NS
    sample = first + tl.arange(0, R) // config.BP
    here = sample < shape.B
    start = part * positions
    end = tl.minimum(start + positions, shape.P)
    shift = tl.zeros([R], tl.float32)
    if source.affine is None:
        shift = tl.load(source.x + sample * source.sample_stride, mask=here, other=0.0).to(tl.float32)
    return Rows(part, start, end, first, sample, here, tl.arange(0, config.BC), shift)


@triton.jit
def tile_of(rows: Rows, p0, source: Source, result: Result, shape: Shape, config: Config):
    """The Tile of the positions from p0 on."""
    p = p0 + tl.arange(0, config.NS * config.BP) % config.BP
    mask = (rows.c < shape.C)[:, None] & (rows.here & (p < rows.end))[None, :]
    source_at = rows.c[:, None] * source.channel_stride + p[None, :] * source.position_stride
    result_at = rows.c[:, None] * result.channel_stride + p[None, :] * result.position_stride
    return Tile(
        p, mask, (rows.sample * source.sample_stride)[None, :] + source_at, (rows.sample * result.sample_stride)[None, :] + result_at
    )  # fmt: skip


@triton.jit
def class_gradients(scratch: Scratch, sample, row, k, K):
    """d of the classes k for each row, [BK, R]."""
    return tl.load(scratch.d + sample[None, :] * K + k[:, None], mask=row[None, :] & (k < K)[:, None], other=0.0)


@triton.jit
def first_sweep(
    source: Source, result: Result, head: Head, scratch: Scratch, grid: Grid, rows: Rows, shape: Shape, config: Config
):  # fmt: skip
    """Write g and sums of the program's part, and sums over cells."""
    n = rows.first + tl.arange(0, config.NS)
    c = rows.c
    total = tl.zeros([config.NS * config.BP], tl.float32)
    square = tl.zeros([config.NS * config.BP], tl.float32)
    if grid.means is not None:
        pooled = tl.zeros([config.BC, config.NS * config.BG], tl.float32)
    for k0 in range(0, shape.K, config.BK):
        k = k0 + tl.arange(0, config.BK)
        w = class_weights(head, k, c, shape).to(source.x.dtype.element_ty)
        goodness = tl.zeros([config.BK, config.NS], tl.float32)
        for p0 in range(rows.start, rows.end, config.BP):
            tile = tile_of(rows, p0, source, result, shape, config)
            X = load_tile(source, tile.source_at, c, shape.C, tile.mask, config.ACTIVATION)
            a = dot(w, X, config.PRECISION)
            row = rows.here & (tile.p < rows.end)
            if head.bias is not None:
                a = tl.where(row[None, :], a + class_bias(head, k, shape)[:, None], 0.0)
            goodness += tl.sum(tl.reshape(a * a, [config.BK, config.NS, config.BP]), 2)
            if k0 == 0:
                off = tl.where(tile.mask, X.to(tl.float32) - rows.shift[None, :], 0.0)
                more, squares = moments(off, tile.mask, shape.C, 0)
                seen = (p0 - rows.start) / config.BP * shape.C  # in each lane
                square += tl.where(row, squares + between(total, seen, more, shape.C * 1.0), 0.0)
                total += more
                if grid.means is not None:
                    pooled += cell_sums(X, tile.p, grid, shape, config)
        at = rows.part.to(tl.int64) * shape.B * shape.K + n[None, :] * shape.K + k[:, None]
        tl.store(scratch.g + at, goodness / shape.P, mask=(n < shape.B)[None, :] & (k < shape.K)[:, None])
    sums = scratch.sums + rows.part * 2 * shape.B + n
    lanes: tl.constexpr = [config.NS, config.BP]
    own = rows.end - rows.start
    count = lane_counts(own, tl.arange(0, config.BP), config.BP)[None, :] * shape.C
    whole, squares = joined(tl.reshape(total, lanes), tl.reshape(square, lanes), count, own * shape.C)
    tl.store(sums, whole, mask=n < shape.B)
    tl.store(sums + shape.B, squares, mask=n < shape.B)
    if grid.means is not None:
        store_cell_sums(pooled, rows.part, rows.first, c, grid, shape, config)


@triton.jit
def largest_gradients(scratch: Scratch, rows: Rows, shape: Shape, config: Config):
    """max |d| of each row's sample, [R] (1 where it is 0): d is about 1 / B, and is brought to 1 before it meets float16's 5 bits of exponent."""
    largest = tl.zeros([config.NS * config.BP], tl.float32)
    for k0 in range(0, shape.K, config.BK):
        k = k0 + tl.arange(0, config.BK)
        dk = class_gradients(scratch, rows.sample, rows.here, k, shape.K)
        largest = tl.maximum(largest, tl.max(tl.abs(dk), 0))
    return tl.where(largest == 0, 1.0, largest)


@triton.jit
def gradient(X, row, largest, head: Head, scratch: Scratch, rows: Rows, shape: Shape, config: Config):
    """dL/dx of a tile, [BC, R]."""
    grad = tl.zeros([config.BC, config.NS * config.BP], tl.float32)
    for k0 in range(0, shape.K, config.BK):
        k = k0 + tl.arange(0, config.BK)
        w = class_weights(head, k, rows.c, shape).to(X.dtype)
        a = dot(w, X, config.PRECISION)
        if head.bias is not None:
            a += class_bias(head, k, shape)[:, None]
        dk = class_gradients(scratch, rows.sample, row, k, shape.K)
        if X.dtype == tl.float16:
            dk /= largest[None, :]
        grad += dot(tl.trans(w), (a * dk).to(X.dtype), config.PRECISION)
    grad *= 2 / shape.P
    if X.dtype == tl.float16:
        grad *= largest[None, :]
    return grad


@triton.jit
def second_sweep(
    source: Source, result: Result, head: Head, scratch: Scratch, grid: Grid, rows: Rows, shape: Shape, eps, config: Config
):  # fmt: skip
    """Write the gradient and the next input from d and sums."""
    c = rows.c
    mean, rstd = rows.shift, rows.shift
    if config.NORM == LAYER_NORM:
        mean, rstd = statistics(scratch.sums, rows.sample, shape.B, shape.C * shape.P, rows.shift, eps)
    largest = rows.shift
    if source.x.dtype.element_ty == tl.float16:
        largest = largest_gradients(scratch, rows, shape, config)
    first_sum = tl.zeros([config.BC], tl.float32)
    second_sum = tl.zeros([config.BC], tl.float32)
    for p0 in range(rows.start, rows.end, config.BP):
        tile = tile_of(rows, p0, source, result, shape, config)
        X = load_tile(source, tile.source_at, c, shape.C, tile.mask, config.ACTIVATION)
        if result.grad_x is not None:
            row = rows.here & (tile.p < rows.end)
            grad = gradient(X, row, largest, head, scratch, rows, shape, config)
            grad, off = store_gradient(grad, tile, rows.first, c, source, result, grid, shape, config)
            if source.affine is not None:
                first_sum += tl.sum(grad, 1)
                second_sum += tl.sum(grad * off, 1)
        if config.NORM != NONE:
            store_normalized(X, result.normalized, tile.result_at, tile.mask, mean, rstd, shape.C, eps, config.NORM)
    if source.affine is not None:
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + rows.part
        store_pair(result.channel_sums, program, first_sum, second_sum, c, shape.C)


@triton.jit
def direct(
    source: Source, result: Result, head: Head, scratch: Scratch, grid: Grid, loss: LossArguments, shape: Shape, positions, eps,
    config: Config,
):  # fmt: skip
    """Program (i, j): samples i NS .. i NS + NS - 1, positions j positions .. (j + 1) positions - 1."""
    rows = rows_of_program(source, shape, positions, config)
    if config.FIRST:
        first_sweep(source, result, head, scratch, grid, rows, shape, config)
    if config.LOSS is not None:
        loss_stage(scratch, loss, rows.first + tl.arange(0, config.NS), shape, config)
    if config.SECOND:
        if config.FIRST:
            tl.debug_barrier()
        second_sweep(source, result, head, scratch, grid, rows, shape, eps, config)
