"""The direct algorithm as three matrix products, for more channels and classes than a sweep can hold: a = W x is written once and read twice.

    outputs            a in the dtype of x, and the means of its squares by sample and class                       reads x; writes a
    input_gradient     dL/dx = (2/P) W^T (d * a); d meets a as it is loaded                                        reads a; writes dL/dx
    weight_gradient    dL/dW = (2/P) sum (d * a) x by program, which the reduction adds up in a fixed order        reads a and x

The loss is a launch between the first two, and normalization one of its own. PyTorch makes the means over cells of a spatial term, and takes
their gradient back to the positions. Programs that share rows of x or a are neighbours in the order of launch, so that the L2 cache has these for
all of them.
"""

import functools
from collections import namedtuple

import torch
import triton
import triton.language as tl

from fastff.kernels.layout import is_channels_last
from fastff.kernels.torch.goodness import Grid
from fastff.kernels.triton import blocks, epilogue
from fastff.kernels.triton.epilogue import Tile
from fastff.kernels.triton.goodness.arguments import (
    Config,
    Head,
    Scratch,
    class_bias,
    class_weights,
    dot,
    span_of,
    tile_at,
)
from fastff.kernels.triton.launch import constants, shares

LEADING = tl.constexpr(8)  # a has a multiple of so many columns: its rows are aligned to 16 bytes


Slopes = namedtuple("Slopes", "a d largest")
"""What d * a is made of: a [B P, K], whose rows are LEADING apart, d [B, K] in its dtype, divided by largest [] (or None for 1)."""


@triton.jit(do_not_specialize=["B"])
def outputs(x, head: Head, scratch: Scratch, a, B, config: Config):
    """Program i: a of BK classes, NS samples and BP positions of each, and what these add to the means of a^2, g [tiles of positions, B, K]."""
    lda: tl.constexpr = (config.K + LEADING - 1) // LEADING * LEADING
    columns: tl.constexpr = (config.K + config.BK - 1) // config.BK
    tiles: tl.constexpr = (config.P + config.BP - 1) // config.BP
    R: tl.constexpr = config.NS * config.BP
    k = tl.program_id(0) % columns * config.BK + tl.arange(0, config.BK)
    span = span_of(tl.program_id(0) // columns, config.BP, tiles, config)
    A = tl.zeros([config.BK, R], tl.float32)
    for c0 in range(0, config.C, config.BC):
        c = c0 + tl.arange(0, config.BC)
        tile = tile_at(span, span.start, c, B, config)
        X = tl.load(x + tile.at, mask=tile.mask, other=0.0)
        A = dot(class_weights(head, k, c, config), X, A, config.PRECISION)
    tile = tile_at(span, span.start, k, B, config)
    if head.bias is not None:
        A = tl.where(tile.row[None, :], A + class_bias(head, k, config)[:, None], 0.0)
    g = tl.sum(tl.reshape(A * A, [config.BK, config.NS, config.BP]), 2) / config.P
    n = span.first + tl.arange(0, config.NS)
    at = (span.part.to(tl.int64) * B + n) * config.K
    tl.store(scratch.g + at[None, :] + k[:, None], g, mask=(k < config.K)[:, None] & (n < B)[None, :])
    row = (span.first + tl.arange(0, R) // config.BP) * config.P + tile.p
    mask = (k < config.K)[:, None] & tile.row[None, :]
    tl.store(a + row[None, :] * lda + k[:, None], A.to(a.dtype.element_ty), mask=mask)


@triton.jit
def slopes_at(slopes: Slopes, start, end, k, config: Config, tile: Tile):
    """d * a of the R rows from `start` on and the classes k, [R, BK] in float32."""
    lda: tl.constexpr = (config.K + LEADING - 1) // LEADING * LEADING
    row = start + tl.arange(0, tile.R)
    mask = (row < end)[:, None] & (k < config.K)[None, :]
    a = tl.load(slopes.a + row[:, None] * lda + k[None, :], mask=mask, other=0.0)
    d = tl.load(slopes.d + (row // config.P)[:, None] * config.K + k[None, :], mask=mask, other=0.0)
    return a.to(tl.float32) * d.to(tl.float32)


@triton.jit
def factor(slopes: Slopes, config: Config):
    """2 / P, times what d was divided by."""
    scale = tl.full([], 2 / config.P, tl.float32)
    if slopes.largest is not None:
        scale *= tl.load(slopes.largest)
    return scale


@triton.jit(do_not_specialize=["rows"])
def input_gradient(slopes: Slopes, head: Head, grad_x, rows, ADD: tl.constexpr, tile: Tile, config: Config):
    """Program i: dL/dx of R rows and BC channels; ADD: added to what is there."""
    pieces: tl.constexpr = (tile.C + tile.BC - 1) // tile.BC
    c = tl.program_id(0) % pieces * tile.BC + tl.arange(0, tile.BC)
    start = (tl.program_id(0) // pieces).to(tl.int64) * tile.R
    grad = tl.zeros([tile.R, tile.BC], tl.float32)
    for k0 in range(0, config.K, config.BK):
        k = k0 + tl.arange(0, config.BK)
        e = slopes_at(slopes, start, rows, k, config, tile).to(slopes.a.dtype.element_ty)
        grad = dot(e, class_weights(head, k, c, config), grad, config.PRECISION)
    at, mask = epilogue.tile_at(start, rows, c, tile)
    grad = tl.trans(grad) * factor(slopes, config)
    if ADD:
        grad += tl.load(grad_x + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "share"])
def weight_gradient(slopes: Slopes, x, head: Head, weights, rows, share, tile: Tile, config: Config):
    """Program i: dL/dW of BC channels and BK classes from `share` tiles of R rows, and dL/dbeta; weights [parts, K C + K]."""
    pieces: tl.constexpr = (tile.C + tile.BC - 1) // tile.BC
    tiles: tl.constexpr = pieces * ((config.K + config.BK - 1) // config.BK)
    piece, part = tl.program_id(0) % pieces, tl.program_id(0) // tiles
    c = piece * tile.BC + tl.arange(0, tile.BC)
    k = tl.program_id(0) % tiles // pieces * config.BK + tl.arange(0, config.BK)
    start = part.to(tl.int64) * share * tile.R
    end = tl.minimum(start + share * tile.R, rows)
    grad = tl.zeros([tile.BC, config.BK], tl.float32)
    grad_bias = tl.zeros([config.BK], tl.float32)
    for r0 in range(0, share * tile.R, tile.R):
        at, mask = epilogue.tile_at(start + r0, end, c, tile)
        X = tl.load(x + at, mask=mask, other=0.0)
        e = slopes_at(slopes, start + r0, end, k, config, tile)
        grad = dot(X, e.to(X.dtype), grad, config.PRECISION)
        if head.bias is not None:
            grad_bias += tl.sum(e, 0)
    at = weights + part * (config.K * config.C + config.K)
    mask = (k < config.K)[None, :] & (c < config.C)[:, None]
    tl.store(at + k[None, :] * config.C + c[:, None], grad * factor(slopes, config), mask=mask)
    if (head.bias is not None) and (piece == 0):
        tl.store(at + config.K * config.C + k, grad_bias * factor(slopes, config), mask=k < config.K)


@functools.cache  # for good: a CUDA graph reads its matrices
def grid_of(cells, sizes, device):
    return Grid(cells, sizes, torch.float32, device)


class Products:
    """The launches above, in the place of the sweeps of `launch`, whose scratch and tiles they have."""

    def __init__(self, launch, grid_weight):
        x, C, P, K = launch.x, launch.config.C, launch.config.P, launch.config.K
        self.launch, self.rows, self.side = launch, launch.B * P, blocks.SIDE[x.element_size()]
        self.head = launch.head._replace(
            weight=launch.head.weight.to(x.dtype)
        )  # once, and not each time that a tile is loaded
        self.a = x.new_empty(self.rows, triton.cdiv(K, LEADING.value) * LEADING.value)
        self.grid = None if grid_weight is None else grid_of(grid_weight.shape[2:], x.shape[2:], x.device)
        self.pieces = -(-C // launch.blocks.HK)
        last = is_channels_last(x)
        self.tile = Tile(None, last, C, None if last else P, None, launch.blocks.HK)
        self.options = {"num_warps": launch.blocks.warps, "num_stages": launch.blocks.stages}

    def outputs(self):
        """Write g of the squares, by tile of positions."""
        launch, config = self.launch, self.launch.config
        programs = launch.groups * launch.tiles * -(-config.K // config.BK)
        outputs[programs,](launch.x, self.head, launch.scratch, self.a, launch.B, constants(config), **self.options)

    def means(self):
        """Means over cells [1, B, C, rows, columns]."""
        return self.grid.means(self.launch.x).contiguous()[None]

    def gradients(self, grad_x):
        """Write dL/dx, unless it is None, from d and dL/d(means); return dL/dW and dL/dbeta by program, [parts, K C + K]."""
        launch, config, b = self.launch, self.launch.config, self.launch.blocks
        d, largest = launch.scratch.d, None
        if self.a.dtype == torch.float16:  # d is about 1 / B: it is brought to 1 before it meets 5 bits of exponent
            largest = torch.linalg.vector_norm(d, float("inf")).clamp_min_(torch.finfo(torch.float32).tiny)
            d = d / largest
        slopes = Slopes(self.a, d.to(self.a.dtype), largest)
        if grad_x is not None:
            if self.grid is not None:
                self.grid.spread(launch.scratch.cells, grad_x)
            input_gradient[-(-self.rows // self.side) * self.pieces,](
                slopes, self.head, grad_x, self.rows, self.grid is not None, constants(self.tile._replace(R=self.side)),
                constants(config._replace(BK=b.BC)), **self.options,
            )  # fmt: skip
        tiles = self.pieces * -(-config.K // config.BK)
        share, parts = shares(-(-self.rows // b.BC), launch.processors // tiles, times=4)
        weights = launch.new(parts, config.K * config.C + config.K)
        weight_gradient[parts * tiles,](
            slopes, launch.x, self.head, weights, self.rows, share, constants(self.tile._replace(R=b.BC)), constants(config), **self.options
        )  # fmt: skip
        return weights
