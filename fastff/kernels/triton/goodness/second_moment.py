"""The second-moment algorithm: S = X X^T / P, g = w^T S w + 2 beta (w . mu) + beta^2; dL/dx = (2/P)(M X + c), M = W^T diag(d) W.

A program takes samples as that of `direct` does, but dL/dW = 2 sum d[b] S_b w, whose K C numbers no program could hold, is a launch of its own
(`head_second_moment`), which reads S and not x."""

import triton
import triton.language as tl

from fastff.kernels.triton.epilogue import Norm, Source, load_tile, store_all_statistics, store_pair
from fastff.kernels.triton.goodness.arguments import (
    Config,
    Head,
    Result,
    Scratch,
    Span,
    add_moments,
    class_bias,
    class_weights,
    dot,
    load_moments,
    of_samples,
    rows,
    span_of,
    store_gradient,
    store_moments,
    tile_at,
)
from fastff.kernels.triton.goodness.grid import (
    add_term,
    cell_sums,
    hidden_inputs,
    load_cells,
    spread_cells,
    store_cells,
    store_means,
)
from fastff.kernels.triton.loss import LossArguments, losses_of
from fastff.kernels.triton.normalization import LAYER_NORM, NONE, store_normalized


@triton.jit
def square(c, config: Config):
    """Offsets and mask of [BC, BC] in a matrix [C, C]."""
    return c[:, None] * config.C + c[None, :], (c < config.C)[:, None] & (c < config.C)[None, :]


@triton.jit
def first_sweep(source: Source, head: Head, scratch: Scratch, span: Span, B, config: Config):
    """(S, mu) of a span, written too, with the moments of the sample and its means over cells."""
    c = tl.arange(0, config.BC)
    S = tl.zeros([config.BC, config.BC], tl.float32)
    m = tl.zeros([config.BC], tl.float32)
    total = tl.zeros([config.BP], tl.float32)
    squares = tl.zeros([config.BP], tl.float32)
    pooled = tl.zeros([config.BC, config.BG], tl.float32)
    for p0 in range(span.start, span.end, config.BP):
        tile = tile_at(span, p0, c, B, config)
        X = load_tile(source, tile.at, c, config.C, tile.mask, config.ACTIVATION)
        S = dot(X, tl.trans(X), S, config.PRECISION)
        total, squares = add_moments(total, squares, X, tile, (p0 - span.start) / config.BP * config.C, config.C * 1.0)
        if head.bias is not None:
            m += tl.sum(X.to(tl.float32), 1)
        if scratch.means is not None:
            pooled += cell_sums(X, tile.p, config)
    S /= config.P
    m /= config.P
    at, mask = square(c, config)
    own = span.part.to(tl.int64) * B + span.first
    tl.store(scratch.second + own * (config.C * config.C) + at, S, mask=mask)
    if head.bias is not None:
        tl.store(scratch.mu + own * config.C + c, m, mask=c < config.C)
    whole, around = of_samples(total, squares, tl.zeros([], tl.int32) + (span.end - span.start), config)
    store_moments(scratch, span.part, span.first + tl.arange(0, 1), whole, around, B)
    if scratch.means is not None:
        store_means(pooled, scratch, span, c, B, config)
    if scratch.z is not None:
        hidden_inputs(head, scratch, span.first, B, config)
    return S, m


@triton.jit
def load_second(head: Head, scratch: Scratch, b, config: Config):
    """(S, mu) of sample b."""
    c = tl.arange(0, config.BC)
    at, mask = square(c, config)
    S = tl.load(scratch.second + b * (config.C * config.C) + at, mask=mask, other=0.0)
    m = tl.zeros([config.BC], tl.float32)
    if head.bias is not None:
        m = tl.load(scratch.mu + b * config.C + c, mask=c < config.C, other=0.0)
    return S, m


@triton.jit
def store_goodness(S, m, head: Head, scratch: Scratch, b, config: Config):
    """Write g of sample b."""
    c = tl.arange(0, config.BC)
    for k0 in range(0, config.K, config.BK):
        k = k0 + tl.arange(0, config.BK)
        w = class_weights(head, k, c, config).to(tl.float32)
        goodness = tl.sum(dot(w, S, None, config.HEAD_PRECISION) * w, 1)
        if head.bias is not None:
            beta = class_bias(head, k, config)
            goodness += beta * (2 * tl.sum(w * m[None, :], 1) + beta)
        tl.store(scratch.g + b * config.K + k, goodness, mask=k < config.K)


@triton.jit
def gradient_matrix(head: Head, scratch: Scratch, b, config: Config):
    """M = W^T diag(d) W of sample b, and c = W^T (d beta)."""
    c = tl.arange(0, config.BC)
    M = tl.zeros([config.BC, config.BC], tl.float32)
    constant = tl.zeros([config.BC], tl.float32)
    for k0 in range(0, config.K, config.BK):
        k = k0 + tl.arange(0, config.BK)
        w = class_weights(head, k, c, config).to(tl.float32)
        dk = tl.load(scratch.d + b * config.K + k, mask=k < config.K, other=0.0)
        M = dot(tl.trans(w * dk[:, None]), w, M, config.HEAD_PRECISION)
        if head.bias is not None:
            constant += tl.sum(w * (dk * class_bias(head, k, config))[:, None], 0)
    return M, constant


@triton.jit
def second_sweep(source: Source, result: Result, head: Head, scratch: Scratch, span: Span, B, eps, config: Config):
    """Write the gradient and the next input from d and the moments. Returns the sums of dL/dh and dL/dh (y - mean) by channel."""
    b, c = span.first, tl.arange(0, config.BC)
    kind = source.x.dtype.element_ty
    mean = tl.zeros([config.BP], tl.float32)
    rstd = mean
    if config.NORM == LAYER_NORM:
        whole, around = load_moments(scratch, b + tl.arange(0, 1), B)
        mean = rows(whole / (config.C * config.P), config)
        rstd = rows(1 / tl.sqrt(around / (config.C * config.P) + eps), config)
    if result.grad_x is not None:
        M, constant = gradient_matrix(head, scratch, b, config)
        largest = 1.0
        if kind == tl.float16:  # M is about |w|^2 / B: it is brought to 1 before it meets 5 bits of exponent
            largest = tl.max(tl.abs(M))
            largest = tl.where(largest == 0, 1.0, largest)
            M /= largest
        narrow = M.to(kind)
    first_sum = tl.zeros([config.BC], tl.float32)
    second_sum = tl.zeros([config.BC], tl.float32)
    if scratch.cells is not None:
        cells = load_cells(scratch, b, c, B, config)
    for p0 in range(span.start, span.end, config.BP):
        tile = tile_at(span, p0, c, B, config)
        X = load_tile(source, tile.at, c, config.C, tile.mask, config.ACTIVATION)
        if result.grad_x is not None:
            grad = (dot(narrow, X, None, config.PRECISION) * largest + constant[:, None]) * (2 / config.P)
            if scratch.cells is not None:
                grad += spread_cells(cells, tile.p, config)
            grad, off = store_gradient(grad, tile, c, source, result, config)
            if source.affine is not None:
                first_sum += tl.sum(grad, 1)
                second_sum += tl.sum(grad * off, 1)
        if config.NORM != NONE:
            store_normalized(X, result.normalized, tile.at, tile.mask, mean, rstd, config.C, eps, config.NORM)
    return first_sum, second_sum


@triton.jit(do_not_specialize=["B", "norm_parts", "norm_share"])
def second_moment(
    source: Source, norm: Norm, head: Head, scratch: Scratch, result: Result, loss: LossArguments, B, positions, parts, norm_parts, norm_share,
    eps, config: Config,
):  # fmt: skip
    """Program i: samples, or parts of `positions` positions of them, i, i + programs, ... FIRST sweeps for S and mu; HEAD computes g from them, with
    several parts in a launch of its own, after their sum."""
    if config.FIRST and (source.affine is not None):
        store_all_statistics(norm, config.C, norm_parts, norm_share, B.to(tl.int64) * config.P)
    c = tl.arange(0, config.BC)
    first_sum = tl.zeros([config.BC], tl.float32)
    second_sum = tl.zeros([config.BC], tl.float32)
    for item in range(tl.program_id(0), B * parts, tl.num_programs(0)):
        span = span_of(item, positions, parts, config)
        if config.WHOLE:
            span = Span(span.first, span.part, 0, config.P)
        b = span.first
        if config.FIRST:
            S, m = first_sweep(source, head, scratch, span, B, config)
        if config.HEAD:
            if not config.FIRST:
                S, m = load_second(head, scratch, b, config)
            store_goodness(S, m, head, scratch, b, config)
        if config.LOSS is not None:
            n = b + tl.arange(0, 1)
            if scratch.means is not None:
                add_term(head, scratch, b, config)
            tl.debug_barrier()  # other threads wrote g, and will read d
            losses_of(scratch.g, scratch.d, loss, n, B, config.K, config.LOSS, 1, config.LK)
            tl.debug_barrier()
            if scratch.cells is not None:
                store_cells(head, scratch, b, config)
        if config.SECOND:
            more, product = second_sweep(source, result, head, scratch, span, B, eps, config)
            first_sum += more
            second_sum += product
    if config.SECOND and (source.affine is not None):
        store_pair(result.sums, tl.program_id(0), first_sum, second_sum, c, config.C)


@triton.jit(do_not_specialize=["B", "share"])
def head_second_moment(head: Head, scratch: Scratch, weights, B, share, config: Config):
    """Program (i, j): dL/dW = 2 sum_b d[b, k] (S_b w_k + beta_k mu_b) and dL/dbeta of BK classes over samples j share .. (j + 1) share - 1;
    weights [parts, K C + K]."""
    part = tl.program_id(1)
    k = tl.program_id(0) * config.BK + tl.arange(0, config.BK)
    c = tl.arange(0, config.BC)
    w = class_weights(head, k, c, config).to(tl.float32)
    grad = tl.zeros([config.BK, config.BC], tl.float32)
    grad_bias = tl.zeros([config.BK], tl.float32)
    for b in range(part * share, tl.minimum((part + 1) * share, B)):
        row = tl.zeros([], tl.int64) + b  # 64 bits: B C^2 may pass 2^31
        S, m = load_second(head, scratch, row, config)
        dk = tl.load(scratch.d + row * config.K + k, mask=k < config.K, other=0.0)
        grad += dot(w, S, None, config.HEAD_PRECISION) * dk[:, None]
        if head.bias is not None:
            beta = class_bias(head, k, config)
            grad += (dk * beta)[:, None] * m[None, :]
            grad_bias += dk * (tl.sum(w * m[None, :], 1) + beta)
    at = weights + part * (config.K * config.C + config.K)
    mask = (k < config.K)[:, None] & (c < config.C)[None, :]
    tl.store(at + k[:, None] * config.C + c[None, :], 2 * grad, mask=mask)
    if head.bias is not None:
        tl.store(at + config.K * config.C + k, 2 * grad_bias, mask=k < config.K)
