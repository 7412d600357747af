"""One small launch at the end of a step: what the programs of the sweep wrote is added up in their order, and dL/dV = d^T means of the grid."""

import triton
import triton.language as tl

from fastff.kernels.triton.epilogue import store_norm_sums
from fastff.kernels.triton.goodness.arguments import Config, Scratch, dot

COLUMNS = tl.constexpr(128)  # that a program adds up
CELLS = tl.constexpr(64)  # columns of dL/dV of a program


@triton.jit
def added_up(partial, count, columns: tl.constexpr, e):
    """Sums of partial[:count, e] of the columns e."""
    row = tl.arange(0, 16)
    total = tl.zeros([16, COLUMNS], tl.float32)
    for r0 in range(0, count, 16):
        r = (r0 + row).to(tl.int64)
        total += tl.load(
            partial + r[:, None] * columns + e[None, :], mask=(r < count)[:, None] & (e < columns)[None, :], other=0.0
        )
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["weight_count", "sum_count", "B"])
def reduce(weights, weight_count, sums, sum_count, out, statistics, scratch: Scratch, grad_grid, B, config: Config):
    """out [K C + K + 4 C + 2]: the sums over programs of `weights` (arguments.Result), what `epilogue.finish` reads [4, C], with an epilogue, whose
    `statistics` say how far y deviates, and the sums of losses and of dL/dtau; grad_grid [K, C GH GW] or None."""
    first: tl.constexpr = config.K * config.C + config.K
    pairs: tl.constexpr = 2 * config.C
    i = tl.program_id(0)
    if i < tl.cdiv(first, COLUMNS):
        e = i * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(out + e, added_up(weights, weight_count, first, e), mask=e < first)
    elif i < tl.cdiv(first, COLUMNS) + tl.cdiv(pairs + 2, COLUMNS):
        e = (i - tl.cdiv(first, COLUMNS)) * COLUMNS + tl.arange(0, COLUMNS)
        total = added_up(sums, sum_count, pairs + 2, e)
        tl.store(out + first + pairs + e, total, mask=(e >= pairs) & (e < pairs + 2))
        if statistics is not None:
            store_norm_sums(out + first, statistics, total, B.to(tl.float32) * config.P, e, config.C)
    elif grad_grid is not None:
        columns: tl.constexpr = config.C * config.GH * config.GW
        e = (i - tl.cdiv(first, COLUMNS) - tl.cdiv(pairs + 2, COLUMNS)) * CELLS + tl.arange(0, CELLS)
        k, row = tl.arange(0, config.BK), tl.arange(0, 32)
        grad = tl.zeros([config.BK, CELLS], tl.float32)
        for b0 in range(0, B, 32):
            b = (b0 + row).to(tl.int64)
            here = (b < B)[:, None]
            d = tl.load(scratch.d + b[:, None] * config.K + k[None, :], mask=here & (k < config.K)[None, :], other=0.0)
            mean = tl.load(
                scratch.means + b[:, None] * columns + e[None, :], mask=here & (e < columns)[None, :], other=0.0
            )
            grad = dot(tl.trans(d), mean, grad, config.CELL_PRECISION)
        mask = (k < config.K)[:, None] & (e < columns)[None, :]
        tl.store(grad_grid + k[:, None] * columns + e[None, :], grad, mask=mask)
