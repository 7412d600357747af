"""The direct algorithm, in one persistent sweep: a = W x, g = mean a^2, the loss and d, dL/dx = (2/P) W^T (d * a), dL/dW = (2/P) sum (d * a) x.

A program takes the samples of many groups, one group after the other. W stays on chip, g, the loss and d in registers; dL/dW is added up over all
of them and written once. Positions are the rows (M) of every product. With more than BC channels, program (i, j) computes a of all channels in
pieces of BC, and writes dL/dx, the next input and dL/dW of piece j alone.
"""

import triton
import triton.language as tl

from fastff.kernels.triton.epilogue import Norm, Source, load_tile, store_all_statistics, store_pair
from fastff.kernels.triton.goodness.arguments import (
    Config,
    Head,
    Result,
    Scratch,
    Span,
    add_moments,
    class_bias,
    class_weights,
    dot,
    load_moments,
    of_samples,
    rows,
    span_of,
    store_gradient,
    store_moments,
    tile_at,
)
from fastff.kernels.triton.goodness.grid import (
    cell_sums,
    hidden_inputs,
    load_cells,
    spatial_cells,
    spatial_term,
    spread_cells,
    store_means,
)
from fastff.kernels.triton.loss import LossArguments, of_goodness
from fastff.kernels.triton.normalization import LAYER_NORM, NONE, store_normalized


@triton.jit
def outputs(
    source: Source, head: Head, scratch: Scratch, W, span: Span, p0, total, square, pooled, B, MOMENTS: tl.constexpr, config: Config
):  # fmt: skip
    """a of a tile, [R, BK], 0 in rows that do not exist; with MOMENTS the moments of its rows added to total and square, and where all channels
    are in one piece its sums over cells to pooled."""
    k = tl.arange(0, config.BK)
    a = tl.zeros([config.NS * config.BP, config.BK], tl.float32)
    for c0 in range(0, config.C, config.BC):
        c = c0 + tl.arange(0, config.BC)
        tile = tile_at(span, p0, c, B, config)
        X = load_tile(source, tile.at, c, config.C, tile.mask, config.ACTIVATION)
        w = W
        if config.C > config.BC:
            w = class_weights(head, k, c, config).to(X.dtype)
        a = dot(tl.trans(X), tl.trans(w), a, config.PRECISION)
        if MOMENTS:
            seen = (p0 - span.start) / config.BP * config.C + c0
            here = tl.sum(tl.where(c < config.C, 1.0, 0.0), 0)
            total, square = add_moments(total, square, X, tile, seen, here)
            if (scratch.means is not None) and (config.C <= config.BC):
                pooled += cell_sums(X, tile.p, config)
    if head.bias is not None:
        a = tl.where(tile_at(span, p0, k, B, config).row[:, None], a + class_bias(head, k, config)[None, :], 0.0)
    return a, total, square, pooled


@triton.jit
def store_all_means(source: Source, scratch: Scratch, span: Span, B, config: Config):
    """Means over cells where there are several pieces of channels: x is read once more for them."""
    for c0 in range(0, config.C, config.BC):
        c = c0 + tl.arange(0, config.BC)
        pooled = tl.zeros([config.BC, config.NS * config.BG], tl.float32)
        for p0 in range(span.start, span.end, config.BP):
            tile = tile_at(span, p0, c, B, config)
            X = load_tile(source, tile.at, c, config.C, tile.mask, config.ACTIVATION)
            pooled += cell_sums(X, tile.p, config)
        store_means(pooled, scratch, span, c, B, config)


@triton.jit
def first_sweep(source: Source, head: Head, scratch: Scratch, W, span: Span, B, config: Config):
    """(g [NS, BK], a of the last tile, sums and squares about the mean [NS]) of a span."""
    R: tl.constexpr = config.NS * config.BP
    n = span.first + tl.arange(0, config.NS)
    k = tl.arange(0, config.BK)
    total = tl.zeros([R], tl.float32)
    square = tl.zeros([R], tl.float32)
    a = tl.zeros([R, config.BK], tl.float32)
    g = tl.zeros([config.NS, config.BK], tl.float32)
    pooled = tl.zeros([config.BC, config.NS * config.BG], tl.float32)
    for p0 in range(span.start, span.end, config.BP):
        a, total, square, pooled = outputs(source, head, scratch, W, span, p0, total, square, pooled, B, True, config)
        if config.NS == 1:
            g += tl.sum(a * a, 0)[None, :]
        else:
            g += tl.sum(tl.reshape(a * a, [config.NS, config.BP, config.BK]), 1)
    g /= config.P
    whole, squares = of_samples(total, square, tl.zeros([], tl.int32) + (span.end - span.start), config)
    if scratch.means is not None:
        if config.C <= config.BC:
            store_means(pooled, scratch, span, tl.arange(0, config.BC), B, config)
        else:
            store_all_means(source, scratch, span, B, config)
        if scratch.z is not None:
            hidden_inputs(head, scratch, span.first, B, config)
    if (scratch.means is not None) and (config.LOSS is not None):
        g += spatial_term(head, scratch, span.first, B, config)
    if tl.program_id(1) == 0:
        at = span.part.to(tl.int64) * B * config.K + n[:, None] * config.K + k[None, :]
        tl.store(scratch.g + at, g, mask=(n < B)[:, None] & (k < config.K)[None, :])
    return g, a, whole, squares


@triton.jit(do_not_specialize=["B", "norm_parts", "norm_share"])
def direct(
    source: Source, norm: Norm, head: Head, scratch: Scratch, result: Result, loss: LossArguments, B, positions, parts, norm_parts, norm_share,
    eps, config: Config,
):  # fmt: skip
    """Program (i, j): groups of NS samples, or parts of `positions` positions of them; items i, i + programs, ... and of dL/dx, the next input and
    dL/dW the piece j of channels."""
    if config.FIRST and (source.affine is not None):
        store_all_statistics(norm, config.C, norm_parts, norm_share, B.to(tl.int64) * config.P)
    kind = source.x.dtype.element_ty
    k = tl.arange(0, config.BK)
    c = tl.arange(0, config.BC)
    if config.C > config.BC:  # else the compiler sees that this piece is the one that `outputs` has loaded
        c += tl.program_id(1) * config.BC
    W = class_weights(head, k, c, config).to(kind)
    grad_weight = tl.zeros([config.BC, config.BK], tl.float32)
    grad_bias = tl.zeros([config.BK], tl.float32)
    first_sum = tl.zeros([config.BC], tl.float32)
    second_sum = tl.zeros([config.BC], tl.float32)
    for item in range(tl.program_id(0), tl.cdiv(B, config.NS) * parts, tl.num_programs(0)):
        span = span_of(item, positions, parts, config)
        if config.WHOLE:  # constants: masks are known to be aligned, and loops of one tile are none
            span = Span(span.first, span.part, 0, config.P)
        n = span.first + tl.arange(0, config.NS)
        known = (n < B)[:, None] & (k < config.K)[None, :]
        if config.FIRST:
            g, a, whole, squares = first_sweep(source, head, scratch, W, span, B, config)
        if config.LOSS is not None:
            d, value, slope = of_goodness(g, n, k, loss, B, config.K, config.LOSS)
            own = (n < B) & (tl.program_id(1) == 0)
            tl.store(loss.losses + n, value, mask=own)
            if loss.grad_tau is not None:
                tl.store(loss.grad_tau + n, slope, mask=own)
            if scratch.cells is not None:
                tl.store(scratch.d + n[:, None] * config.K + k[None, :], d, mask=known)
                spatial_cells(head, scratch, span.first, c, B, config)
        else:
            if config.FIRST:
                store_moments(scratch, span.part, n, whole, squares, B)
            if config.SECOND:
                d = tl.load(scratch.d + n[:, None] * config.K + k[None, :], mask=known, other=0.0)
        if config.SECOND:
            mean = tl.zeros([config.NS * config.BP], tl.float32)
            rstd = mean
            if config.NORM == LAYER_NORM:
                if not config.FIRST:
                    whole, squares = load_moments(scratch, n, B)
                mean = rows(whole / (config.C * config.P), config)
                rstd = rows(1 / tl.sqrt(squares / (config.C * config.P) + eps), config)
            largest = 1.0
            if kind == tl.float16:  # d is about 1 / B: it is brought to 1 before it meets 5 bits of exponent
                largest = tl.max(tl.abs(d))
                largest = tl.where(largest == 0, 1.0, largest)
                d /= largest
            by_row = d  # of one sample: for all rows
            if config.NS > 1:
                shape: tl.constexpr = [config.NS, config.BP, config.BK]
                by_row = tl.reshape(tl.broadcast_to(d[:, None, :], shape), [config.NS * config.BP, config.BK])
            if scratch.cells is not None:
                cells = load_cells(scratch, span.first, c, B, config)
            for p0 in range(span.start, span.end, config.BP):
                if (not config.FIRST) or (config.P > config.BP):
                    a, _, _, _ = outputs(source, head, scratch, W, span, p0, mean, mean, mean, B, False, config)
                tile = tile_at(span, p0, c, B, config)
                X = load_tile(source, tile.at, c, config.C, tile.mask, config.ACTIVATION)
                slope_a = a * by_row
                e = slope_a.to(kind)
                if kind == tl.float16:
                    grad_weight += dot(X, e, None, config.PRECISION) * largest
                else:
                    grad_weight = dot(X, e, grad_weight, config.PRECISION)
                if head.bias is not None:
                    grad_bias += tl.sum(slope_a, 0) * largest
                if result.grad_x is not None:
                    grad = tl.trans(dot(e, W, None, config.PRECISION)) * (largest * 2 / config.P)
                    if scratch.cells is not None:
                        grad += spread_cells(cells, tile.p, config)
                    grad, off = store_gradient(grad, tile, c, source, result, config)
                    if source.affine is not None:
                        first_sum += tl.sum(grad, 1)
                        second_sum += tl.sum(grad * off, 1)
                if config.NORM != NONE:
                    store_normalized(X, result.normalized, tile.at, tile.mask, mean, rstd, config.C, eps, config.NORM)
    if config.SECOND:
        at = result.weights + tl.program_id(0) * (config.K * config.C + config.K)
        mask = (k < config.K)[None, :] & (c < config.C)[:, None]
        tl.store(at + k[None, :] * config.C + c[:, None], grad_weight * (2 / config.P), mask=mask)
        if (head.bias is not None) and (tl.program_id(1) == 0):
            tl.store(at + config.K * config.C + k, grad_bias * (2 / config.P), mask=k < config.K)
        if source.affine is not None:
            store_pair(result.sums, tl.program_id(0), first_sum, second_sum, c, config.C)
