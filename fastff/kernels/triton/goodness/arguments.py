"""Arguments that the goodness kernels share, and how they load the head.

A tile X is [BC, R] channels by rows; a row is one position of one sample, R = NS BP. There are masks at every edge, and offsets between samples
have 64 bits."""

from collections import namedtuple

import triton
import triton.language as tl

from fastff.kernels.triton import INTERPRETED as _interpreted

INTERPRETED = tl.constexpr(_interpreted)


Result = namedtuple("Result", "grad_x normalized channel_sums sample_stride channel_stride position_stride")
"""What the second sweep writes: grad_x (dL/dh with an epilogue) and the next input, of one layout; channel_sums [programs, 2, C] of dL/dh
and of dL/dh (y - mean). None where not wanted."""


Head = namedtuple("Head", "weight bias")
"""weight [K, C], bias [K] or None."""


Scratch = namedtuple("Scratch", "g d sums second mu")
"""g [parts, B, K], d = dL/dg [B, K], sums [parts, 2, B] of x and of squares about the
mean; second [parts, B, C, C] = S and mu [parts, B, C] of second_moment."""


Shape = namedtuple("Shape", "B C P H W K")
"""Samples, channels, positions, rows and columns of a sample, classes."""


Config = namedtuple(
    "Config", "FIRST HEAD LOSS SECOND NORM ACTIVATION PRECISION HEAD_PRECISION CELL_PRECISION NS BP BC BK BG"
)
"""Constants of a kernel. Its stages: FIRST sweep, HEAD (g from S and mu, of second_moment), LOSS (its number, or None), SECOND sweep; NORM and
ACTIVATION by number; input precision of the products with x, with float32 matrices and with cells; sizes of tiles (blocks.py)."""


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32. The interpreter's products of bfloat16 are wrong, those of what they widen to are not."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def class_weights(head: Head, k, c, shape: Shape):
    """Rows k of W, [BK, BC]."""
    mask = (k < shape.K)[:, None] & (c < shape.C)[None, :]
    return tl.load(head.weight + k[:, None] * shape.C + c[None, :], mask=mask, other=0.0)


@triton.jit
def class_bias(head: Head, k, shape: Shape):
    """beta of the classes k, [BK] in float32."""
    return tl.load(head.bias + k, mask=k < shape.K, other=0.0).to(tl.float32)
