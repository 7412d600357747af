"""One small launch at the end of a step: what the programs of other launches wrote is added up in their order, and dL/dV = d^T a of the grid. Where
several programs share a sample, one more behind the first sweep."""

import triton
import triton.language as tl

from fastff.kernels.triton.epilogue import Finish, Tile, added_up, finish_share
from fastff.kernels.triton.goodness.arguments import Config, Result, Scratch, dot, store_moments
from fastff.kernels.triton.loss import SWISH_SYMBA, SYMBA, LossArguments
from fastff.kernels.triton.normalization import joined_programs

COLUMNS = tl.constexpr(128)  # that a program adds up
ROWS = tl.constexpr(16)  # that it adds up at a time
CLASSES, CELLS = 128, tl.constexpr(64)  # rows, at most, and columns of dL/dV of a program
LOSSES = tl.constexpr(1024)


@triton.jit
def join_columns(partial, whole, parts, columns):
    """Columns of the i-th program of whole [columns], from partial [parts, columns]."""
    e = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(whole + e, added_up(partial, parts, columns, e, COLUMNS, ROWS), mask=e < columns)


@triton.jit(do_not_specialize=["B", "positions", "parts"])
def join(scratch: Scratch, whole: Scratch, B, positions, parts, config: Config):
    """What the first sweep wrote of whole samples, from that of parts of `positions` positions; g only where the sweep computes it."""
    if scratch.sums is not None:
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        elements = tl.zeros([], tl.int64) + config.C * config.P  # of a sample
        total, square = joined_programs(scratch.sums, n, B, 2 * B, parts, elements, positions * config.C, ROWS, ROWS)
        store_moments(whole, 0, n, total, square, B)
    batch = B.to(tl.int64)
    if scratch.g is not None:
        join_columns(scratch.g, whole.g, parts, batch * config.K)
    if scratch.second is not None:
        join_columns(scratch.second, whole.second, parts, batch * (config.C * config.C))
    if scratch.mu is not None:
        join_columns(scratch.mu, whole.mu, parts, batch * config.C)
    if scratch.means is not None:
        join_columns(scratch.means, whole.means, parts, batch * (config.C * config.GH * config.GW))


@triton.jit
def store_losses(out, loss: LossArguments, count):
    """Write the reduced loss and dL/dtau, where it is asked for."""
    total = tl.zeros([LOSSES], tl.float32)
    slope = tl.zeros([LOSSES], tl.float32)
    for n0 in range(0, count, LOSSES):
        n = n0 + tl.arange(0, LOSSES)
        total += tl.load(loss.losses + n, mask=n < count, other=0.0)
        if loss.grad_tau is not None:
            slope += tl.load(loss.grad_tau + n, mask=n < count, other=0.0)
    tl.store(out, tl.sum(total, 0) * loss.scale)
    tl.store(out + 1, tl.sum(slope, 0))


@triton.jit
def store_grid_gradient(grad_grid, scratch: Scratch, a, k, e, B, config: Config):
    """Write the rows k and the columns e of dL/dV [K, M GH GW]."""
    columns: tl.constexpr = config.M * config.GH * config.GW
    row = tl.arange(0, 32)
    known = (k < config.K)[None, :]
    grad = tl.zeros([config.BK, CELLS], tl.float32)
    for b0 in range(0, B, 32):
        b = (b0 + row).to(tl.int64)
        here = (b < B)[:, None]
        d = tl.load(scratch.d + b[:, None] * config.K + k[None, :], mask=here & known, other=0.0)
        values = tl.load(a + b[:, None] * columns + e[None, :], mask=here & (e < columns)[None, :], other=0.0)
        grad = dot(tl.trans(d), values, grad, config.CELL_PRECISION)
    mask = (k < config.K)[:, None] & (e < columns)[None, :]
    tl.store(grad_grid + k[:, None] * columns + e[None, :], grad, mask=mask)


@triton.jit(do_not_specialize=["weight_rows", "sum_rows", "hidden_rows", "B", "tiles"])
def reduce(
    result: Result, weight_rows, sum_rows, hidden_rows, out, scratch: Scratch, loss: LossArguments, a, grad_grid, B, end: Finish, tiles,
    config: Config, tile: Tile,
):  # fmt: skip
    """out [K C + K + 2 C + M C + 2]: sums over programs of result.weights; with an epilogue, whose `finish` the last programs run, gradients of its
    batch norm; sums of result.hidden; the reduced loss and dL/dtau. grad_grid [K, M GH GW] or None, from a [B, M GH GW]."""
    weights: tl.constexpr = config.K * config.C + config.K
    hidden: tl.constexpr = config.M * config.C if result.hidden is not None else 0
    cells: tl.constexpr = config.M * config.GH * config.GW if grad_grid is not None else 0
    of_weights: tl.constexpr = (weights + COLUMNS - 1) // COLUMNS
    of_hidden: tl.constexpr = of_weights + (hidden + COLUMNS - 1) // COLUMNS
    tiles_of_grid: tl.constexpr = (cells + CELLS - 1) // CELLS
    of_grid: tl.constexpr = of_hidden + tiles_of_grid * ((config.K + config.BK - 1) // config.BK)
    at_hidden = out + weights + 2 * config.C
    i = tl.program_id(0)
    if i < of_weights:
        e = i * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(out + e, added_up(result.weights, weight_rows, weights, e, COLUMNS, ROWS), mask=e < weights)
    elif i < of_hidden:
        if result.hidden is not None:
            e = (i - of_weights) * COLUMNS + tl.arange(0, COLUMNS)
            tl.store(at_hidden + e, added_up(result.hidden, hidden_rows, hidden, e, COLUMNS, ROWS), mask=e < hidden)
    elif i < of_grid:
        if grad_grid is not None:
            e = (i - of_hidden) % tiles_of_grid * CELLS + tl.arange(0, CELLS)
            k = (i - of_hidden) // tiles_of_grid * config.BK + tl.arange(0, config.BK)
            store_grid_gradient(grad_grid, scratch, a, k, e, B, config)
    elif i == of_grid:
        if loss.losses is not None:
            half: tl.constexpr = (config.LOSS == SYMBA) or (config.LOSS == SWISH_SYMBA)
            store_losses(at_hidden + config.M * config.C, loss, B // 2 if half else B)
    elif end.y is not None:
        positions = B.to(tl.int64) * config.P
        finish_share(i - of_grid - 1, end, result.sums, sum_rows, out + weights, positions, tiles, tile)
