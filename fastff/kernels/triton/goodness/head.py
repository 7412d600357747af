"""Gradients of the head's weight and bias from d: partial sums over samples by program, added in a fixed order."""

import triton
import triton.language as tl

from fastff.kernels.triton.epilogue import Source, load_tile
from fastff.kernels.triton.goodness.arguments import Config, Head, Scratch, Shape, class_bias, class_weights, dot
from fastff.kernels.triton.goodness.direct import class_gradients


@triton.jit
def head_direct(
    source: Source, head: Head, scratch: Scratch, largest, grad_weight, grad_bias, shape: Shape, groups, share, config: Config
):  # fmt: skip
    """Program (i, j): dL/dW of BK classes, summed over tiles j share .. (j + 1) share - 1 of all groups of NS samples; grad_weight [parts, K, C],
    grad_bias [parts, K]. largest: max |d|, for float16 only."""
    R: tl.constexpr = config.NS * config.BP
    part = tl.program_id(1)
    k = tl.program_id(0) * config.BK + tl.arange(0, config.BK)
    c = tl.arange(0, config.BC)
    kind = source.x.dtype.element_ty
    w = class_weights(head, k, c, shape).to(kind)
    lift = 1.0
    if kind == tl.float16:
        lift = tl.load(largest)
        lift = tl.where(lift == 0, 1.0, lift)
    grad = tl.zeros([config.BK, config.BC], tl.float32)
    ones = tl.zeros([config.BK], tl.float32)
    tiles = tl.cdiv(shape.P, config.BP)
    for tile in range(part * share, tl.minimum((part + 1) * share, groups * tiles)):
        group = tile // tiles
        sample = group * config.NS + (tl.arange(0, R) // config.BP).to(tl.int64)
        p = (tile - group * tiles) * config.BP + tl.arange(0, R) % config.BP
        row = (sample < shape.B) & (p < shape.P)
        within = c[:, None] * source.channel_stride + p[None, :] * source.position_stride
        at = (sample * source.sample_stride)[None, :] + within
        X = load_tile(source, at, c, shape.C, (c < shape.C)[:, None] & row[None, :], config.ACTIVATION)
        a = dot(w, X, config.PRECISION)
        if head.bias is not None:
            a += class_bias(head, k, shape)[:, None]
        e = a * (class_gradients(scratch, sample, row, k, shape.K) / lift)
        grad += dot(e.to(kind), tl.trans(X), config.PRECISION)
        if head.bias is not None:
            ones += tl.sum(e, 1)
    at = (part.to(tl.int64) * shape.K + k[:, None]) * shape.C + c[None, :]
    mask = (k < shape.K)[:, None] & (c < shape.C)[None, :]
    tl.store(grad_weight + at, grad * (lift * 2 / shape.P), mask=mask)
    if head.bias is not None:
        tl.store(grad_bias + part * shape.K + k, ones * (lift * 2 / shape.P), mask=k < shape.K)


@triton.jit
def head_second_moment(head: Head, scratch: Scratch, grad_weight, shape: Shape, share, config: Config):
    """Program (i, j): 2 sum_b d[b, k] S_b w_k of BK classes over samples j share .. (j + 1) share - 1; grad_weight [parts, K, C]."""
    part = tl.program_id(1)
    C = shape.C
    k = tl.program_id(0) * config.BK + tl.arange(0, config.BK)
    c = tl.arange(0, config.BC)
    w = class_weights(head, k, c, shape).to(tl.float32)
    grad = tl.zeros([config.BK, config.BC], tl.float32)
    for b in range(part * share, tl.minimum((part + 1) * share, shape.B)):
        row = tl.zeros([], tl.int64) + b  # 64 bits: B C^2 may pass 2^31
        at = row * C * C + c[:, None] * C + c[None, :]
        S = tl.load(scratch.second + at, mask=(c < C)[:, None] & (c < C)[None, :], other=0.0)
        dk = tl.load(scratch.d + row * shape.K + k, mask=k < shape.K, other=0.0)
        grad += dot(w, S, config.HEAD_PRECISION) * dk[:, None]
    at = (part.to(tl.int64) * shape.K + k[:, None]) * C + c[None, :]
    tl.store(grad_weight + at, 2 * grad, mask=(k < shape.K)[:, None] & (c < C)[None, :])
