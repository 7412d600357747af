"""The second-moment algorithm: S = X X^T / P, g = w^T S w + 2 beta (w . mu) + beta^2; dL/dx = (2/P)(M X + c), M = W^T diag(d) W."""

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
    moments,
    statistics,
    store_normalized,
)

Part = namedtuple("Part", "index b start end c has_c square_at square_mask shift")
"""A program's sample b and its part of the positions, start .. end - 1; channels [BC] and whether they exist; offsets and mask of [BC, BC] in a
matrix [C, C]; shift: a number near the sample's values, which the
sums for layer norm are relative to."""


@triton.jit
def part_of_program(source: Source, shape: Shape, positions, config: Config):
    """The Part of program (b, j): sample b, positions j positions .. (j + 1) positions - 1."""
    index = tl.program_id(1)
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, config.BC)
    has_c = c < shape.C
    square_at, square_mask = c[:, None] * shape.C + c[None, :], has_c[:, None] & has_c[None, :]
    start = index * positions
    shift = tl.zeros([], tl.float32)
    if source.affine is None:
        shift = tl.load(source.x + b * source.sample_stride).to(tl.float32)
    return Part(index, b, start, tl.minimum(start + positions, shape.P), c, has_c, square_at, square_mask, shift)


@triton.jit
def tile_of(part: Part, p0, source: Source, result: Result, C, BP: tl.constexpr):
    """The Tile of the positions from p0 on, in a source and a result that begin at the sample."""
    c = part.c
    p = p0 + tl.arange(0, BP)
    mask = part.has_c[:, None] & (p < part.end)[None, :]
    source_at = c[:, None] * source.channel_stride + p[None, :] * source.position_stride
    return Tile(p, mask, source_at, c[:, None] * result.channel_stride + p[None, :] * result.position_stride)


@triton.jit
def first_sweep(
    source: Source, result: Result, head: Head, scratch: Scratch, grid: Grid, part: Part, shape: Shape, config: Config
):  # fmt: skip
    """(S, mu) of the program's part, written too, with its sums and its sums over cells."""
    b, c = part.b, part.c
    S = tl.zeros([config.BC, config.BC], tl.float32)
    m = tl.zeros([config.BC], tl.float32)
    total = tl.zeros([config.BC], tl.float32)
    square = tl.zeros([config.BC], tl.float32)
    if grid.means is not None:
        pooled = tl.zeros([config.BC, config.BG], tl.float32)
    for p0 in range(part.start, part.end, config.BP):
        tile = tile_of(part, p0, source, result, shape.C, config.BP)
        X = load_tile(source, tile.source_at, c, shape.C, tile.mask, config.ACTIVATION)
        S += dot(X, tl.trans(X), config.PRECISION)
        wide = X.to(tl.float32)
        off = tl.where(tile.mask, wide - part.shift, 0.0)
        here = tl.minimum(part.end - p0, config.BP) * 1.0
        more, squares = moments(off, tile.mask, here, 1)
        square += squares + between(total, (p0 - part.start) * 1.0, more, here)
        total += more
        if head.bias is not None:
            m += tl.sum(wide, 1)
        if grid.means is not None:
            pooled += cell_sums(X, tile.p, grid, shape, config)
    S /= shape.P
    m /= shape.P
    own = part.index.to(tl.int64) * shape.B + b
    tl.store(scratch.second + own * shape.C * shape.C + part.square_at, S, mask=part.square_mask)
    if head.bias is not None:
        tl.store(scratch.mu + own * shape.C + c, m, mask=c < shape.C)
    sums = scratch.sums + part.index * 2 * shape.B + b + tl.arange(0, 1)
    own = part.end - part.start
    whole, squares = joined(
        total[None, :], square[None, :], tl.where(part.has_c, own * 1.0, 0.0)[None, :], own * shape.C
    )
    tl.store(sums, whole)
    tl.store(sums + shape.B, squares)
    if grid.means is not None:
        store_cell_sums(pooled, part.index, b, c, grid, shape, config)
    return S, m


@triton.jit
def load_moments(head: Head, scratch: Scratch, part: Part, shape: Shape, config: Config):
    """(S, mu) of the program's sample."""
    b, c = part.b, part.c
    S = tl.load(scratch.second + b * shape.C * shape.C + part.square_at, mask=part.square_mask, other=0.0)
    m = tl.zeros([config.BC], tl.float32)
    if head.bias is not None:
        m = tl.load(scratch.mu + b * shape.C + c, mask=c < shape.C, other=0.0)
    return S, m


@triton.jit
def store_goodness(S, m, head: Head, scratch: Scratch, b, shape: Shape, config: Config):
    """Write g of sample b."""
    c = tl.arange(0, config.BC)
    for k0 in range(0, shape.K, config.BK):
        k = k0 + tl.arange(0, config.BK)
        w = class_weights(head, k, c, shape).to(tl.float32)
        goodness = tl.sum(dot(w, S, config.HEAD_PRECISION) * w, 1)
        if head.bias is not None:
            beta = class_bias(head, k, shape)
            goodness += beta * (2 * tl.sum(w * m[None, :], 1) + beta)
        tl.store(scratch.g + b * shape.K + k, goodness, mask=k < shape.K)


@triton.jit
def gradient_matrix(head: Head, scratch: Scratch, b, shape: Shape, config: Config):
    """M = W^T diag(d) W of sample b, and c = W^T (d beta)."""
    c = tl.arange(0, config.BC)
    M = tl.zeros([config.BC, config.BC], tl.float32)
    constant = tl.zeros([config.BC], tl.float32)
    for k0 in range(0, shape.K, config.BK):
        k = k0 + tl.arange(0, config.BK)
        w = class_weights(head, k, c, shape).to(tl.float32)
        dk = tl.load(scratch.d + b * shape.K + k, mask=k < shape.K, other=0.0)
        M += dot(tl.trans(w * dk[:, None]), w, config.HEAD_PRECISION)
        if head.bias is not None:
            constant += tl.sum(w * (dk * class_bias(head, k, shape))[:, None], 0)
    return M, constant


@triton.jit
def second_sweep(
    source: Source, result: Result, head: Head, scratch: Scratch, grid: Grid, part: Part, shape: Shape, eps, config: Config
):  # fmt: skip
    """Write the gradient and the next input from d and sums."""
    b, c = part.b, part.c
    kind = source.x.dtype.element_ty
    mean, rstd = part.shift, part.shift
    if config.NORM == LAYER_NORM:
        mean, rstd = statistics(scratch.sums, b, shape.B, shape.C * shape.P, part.shift, eps)
    if result.grad_x is not None:
        M, constant = gradient_matrix(head, scratch, b, shape, config)
        largest = 1.0
        if kind == tl.float16:  # M is about |w|^2 / B: it is brought to 1 before it meets 5 bits of exponent
            largest = tl.max(tl.max(tl.abs(M), 1), 0)
            largest = tl.where(largest == 0, 1.0, largest)
            M /= largest
        narrow = M.to(kind)
    first_sum = tl.zeros([config.BC], tl.float32)
    second_sum = tl.zeros([config.BC], tl.float32)
    for p0 in range(part.start, part.end, config.BP):
        tile = tile_of(part, p0, source, result, shape.C, config.BP)
        X = load_tile(source, tile.source_at, c, shape.C, tile.mask, config.ACTIVATION)
        if result.grad_x is not None:
            grad = (dot(narrow, X, config.PRECISION) * largest + constant[:, None]) * (2 / shape.P)
            grad, off = store_gradient(grad, tile, b, c, source, result, grid, shape, config)
            if source.affine is not None:
                first_sum += tl.sum(grad, 1)
                second_sum += tl.sum(grad * off, 1)
        if config.NORM != NONE:
            row = tl.zeros([config.BP], tl.float32)
            store_normalized(
                X, result.normalized, tile.result_at, tile.mask, row + mean, row + rstd, shape.C, eps, config.NORM
            )
    if source.affine is not None:
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + part.index
        store_pair(result.channel_sums, program, first_sum, second_sum, c, shape.C)


@triton.jit
def second_moment(
    source: Source, result: Result, head: Head, scratch: Scratch, grid: Grid, loss: LossArguments, shape: Shape, positions, eps,
    config: Config,
):  # fmt: skip
    """Program (b, j): sample b, positions j positions .. (j + 1) positions - 1. FIRST sweeps for S and mu; HEAD computes g from them, with several
    parts in a launch of its own, after their sum."""
    part = part_of_program(source, shape, positions, config)
    x, residual = source.x + part.b * source.sample_stride, source.residual
    if residual is not None:
        residual += part.b * source.sample_stride
    source = Source(x, residual, source.affine, source.sample_stride, source.channel_stride, source.position_stride)
    grad_x, normalized = result.grad_x, result.normalized
    if grad_x is not None:
        grad_x += part.b * result.sample_stride
    if normalized is not None:
        normalized += part.b * result.sample_stride
    result = Result(
        grad_x, normalized, result.channel_sums, result.sample_stride, result.channel_stride, result.position_stride
    )
    if config.FIRST:
        S, m = first_sweep(source, result, head, scratch, grid, part, shape, config)
    if config.HEAD:
        if not config.FIRST:
            S, m = load_moments(head, scratch, part, shape, config)
        store_goodness(S, m, head, scratch, part.b, shape, config)
    if config.LOSS is not None:
        loss_stage(scratch, loss, part.b + tl.arange(0, 1), shape, config)
    if config.SECOND:
        if config.FIRST:
            tl.debug_barrier()
        second_sweep(source, result, head, scratch, grid, part, shape, eps, config)
