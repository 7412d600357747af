"""The spatial term of goodness over a grid of cells: means over cells beside the first sweep, their gradient in the second.

Cells have the edges of adaptive average pooling, [i H // GH, ceil((i + 1) H / GH)), so they overlap where the grid does not divide. The products of
the means [B, C GH GW] with the grid's weights are the sweep's own (of direct `spatial_term` and `spatial_cells`: 16 rows, of which NS are samples; of
second_moment `add_term` and `store_cells`) where the weights are small enough to be read again for each group of samples, and there is no hidden
layer; else they are between the sweeps (spatial.py).

`first`, the first sample of a group, is at least 0, but the compiler does not know it: with tl.minimum(first, 0) added to the numbers of classes, the
addresses of these products are computed for each group, and not once, to be kept in registers that the sweeps need.
"""

import triton
import triton.language as tl

from fastff.kernels.triton.epilogue import store_pair
from fastff.kernels.triton.goodness.arguments import Config, Head, Scratch, Span, dot
from fastff.kernels.triton.normalization import moments

COLUMNS = tl.constexpr(64)  # of the grid's weights, or channels of the means, at a time
HIDDEN = tl.constexpr(32)  # channels of a hidden layer at a time


@triton.jit
def members(p, config: Config):
    """Whether row r (sample r // BP, position p[r]) lies in cell col % BG of sample col // BG, [R, NS BG]; what is said of rows and cells that do
    not exist is never used."""
    col = tl.arange(0, config.NS * config.BG)
    cell, lane = col % config.BG, tl.arange(0, config.NS * config.BP)
    i, j = cell // config.GW * config.H, cell % config.GW * config.W
    row, column = i[None, :] - (p // config.W * config.GH)[:, None], j[None, :] - (p % config.W * config.GW)[:, None]
    inside = (row > -config.H) & (row < config.GH) & (column > -config.W) & (column < config.GW)
    return inside & ((lane // config.BP)[:, None] == (col // config.BG)[None, :])


@triton.jit
def shares(config: Config):
    """1 / |cell| of each column, [NS BG]."""
    cell = tl.arange(0, config.NS * config.BG) % config.BG
    i, j = cell // config.GW, cell % config.GW
    rows = ((i + 1) * config.H + config.GH - 1) // config.GH - i * config.H // config.GH
    return 1 / (rows * (((j + 1) * config.W + config.GW - 1) // config.GW - j * config.W // config.GW)).to(tl.float32)


@triton.jit
def cells_at(first, c, C, B, config: Config):
    """Offsets in [B, C, GH GW] and mask of the cells of NS samples from `first` on and of the channels c, [channels, NS BG]."""
    col = tl.arange(0, config.NS * config.BG)
    cell, owner = col % config.BG, first + col // config.BG
    at = (owner[None, :] * C + c[:, None]) * (config.GH * config.GW) + cell[None, :]
    return at, (c < C)[:, None] & ((owner < B) & (cell < config.GH * config.GW))[None, :]


@triton.jit
def cell_sums(X, p, config: Config):
    """Sums of a tile's rows by cell, [BC, NS BG]."""
    return dot(X, members(p, config).to(tl.float32).to(X.dtype), None, config.PRECISION)


@triton.jit
def store_means(pooled, scratch: Scratch, span: Span, c, B, config: Config):
    """Write means of the span's part from sums over cells."""
    at, mask = cells_at(span.first, c, config.C, B, config)
    offset = span.part.to(tl.int64) * B * (config.C * config.GH * config.GW)
    tl.store(scratch.means + offset + at, pooled * shares(config)[None, :], mask=mask)


@triton.jit
def load_cells(scratch: Scratch, first, c, B, config: Config):
    """The gradients of the positions in each cell, [BC, NS BG]."""
    at, mask = cells_at(first, c, config.C, B, config)
    return tl.load(scratch.cells + at, mask=mask, other=0.0) * shares(config)[None, :]


@triton.jit
def spread_cells(cells, p, config: Config):
    """The gradient of a tile by way of its cells, [BC, R]."""
    return dot(cells, tl.trans(members(p, config).to(tl.float32)), None, config.CELL_PRECISION)


@triton.jit
def grid_weights(head: Head, k, e, config: Config):
    """Columns e of the grid's weights [K, M GH GW] of the classes k, [BK, columns]."""
    columns: tl.constexpr = config.M * config.GH * config.GW
    mask = (k < config.K)[:, None] & (e < columns)[None, :]
    return tl.load(head.grid_weight + k[:, None] * columns + e[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def hidden_weights(head: Head, m, c, config: Config):
    """U, the hidden layer's weight, of the channels m and c, [channels, channels]."""
    mask = (m < config.M)[:, None] & (c < config.C)[None, :]
    return tl.load(head.hidden_weight + m[:, None] * config.C + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def spatial_term(head: Head, scratch: Scratch, first, B, config: Config):
    """The term of g [NS, BK], from the means of the group, which other threads wrote."""
    columns: tl.constexpr = config.C * config.GH * config.GW
    k, row = tl.arange(0, config.BK) + tl.minimum(first, 0), tl.arange(0, 16)
    here = (row < config.NS) & (first + row < B)
    term = tl.zeros([16, config.BK], tl.float32)
    tl.debug_barrier()
    for e0 in range(0, columns, COLUMNS):
        e = e0 + tl.arange(0, COLUMNS)
        at = scratch.means + (first + row)[:, None] * columns + e[None, :]
        mean = tl.load(at, mask=here[:, None] & (e < columns)[None, :], other=0.0)
        term = dot(mean, tl.trans(grid_weights(head, k, e, config)), term, config.CELL_PRECISION)
    own = scratch.term + (tl.program_id(1).to(tl.int64) * B + first) * config.K  # of this program, to be read by sample
    tl.store(own + row[:, None] * config.K + k[None, :], term, mask=here[:, None] & (k < config.K)[None, :])
    tl.debug_barrier()
    n = tl.arange(0, config.NS)
    known = (first + n < B)[:, None] & (k < config.K)[None, :]
    return tl.load(own + n[:, None] * config.K + k[None, :], mask=known, other=0.0)


@triton.jit
def spatial_cells(head: Head, scratch: Scratch, first, c, B, config: Config):
    """Write dL/d(means) of the group's samples and the program's channels c from d, which other threads wrote; other threads will read it."""
    columns: tl.constexpr = config.C * config.GH * config.GW
    begin = tl.program_id(1) * (config.BC * config.GH * config.GW)
    end = tl.minimum(begin + config.BC * config.GH * config.GW, columns)
    k, row = tl.arange(0, config.BK) + tl.minimum(first, 0), tl.arange(0, 16)
    here = (row < config.NS) & (first + row < B)
    tl.debug_barrier()
    at = scratch.d + (first + row)[:, None] * config.K + k[None, :]
    d = tl.load(at, mask=here[:, None] & (k < config.K)[None, :], other=0.0)
    for e0 in range(begin, end, COLUMNS):
        e = e0 + tl.arange(0, COLUMNS)
        cell = dot(d, grid_weights(head, k, e, config), None, config.CELL_PRECISION)
        tl.store(
            scratch.cells + (first + row)[:, None] * columns + e[None, :], cell, mask=here[:, None] & (e < end)[None, :]
        )
    tl.debug_barrier()


@triton.jit
def add_term(head: Head, scratch: Scratch, b, config: Config):
    """Add the term to g of sample b, from its means; other threads wrote both."""
    columns: tl.constexpr = config.C * config.GH * config.GW
    tl.debug_barrier()
    for k0 in range(0, config.K, config.BK):
        k = k0 + tl.arange(0, config.BK) + tl.minimum(b, 0)
        at = scratch.g + b * config.K + k
        g = tl.load(at, mask=k < config.K, other=0.0)
        for e0 in range(0, columns, COLUMNS):
            e = e0 + tl.arange(0, COLUMNS) + tl.minimum(b, 0)
            mean = tl.load(scratch.means + b * columns + e, mask=e < columns, other=0.0)
            g += tl.sum(grid_weights(head, k, e, config) * mean[None, :], 1)
        tl.debug_barrier()  # several threads may have loaded one number
        tl.store(at, g, mask=k < config.K)


@triton.jit
def store_cells(head: Head, scratch: Scratch, b, config: Config):
    """Write dL/d(means) of sample b from d, which other threads wrote; other threads will read it."""
    columns: tl.constexpr = config.C * config.GH * config.GW
    for e0 in range(0, columns, COLUMNS):
        e = e0 + tl.arange(0, COLUMNS) + tl.minimum(b, 0)
        cell = tl.zeros([COLUMNS], tl.float32)
        for k0 in range(0, config.K, config.BK):
            k = k0 + tl.arange(0, config.BK) + tl.minimum(b, 0)
            d = tl.load(scratch.d + b * config.K + k, mask=k < config.K, other=0.0)
            cell += tl.sum(grid_weights(head, k, e, config) * d[:, None], 0)
        tl.store(scratch.cells + b * columns + e, cell, mask=e < columns)
    tl.debug_barrier()


@triton.jit
def hidden_inputs(head: Head, scratch: Scratch, first, B, config: Config):
    """Write z = U means of the group's samples, and its moments, from the means over cells, which other threads wrote. The programs of a row share
    the channels of z."""
    tl.debug_barrier()
    for m0 in range(tl.program_id(1) * HIDDEN, config.M, tl.num_programs(1) * HIDDEN):
        m = m0 + tl.arange(0, HIDDEN)
        z = tl.zeros([HIDDEN, config.NS * config.BG], tl.float32)
        for c0 in range(0, config.C, COLUMNS):
            c = c0 + tl.arange(0, COLUMNS)
            at, mask = cells_at(first, c, config.C, B, config)
            mean = tl.load(scratch.means + at, mask=mask, other=0.0)
            z = dot(hidden_weights(head, m, c, config), mean, z, config.CELL_PRECISION)
        at, mask = cells_at(first, m, config.M, B, config)
        tl.store(scratch.z + at, z, mask=mask)
        n = tl.minimum(B - first, config.NS) * (config.GH * config.GW)
        total, square = moments(z, mask, n.to(tl.float32), 1)
        store_pair(scratch.moments, first // config.NS, total, square, m, config.M)


@triton.jit(do_not_specialize=["B"])
def hidden_layer(head: Head, scratch: Scratch, B, config: Config):
    """The same in a launch of its own (Launch.hidden_apart): program (i, j): group i of samples, channels j."""
    hidden_inputs(head, scratch, tl.program_id(0).to(tl.int64) * config.NS, B, config)


def grid_sizes(grid_weight, x):
    """(rows, columns) of the grid on x: at most one cell a position. (1, 1) without grid_weight."""
    if grid_weight is None:
        return 1, 1
    return tuple(min(n, g) for n, g in zip(x.shape[2:], grid_weight.shape[2:], strict=True))
