"""Arguments that the goodness kernels share, and how they load the head.

A tile X is [BC, R] channels by rows; a row is one position of one sample, R = NS BP. There are masks at every edge, and offsets between samples
have 64 bits."""

from typing import NamedTuple

import triton
import triton.language as tl

from fastff.kernels.triton import INTERPRETED as _interpreted

INTERPRETED = tl.constexpr(_interpreted)


class Result(NamedTuple):
    """What the second sweep writes: grad_x (dL/dh with an epilogue) and the next input, of one layout; channel_sums [programs, 2, C] of dL/dh
    and of dL/dh (y - mean). None where not wanted."""

    grad_x: object
    normalized: object
    channel_sums: object
    sample_stride: object
    channel_stride: object
    position_stride: object


class Head(NamedTuple):
    """weight [K, C], bias [K] or None."""

    weight: object
    bias: object


class Scratch(NamedTuple):
    """g [parts, B, K], d = dL/dg [B, K], sums [parts, 2, B] of x and x^2; second [parts, B, C, C] = S and mu [parts, B, C] of second_moment."""

    g: object
    d: object
    sums: object
    second: object
    mu: object


class Shape(NamedTuple):
    """Samples, channels, positions, rows and columns of a sample, classes."""

    B: object
    C: object
    P: object
    H: object
    W: object
    K: object


class Config(NamedTuple):
    """Constants of a kernel. Its stages: FIRST sweep, HEAD (g from S and mu, of second_moment), LOSS (its number, or None), SECOND sweep; NORM and
    ACTIVATION by number; input precision of the products with x, with float32 matrices and with cells; sizes of tiles (blocks.py)."""

    FIRST: object
    HEAD: object
    LOSS: object
    SECOND: object
    NORM: object
    ACTIVATION: object
    PRECISION: object
    HEAD_PRECISION: object
    CELL_PRECISION: object
    NS: object
    BP: object
    BC: object
    BK: object
    BG: object


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
