"""Arguments that the goodness kernels share, and what all of them do with a tile.

A tile X is [BC, R] channels by rows; a row is one position of one sample, R = NS BP. There are masks at every edge, and offsets between samples
have 64 bits. Sizes of a sample are constants, so that the compiler knows which accesses are aligned to 16 bytes."""

from collections import namedtuple

import triton
import triton.language as tl

from fastff.kernels.triton import INTERPRETED as _interpreted
from fastff.kernels.triton.epilogue import Source, through_activation
from fastff.kernels.triton.normalization import between, joined, lane_counts, moments

INTERPRETED = tl.constexpr(_interpreted)


Result = namedtuple("Result", "grad_x normalized weights sums hidden")
"""What is written: grad_x (dL/dh with an epilogue) and the next input, as x, None where not wanted; and by program, to be added up:
weights [programs, K C + K] = dL/dW, dL/dbeta; with an epilogue sums [programs, 2 C] of dL/dh and dL/dh (y - mean) by channel; with a hidden layer
hidden [programs, M C] = dL/d(its weight)."""


Head = namedtuple("Head", "weight bias grid_weight hidden_weight")
"""weight [K, C], bias [K] or None, grid_weight [K, M, GH, GW] or None, hidden_weight [M, C] or None."""


Scratch = namedtuple("Scratch", "g d sums second mu means cells term z moments")
"""g [parts, B, K], d = dL/dg [B, K], sums [parts, 2, B] of x and of squares about the mean, or None; second [parts, B, C, C] = S and mu
[parts, B, C] of second_moment. Of the spatial term: means [parts, B, C, GH GW] over cells, cells [B, C, GH GW] = dL/d(means) and term
[chunks, B, K]; of its hidden layer: z [B, M, GH GW], what batch norm is applied to, and moments [groups of samples, 2, M]: sums of z and of
squares about the mean."""


Config = namedtuple(
    "Config",
    "C P H W K GH GW M CHANNELS_LAST NS BP BC BK BG LK ACTIVATION PRECISION HEAD_PRECISION CELL_PRECISION NORM WHOLE FIRST HEAD LOSS SECOND",
)
"""Constants of a kernel: channels, positions, rows and columns of a sample, classes, rows, columns and channels of the grid's weights, the layout of
x; sizes of tiles (blocks.py); the activation by number; input precision of the products with x, with float32 matrices and with cells; the
normalization by number; WHOLE: whether samples are not divided. Stages: FIRST sweep, HEAD (g from S and mu, of second_moment), LOSS (its number, or
None), SECOND sweep."""


Span = namedtuple("Span", "first part start end")
"""What a program works on at a time: NS samples from `first` on, and the part of their positions, start .. end - 1."""


Tile = namedtuple("Tile", "p row at mask")
"""Positions [R] and whether these rows exist, offsets [BC, R] in x and their mask."""


@triton.jit
def dot(a, b, c, PRECISION: tl.constexpr):
    """a @ b + c in float32 (c may be None). The interpreter's products of bfloat16 are wrong, those of what they widen to are not."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, c, input_precision=PRECISION)


@triton.jit
def class_weights(head: Head, k, c, config: Config):
    """Rows k of W, [BK, BC]."""
    mask = (k < config.K)[:, None] & (c < config.C)[None, :]
    return tl.load(head.weight + k[:, None] * config.C + c[None, :], mask=mask, other=0.0)


@triton.jit
def class_bias(head: Head, k, config: Config):
    """beta of the classes k, [BK] in float32."""
    return tl.load(head.bias + k, mask=k < config.K, other=0.0).to(tl.float32)


@triton.jit
def span_of(item, positions, parts, config: Config):
    """The Span of an item: group of samples item // parts, its positions from (item % parts) positions on."""
    start = item % parts * positions
    return Span((item // parts).to(tl.int64) * config.NS, item % parts, start, tl.minimum(start + positions, config.P))


@triton.jit
def tile_at(span: Span, p0, c, B, config: Config):
    """The Tile of the channels c and of a span's samples: BP positions of each from p0 on."""
    r = tl.arange(0, config.NS * config.BP)
    sample, p = span.first + r // config.BP, p0 + r % config.BP
    row = (sample < B) & (p < span.end)
    channel: tl.constexpr = 1 if config.CHANNELS_LAST else config.P
    position: tl.constexpr = config.C if config.CHANNELS_LAST else 1
    within = c[:, None] * channel + p[None, :] * position
    at = (sample * (config.C * config.P))[None, :] + within
    return Tile(p, row, at, (c < config.C)[:, None] & row[None, :])


@triton.jit
def add_moments(total, square, X, tile: Tile, seen, n):
    """Sums and squares about the mean by row, of `seen` numbers, with those of the n channels of a tile."""
    more, squares = moments(X.to(tl.float32), tile.mask, n, 0)
    square += tl.where(tile.row, squares + between(total, seen, more, n), 0.0)
    return total + more, square


@triton.jit
def of_samples(total, square, own, config: Config):
    """Sums and squares about the mean [NS] by sample, of which `own` positions were seen, from those by row."""
    lanes: tl.constexpr = [config.NS, config.BP]
    count = lane_counts(own, tl.arange(0, config.BP), config.BP)[None, :] * config.C
    return joined(tl.reshape(total, lanes), tl.reshape(square, lanes), count, own * config.C)


@triton.jit
def store_moments(scratch: Scratch, part, n, whole, squares, B):
    """Write sums[part]."""
    at = scratch.sums + part * 2 * B + n
    tl.store(at, whole, mask=n < B)
    tl.store(at + B, squares, mask=n < B)


@triton.jit
def load_moments(scratch: Scratch, n, B):
    """Read sums[0]."""
    return tl.load(scratch.sums + n, mask=n < B, other=0.0), tl.load(scratch.sums + B + n, mask=n < B, other=0.0)


@triton.jit
def rows(v, config: Config):
    """v [NS] for each row, [R]."""
    return tl.reshape(tl.broadcast_to(v[:, None], [config.NS, config.BP]), [config.NS * config.BP])


@triton.jit
def store_gradient(grad, tile: Tile, c, source: Source, result: Result, config: Config):
    """Go back through the activation and write the gradient of a tile. Returns it, and x - mean of an epilogue."""
    grad, off = through_activation(grad, source, tile.at, c, config.C, tile.mask, config.ACTIVATION)
    tl.store(result.grad_x + tile.at, grad.to(result.grad_x.dtype.element_ty), mask=tile.mask)
    return grad, off
