"""What both algorithms do with a tile of the second sweep, once they have its gradient, and with the loss between the sweeps."""

from collections import namedtuple

import triton
import triton.language as tl

from fastff.kernels.triton.epilogue import Source, through_activation
from fastff.kernels.triton.goodness.arguments import Config, Result, Scratch, Shape
from fastff.kernels.triton.goodness.grid import Grid, spread_cells
from fastff.kernels.triton.loss import LossArguments, losses_of

Tile = namedtuple("Tile", "p mask source_at result_at")
"""Positions [R], mask [BC, R], and offsets [BC, R] in the source and in the result."""


@triton.jit
def loss_stage(scratch: Scratch, loss: LossArguments, n, shape: Shape, config: Config):
    """Losses and d of the program's samples n; between barriers, since other threads wrote g and will read d."""
    if config.FIRST or config.HEAD:
        tl.debug_barrier()
    losses_of(scratch.g, scratch.d, loss, n, shape.B, shape.K, config.LOSS, config.NS, config.BK)
    tl.debug_barrier()


@triton.jit
def store_gradient(
    grad, tile: Tile, first, c, source: Source, result: Result, grid: Grid, shape: Shape, config: Config
):  # fmt: skip
    """Add what comes by way of the cells, go back through the activation, and write the gradient. Returns it, and x - mean of an epilogue."""
    if grid.cells is not None:
        grad += spread_cells(tile.p, first, c, grid, shape, config)
    grad, off = through_activation(grad, source, tile.source_at, c, shape.C, tile.mask, config.ACTIVATION)
    tl.store(result.grad_x + tile.result_at, grad.to(result.grad_x.dtype.element_ty), mask=tile.mask)
    return grad, off
