"""One small launch at the end of a step: what the programs of the sweep wrote is added up in their order, and dL/dV = d^T means of the grid."""

import triton
import triton.language as tl

from fastff.kernels.triton.goodness.arguments import Config, Scratch, dot

COLUMNS = tl.constexpr(128)  # that a program adds up
CELLS = tl.constexpr(64)  # columns of dL/dV of a program


@triton.jit
def add_up(partial, count, out, columns: tl.constexpr, i):
    """out[e] = sum of partial[:count, e] of the columns e of the i-th program."""
    e = i * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, 16)
    total = tl.zeros([16, COLUMNS], tl.float32)
    for r0 in range(0, count, 16):
        r = (r0 + row).to(tl.int64)
        total += tl.load(
            partial + r[:, None] * columns + e[None, :], mask=(r < count)[:, None] & (e < columns)[None, :], other=0.0
        )
    tl.store(out + e, tl.sum(total, 0), mask=e < columns)


@triton.jit(do_not_specialize=["weight_count", "sum_count", "B"])
def reduce(weights, weight_count, sums, sum_count, out, scratch: Scratch, grad_grid, B, config: Config):
    """out [K C + K + 2 C + 2]: the sums over programs of `weights` and `sums` (arguments.Result); grad_grid [K, C GH GW] or None."""
    first: tl.constexpr = config.K * config.C + config.K
    second: tl.constexpr = 2 * config.C + 2
    i = tl.program_id(0)
    if i < tl.cdiv(first, COLUMNS):
        add_up(weights, weight_count, out, first, i)
    elif i < tl.cdiv(first, COLUMNS) + tl.cdiv(second, COLUMNS):
        add_up(sums, sum_count, out + first, second, i - tl.cdiv(first, COLUMNS))
    elif grad_grid is not None:
        columns: tl.constexpr = config.C * config.GH * config.GW
        e = (i - tl.cdiv(first, COLUMNS) - tl.cdiv(second, COLUMNS)) * CELLS + tl.arange(0, CELLS)
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
