"""The spatial term of goodness over a grid of cells: sums over cells beside the first sweep, their gradient in the second.

Cells have the edges of adaptive average pooling, [i H // GH, ceil((i + 1) H / GH)), so they overlap where the grid does not divide. What lies
between, a product of the cell means [B, C GH GW] with the grid's weights or a hidden layer, is on PyTorch's operators.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl

from fastff import reference
from fastff.kernels.triton.goodness.arguments import Config, Shape, dot

Grid = namedtuple("Grid", "means cells GH GW")
"""means [parts, B, C, GH GW] (sums over cells, in fact) and cells [B, C, GH GW] = d V, or None; rows and columns of the grid."""


@triton.jit
def members(p, grid: Grid, shape: Shape, config: Config):
    """Whether row r (sample r // BP, position p[r]) lies in cell col % BG of sample col // BG; [R, NS BG], and 1 / |cell| [NS BG]."""
    R: tl.constexpr = config.NS * config.BP
    col = tl.arange(0, config.NS * config.BG)
    cell = col % config.BG
    i, j = cell // grid.GW, cell % grid.GW
    top, bottom = i * shape.H // grid.GH, ((i + 1) * shape.H + grid.GH - 1) // grid.GH
    left, right = j * shape.W // grid.GW, ((j + 1) * shape.W + grid.GW - 1) // grid.GW
    row, column = (p // shape.W)[:, None], (p % shape.W)[:, None]
    inside = (row >= top[None, :]) & (row < bottom[None, :]) & (column >= left[None, :]) & (column < right[None, :])
    same = (tl.arange(0, R) // config.BP)[:, None] == (col // config.BG)[None, :]
    exists = (cell < grid.GH * grid.GW)[None, :] & (p < shape.P)[:, None]
    area = tl.maximum((bottom - top) * (right - left), 1).to(tl.float32)
    return inside & same & exists, 1 / area


@triton.jit
def cells_at(first, c, grid: Grid, shape: Shape, config: Config):
    """Offsets in [B, C, GH GW] and mask of the cells of NS samples from `first` on, [BC, NS BG]."""
    col = tl.arange(0, config.NS * config.BG)
    cell, owner = col % config.BG, first + col // config.BG
    at = (owner[None, :] * shape.C + c[:, None]) * (grid.GH * grid.GW) + cell[None, :]
    return at, (c < shape.C)[:, None] & ((owner < shape.B) & (cell < grid.GH * grid.GW))[None, :]


@triton.jit
def cell_sums(X, p, grid: Grid, shape: Shape, config: Config):
    """Sums of a tile's rows by cell, [BC, NS BG]."""
    inside, _ = members(p, grid, shape, config)
    return dot(X, inside.to(tl.float32).to(X.dtype), config.PRECISION)


@triton.jit
def store_cell_sums(pooled, part, first, c, grid: Grid, shape: Shape, config: Config):
    """Write means[part]."""
    at, mask = cells_at(first, c, grid, shape, config)
    offset = part.to(tl.int64) * shape.B * shape.C * (grid.GH * grid.GW)
    tl.store(grid.means + offset + at, pooled, mask=mask)


@triton.jit
def spread_cells(p, first, c, grid: Grid, shape: Shape, config: Config):
    """The gradient of a tile by way of its cells, [BC, R]."""
    inside, share = members(p, grid, shape, config)
    at, mask = cells_at(first, c, grid, shape, config)
    cell = tl.load(grid.cells + at, mask=mask, other=0.0)
    return dot(cell * share[None, :], tl.trans(inside.to(tl.float32)), config.CELL_PRECISION)


class GridTerm:
    """The host's side: from sums over cells to the term of g, and from d to the gradients."""

    def __init__(self, projection, x, parts):
        _, projection = projection.in_dtype(x[:0])
        self.weight, self.hidden, self.statistics = projection.grid_weight, projection.hidden, (None, None)
        self.sizes = grid_sizes(self.weight, x)
        self.means = x.new_empty((parts, *x.shape[:2], self.sizes[0] * self.sizes[1]), dtype=torch.float32)

    def goodness(self, x):
        """The term of g [B, K], from the sums over cells in `means`."""
        self.means = (self.means.sum(0) / _areas(x, self.sizes)).unflatten(2, self.sizes)
        term, *self.statistics = reference.spatial(self.means, self.weight, self.hidden)
        return term

    def backward(self, d):
        """From d, the gradient of the means (`cells`), and those of grid_weight and of a hidden layer (`grads`), in float32."""
        cells, *self.grads = reference.spatial_gradients(d, self.means, self.weight, self.hidden)
        self.cells = cells.contiguous()


def grid_sizes(grid_weight, x):
    """(rows, columns) of the grid on x: at most one cell a position. (0, 0) without grid_weight."""
    if grid_weight is None:
        return 0, 0
    return tuple(min(n, g) for n, g in zip(x.shape[2:], grid_weight.shape[2:], strict=True))


def _areas(x, grid):
    """Positions in each cell, [GH GW]; made on the device, since a step waits for nothing from the host."""
    heights, widths = (
        ((i + 1) * size + cells - 1) // cells - i * size // cells
        for size, cells in zip(x.shape[2:], grid, strict=True)
        for i in (torch.arange(cells, device=x.device),)
    )
    return (heights[:, None] * widths).flatten().float()
