"""Goodness, its loss and its local gradient as Triton kernels that own whole samples.

One launch for a batch (no spatial term, enough samples to fill the GPU): a program reads its samples once from device memory, computes
goodness, the loss and d, and goes over them a second time, out of the L2 cache, for the gradient and the layer-normalised next input.

    first sweep    direct: a = W X by tiles, g = mean a^2        second moment: S = X X^T / P, g = w^T S w + 2 beta (w . mu) + beta^2
    loss           from g of the program's samples: loss, d = dL/dg, dL/dtau
    second sweep   direct: dL/dx = (2/P) W^T (d * a), a recomputed   second moment: dL/dx = (2/P)(M X + c), M = W^T diag(d) W
    head           a second, small launch: dL/dW (and dL/dbeta), partial sums over groups of samples, added in a fixed order

The same kernels run in pieces where a piece needs the whole batch between the sweeps: with the spatial term (its [B, C G^2] x [C G^2, K]
product is cuBLAS's), and with few large samples, which several programs share (partial sums again added in a fixed order). No floating-point
atomics: the same input gives the same bits.

Bytes: x read twice (the second time mostly from L2), dL/dx and the next input written once; the floor is three times x. Products: direct
5 P C K multiply-adds a sample (a three times), second moment 2 P C^2 + 3 K C^2. float32 accumulation; float32 products in TF32 only where
torch.backends.cuda.matmul.allow_tf32 says so, S and M of 16-bit inputs in TF32. kernel sizes 3 and 5, and the spatial term without squares,
are not fused: they run on composed/goodness.py, whose convolutions are cuDNN's.

Never run on a GPU yet: interpreted and compiled ahead of time only (tests/test_triton.py).
"""

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastff.kernels.composed import goodness as composed
from fastff.kernels.composed.goodness import empty_like, is_rows

SECOND_MOMENT_CHANNELS = 128  # S [C, C] lives in registers
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    """a @ b in float32. The interpreter's products of bfloat16 are wrong, those of what they widen to are not."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _loss_of(
    g,
    d,
    target,
    loss,
    dtau,
    tau,
    tau_factor,
    margin,
    smoothing,
    scale,
    scale_factor,
    n,
    B,
    K,
    NS: tl.constexpr,
    BK: tl.constexpr,
):
    """loss, dL/dtau (where there is a pointer for it) and d = dL/dg of the samples n [NS], from g. Online softmax over tiles of K.

    A label outside 0..K-1 makes its sample's loss NaN."""
    valid = n < B
    t = tl.load(target + n, mask=valid, other=0)
    if tau_factor is not None:
        tau *= tl.load(tau_factor).to(tl.float32)
    if scale_factor is not None:
        scale *= tl.load(scale_factor).to(tl.float32)
    top = tl.full([NS], float("-inf"), tl.float32)
    total = tl.zeros([NS], tl.float32)
    hit_u = tl.zeros([NS], tl.float32)
    sum_u = tl.zeros([NS], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        known = (k < K)[None, :]
        hit = k[None, :] == t[:, None]
        gk = tl.load(g + n[:, None] * K + k[None, :], mask=valid[:, None] & known, other=0.0)
        u = gk * tau - tl.where(hit, margin, 0.0)
        masked = tl.where(known, u, float("-inf"))
        new = tl.maximum(top, tl.max(masked, 1))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(masked - new[:, None]), 1)
        top = new
        hit_u += tl.sum(tl.where(hit, u, 0.0), 1)
        sum_u += tl.sum(tl.where(known, u, 0.0), 1)
    lse = top + tl.log(total)
    value = lse - (1 - smoothing) * hit_u - smoothing / K * sum_u
    value = tl.where((t >= 0) & (t < K), value, float("nan"))
    tl.store(loss + n, value, mask=valid)
    grad_tau = tl.zeros([NS], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        known = valid[:, None] & (k < K)[None, :]
        hit = k[None, :] == t[:, None]
        gk = tl.load(g + n[:, None] * K + k[None, :], mask=known, other=0.0)
        u = gk * tau - tl.where(hit, margin, 0.0)
        q = tl.where(hit, 1 - smoothing, 0.0) + smoothing / K
        dk = (tl.exp(u - lse[:, None]) - q) * scale
        grad_tau += tl.sum(tl.where(known, dk * gk, 0.0), 1)
        tl.store(d + n[:, None] * K + k[None, :], dk * tau, mask=known)
    if dtau is not None:
        tl.store(dtau + n, grad_tau, mask=valid)


@triton.jit
def _members(p, P, col, H, W, GH, GW, NS: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr, R: tl.constexpr):
    """Whether row r (sample r // BP, position p[r]) lies in cell col % BG of sample col // BG; [R, NS * BG], and 1 / |cell| [NS * BG].

    Cells have the edges of adaptive average pooling, [i H // GH, ceil((i + 1) H / GH)), so they overlap where G does not divide."""
    cell = col % BG
    i, j = cell // GW, cell % GW
    top, bottom = i * H // GH, ((i + 1) * H + GH - 1) // GH
    left, right = j * W // GW, ((j + 1) * W + GW - 1) // GW
    row, column = (p // W)[:, None], (p % W)[:, None]
    inside = (row >= top[None, :]) & (row < bottom[None, :]) & (column >= left[None, :]) & (column < right[None, :])
    same = (tl.arange(0, R) // BP)[:, None] == (col // BG)[None, :]
    exists = (cell < GH * GW)[None, :] & (p < P)[:, None]
    area = tl.maximum((bottom - top) * (right - left), 1).to(tl.float32)
    return inside & same & exists, 1 / area


@triton.jit
def _next_input(X, y, at, mask, mean, rstd, C, eps, NORM: tl.constexpr):
    """Write the normalised tile: over the sample (mean, rstd given by row) or over the channels of each position."""
    wide = X.to(tl.float32)
    if NORM == 2:
        mean = tl.sum(wide, 0) / C
        off = tl.where(mask, wide - mean[None, :], 0.0)
        rstd = 1 / tl.sqrt(tl.sum(off * off, 0) / C + eps)
    tl.store(y + at, ((wide - mean[None, :]) * rstd[None, :]).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _statistics(sums, n, B, n_elements, shift, eps):
    """Mean and 1 / deviation of samples n from the sums of x - shift and its square, sums [2, B]."""
    total = tl.load(sums + n, mask=n < B, other=0.0)
    square = tl.load(sums + B + n, mask=n < B, other=0.0)
    mean = total / n_elements
    variance = tl.maximum(square / n_elements - mean * mean, 0.0)
    return mean + shift, 1 / tl.sqrt(variance + eps)


@triton.jit
def direct(
    x, weight, bias, g, d, grad_x, y, sums, means, cells, target, loss, dtau, tau_factor, scale_factor,
    B, C, P, H, W, K, GH, GW, positions, xb, xc, xp, ob, oc, op, tau, margin, smoothing, scale, eps,
    FIRST: tl.constexpr, LOSS: tl.constexpr, SECOND: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    NS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Program (i, j): samples i NS .. i NS + NS - 1, positions j * positions and on. A row of its tiles is one position of one sample.

    x [B, C, P] by strides xb, xc, xp; grad_x and y by ob, oc, op; weight [K, C]; g [parts, B, K], d [B, K], sums [parts, 2, B],
    means [parts, B, C, GH GW] (sums over cells in fact), cells [B, C, GH GW] = d V."""
    R: tl.constexpr = NS * BP
    part = tl.program_id(1)
    first = tl.program_id(0).to(tl.int64) * NS
    n = first + tl.arange(0, NS)
    sample = first + tl.arange(0, R) // BP
    here = sample < B
    c = tl.arange(0, BC)
    has_c = c < C
    start = part * positions
    end = tl.minimum(start + positions, P)
    kind = x.dtype.element_ty
    base = sample * xb
    shift = tl.load(x + base, mask=here, other=0.0).to(tl.float32)
    if FIRST:
        total = tl.zeros([NS], tl.float32)
        square = tl.zeros([NS], tl.float32)
        if means is not None:
            col = tl.arange(0, NS * BG)
            pooled = tl.zeros([BC, NS * BG], tl.float32)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            w = tl.load(weight + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & has_c[None, :], other=0.0).to(
                kind
            )
            goodness = tl.zeros([BK, NS], tl.float32)
            for p0 in range(start, end, BP):
                p = p0 + tl.arange(0, R) % BP
                row = here & (p < end)
                mask = has_c[:, None] & row[None, :]
                X = tl.load(x + base[None, :] + (c[:, None] * xc + p[None, :] * xp), mask=mask, other=0.0)
                a = _dot(w, X, PRECISION)
                if bias is not None:
                    beta = tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)
                    a = tl.where(row[None, :], a + beta[:, None], 0.0)
                goodness += tl.sum(tl.reshape(a * a, [BK, NS, BP]), 2)
                if k0 == 0:
                    off = tl.where(mask, X.to(tl.float32) - shift[None, :], 0.0)
                    total += tl.sum(tl.reshape(tl.sum(off, 0), [NS, BP]), 1)
                    square += tl.sum(tl.reshape(tl.sum(off * off, 0), [NS, BP]), 1)
                    if means is not None:
                        inside, _ = _members(p, P, col, H, W, GH, GW, NS, BP, BG, R)
                        pooled += _dot(X, inside.to(tl.float32).to(kind), PRECISION)
            at = part.to(tl.int64) * B * K + n[None, :] * K + k[:, None]
            tl.store(g + at, goodness / P, mask=(n < B)[None, :] & (k < K)[:, None])
        tl.store(sums + part * 2 * B + n, total, mask=n < B)
        tl.store(sums + part * 2 * B + B + n, square, mask=n < B)
        if means is not None:
            cell = col % BG
            owner = first + col // BG
            at = ((part.to(tl.int64) * B + owner[None, :]) * C + c[:, None]) * (GH * GW) + cell[None, :]
            tl.store(means + at, pooled, mask=has_c[:, None] & ((owner < B) & (cell < GH * GW))[None, :])
    if LOSS:
        if FIRST:
            tl.debug_barrier()  # g was written by other threads of this program
        _loss_of(g, d, target, loss, dtau, tau, tau_factor, margin, smoothing, scale, scale_factor, n, B, K, NS, BK)
        tl.debug_barrier()
    if SECOND:
        if FIRST:
            tl.debug_barrier()
        mean, rstd = shift, shift
        if NORM == 1:
            mean, rstd = _statistics(sums, sample, B, C * P, shift, eps)
        largest = tl.full([R], 1.0, tl.float32)
        if kind == tl.float16:  # d is about 1 / B: brought to 1 before it meets 5 bits of exponent
            largest = tl.zeros([R], tl.float32)
            for k0 in range(0, K, BK):
                k = k0 + tl.arange(0, BK)
                dk = tl.load(d + sample[None, :] * K + k[:, None], mask=here[None, :] & (k < K)[:, None], other=0.0)
                largest = tl.maximum(largest, tl.max(tl.abs(dk), 0))
            largest = tl.where(largest == 0, 1.0, largest)
        for p0 in range(start, end, BP):
            p = p0 + tl.arange(0, R) % BP
            row = here & (p < end)
            mask = has_c[:, None] & row[None, :]
            X = tl.load(x + base[None, :] + (c[:, None] * xc + p[None, :] * xp), mask=mask, other=0.0)
            at = (sample * ob)[None, :] + (c[:, None] * oc + p[None, :] * op)
            if grad_x is not None:
                grad = tl.zeros([BC, R], tl.float32)
                for k0 in range(0, K, BK):
                    k = k0 + tl.arange(0, BK)
                    w = tl.load(
                        weight + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & has_c[None, :], other=0.0
                    ).to(kind)
                    a = _dot(w, X, PRECISION)
                    if bias is not None:
                        a += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[:, None]
                    dk = tl.load(d + sample[None, :] * K + k[:, None], mask=row[None, :] & (k < K)[:, None], other=0.0)
                    if kind == tl.float16:
                        dk /= largest[None, :]
                    grad += _dot(tl.trans(w), (a * dk).to(kind), PRECISION)
                grad *= 2 / P
                if kind == tl.float16:
                    grad *= largest[None, :]
                if cells is not None:
                    col = tl.arange(0, NS * BG)
                    inside, share = _members(p, P, col, H, W, GH, GW, NS, BP, BG, R)
                    owner = first + col // BG
                    seen = has_c[:, None] & ((owner < B) & (col % BG < GH * GW))[None, :]
                    cell = tl.load(
                        cells + (owner[None, :] * C + c[:, None]) * (GH * GW) + (col % BG)[None, :],
                        mask=seen,
                        other=0.0,
                    )
                    grad += _dot(
                        cell * share[None, :],
                        tl.trans(inside.to(tl.float32)),
                        "tf32" if kind != tl.float32 else "tf32x3",
                    )
                tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=mask)
            if NORM > 0:
                _next_input(X, y, at, mask, mean, rstd, C, eps, NORM)


@triton.jit
def second_moment(
    x, weight, bias, g, d, second, mu, grad_x, y, sums, means, cells, target, loss, dtau, tau_factor, scale_factor,
    B, C, P, H, W, K, GH, GW, positions, xb, xc, xp, ob, oc, op, tau, margin, smoothing, scale, eps,
    FIRST: tl.constexpr, HEAD: tl.constexpr, LOSS: tl.constexpr, SECOND: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_PRECISION: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Program (b, j): sample b, positions j * positions and on. second [parts, B, C, C] = S, mu [parts, B, C]; the rest as in `direct`.

    FIRST sweeps for S and mu, HEAD computes g from them; with several parts a launch of its own, after their sum."""
    part = tl.program_id(1)
    b = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    has_c = c < C
    start = part * positions
    end = tl.minimum(start + positions, P)
    kind = x.dtype.element_ty
    base = x + b * xb
    square_at = c[:, None] * C + c[None, :]
    square_mask = has_c[:, None] & has_c[None, :]
    shift = tl.load(base).to(tl.float32)
    if FIRST:
        S = tl.zeros([BC, BC], tl.float32)
        m = tl.zeros([BC], tl.float32)
        total = tl.zeros([BC], tl.float32)
        square = tl.zeros([BC], tl.float32)
        if means is not None:
            cell = tl.arange(0, BG)
            pooled = tl.zeros([BC, BG], tl.float32)
        for p0 in range(start, end, BP):
            p = p0 + tl.arange(0, BP)
            mask = has_c[:, None] & (p < end)[None, :]
            X = tl.load(base + (c[:, None] * xc + p[None, :] * xp), mask=mask, other=0.0)
            S += _dot(X, tl.trans(X), PRECISION)
            wide = X.to(tl.float32)
            off = tl.where(mask, wide - shift, 0.0)
            total += tl.sum(off, 1)
            square += tl.sum(off * off, 1)
            if bias is not None:
                m += tl.sum(wide, 1)
            if means is not None:
                inside, _ = _members(p, P, cell, H, W, GH, GW, 1, BP, BG, BP)
                pooled += _dot(X, inside.to(tl.float32).to(kind), PRECISION)
        S /= P
        m /= P
        own = part.to(tl.int64) * B + b
        tl.store(second + own * C * C + square_at, S, mask=square_mask)
        if bias is not None:
            tl.store(mu + own * C + c, m, mask=has_c)
        tl.store(sums + part * 2 * B + b, tl.sum(total, 0))
        tl.store(sums + part * 2 * B + B + b, tl.sum(square, 0))
        if means is not None:
            at = (own * C + c[:, None]) * (GH * GW) + cell[None, :]
            tl.store(means + at, pooled, mask=has_c[:, None] & (cell < GH * GW)[None, :])
    if HEAD:
        if not FIRST:
            S = tl.load(second + b * C * C + square_at, mask=square_mask, other=0.0)
            m = tl.zeros([BC], tl.float32)
            if bias is not None:
                m = tl.load(mu + b * C + c, mask=has_c, other=0.0)
        for k0 in range(0, K, BK):
            k = k0 + tl.arange(0, BK)
            w = tl.load(weight + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & has_c[None, :], other=0.0).to(
                tl.float32
            )
            goodness = tl.sum(_dot(w, S, HEAD_PRECISION) * w, 1)
            if bias is not None:
                beta = tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)
                goodness += beta * (2 * tl.sum(w * m[None, :], 1) + beta)
            tl.store(g + b * K + k, goodness, mask=k < K)
    if LOSS:
        if HEAD:
            tl.debug_barrier()
        n = b + tl.arange(0, 1)
        _loss_of(g, d, target, loss, dtau, tau, tau_factor, margin, smoothing, scale, scale_factor, n, B, K, 1, BK)
        tl.debug_barrier()
    if SECOND:
        if FIRST:
            tl.debug_barrier()
        mean, rstd = shift, shift
        if NORM == 1:
            mean, rstd = _statistics(sums, b, B, C * P, shift, eps)
        if grad_x is not None:
            M = tl.zeros([BC, BC], tl.float32)
            constant = tl.zeros([BC], tl.float32)
            for k0 in range(0, K, BK):
                k = k0 + tl.arange(0, BK)
                w = tl.load(weight + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & has_c[None, :], other=0.0).to(
                    tl.float32
                )
                dk = tl.load(d + b * K + k, mask=k < K, other=0.0)
                M += _dot(tl.trans(w * dk[:, None]), w, HEAD_PRECISION)
                if bias is not None:
                    beta = tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)
                    constant += tl.sum(w * (dk * beta)[:, None], 0)
            largest = 1.0
            if kind == tl.float16:  # M is about |w|^2 / B
                largest = tl.max(tl.max(tl.abs(M), 1), 0)
                largest = tl.where(largest == 0, 1.0, largest)
                M /= largest
            narrow = M.to(kind)
        for p0 in range(start, end, BP):
            p = p0 + tl.arange(0, BP)
            mask = has_c[:, None] & (p < end)[None, :]
            X = tl.load(base + (c[:, None] * xc + p[None, :] * xp), mask=mask, other=0.0)
            at = b * ob + (c[:, None] * oc + p[None, :] * op)
            if grad_x is not None:
                grad = (_dot(narrow, X, PRECISION) * largest + constant[:, None]) * (2 / P)
                if cells is not None:
                    cell = tl.arange(0, BG)
                    inside, share = _members(p, P, cell, H, W, GH, GW, 1, BP, BG, BP)
                    seen = has_c[:, None] & (cell < GH * GW)[None, :]
                    spread = tl.load(cells + (b * C + c[:, None]) * (GH * GW) + cell[None, :], mask=seen, other=0.0)
                    grad += _dot(
                        spread * share[None, :],
                        tl.trans(inside.to(tl.float32)),
                        "tf32" if kind != tl.float32 else "tf32x3",
                    )
                tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=mask)
            if NORM > 0:
                row = tl.zeros([BP], tl.float32)
                _next_input(X, y, at, mask, row + mean, row + rstd, C, eps, NORM)


@triton.jit
def loss_kernel(
    g, d, target, loss, dtau, tau_factor, scale_factor, B, K, tau, margin, smoothing, scale, NS: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Loss and d of NS samples a program, where the sweeps run apart."""
    n = tl.program_id(0).to(tl.int64) * NS + tl.arange(0, NS)
    _loss_of(g, d, target, loss, dtau, tau, tau_factor, margin, smoothing, scale, scale_factor, n, B, K, NS, BK)


@triton.jit
def head_direct(
    x, weight, bias, d, largest, grad_weight, grad_bias, B, C, P, K, groups, share, xb, xc, xp,
    PRECISION: tl.constexpr, NS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (i, j): dL/dW of BK classes, summed over groups j share .. (j + 1) share - 1 of NS samples; grad_weight [parts, K, C],
    grad_bias [parts, K]. largest: max |d|, for float16 only."""
    R: tl.constexpr = NS * BP
    part = tl.program_id(1)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    c = tl.arange(0, BC)
    has_c = c < C
    kind = x.dtype.element_ty
    w = tl.load(weight + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & has_c[None, :], other=0.0).to(kind)
    lift = 1.0
    if kind == tl.float16:
        lift = tl.load(largest)
        lift = tl.where(lift == 0, 1.0, lift)
    grad = tl.zeros([BK, BC], tl.float32)
    ones = tl.zeros([BK], tl.float32)
    for group in range(part * share, tl.minimum((part + 1) * share, groups)):
        sample = group * NS + (tl.arange(0, R) // BP).to(tl.int64)
        for p0 in range(0, P, BP):
            p = p0 + tl.arange(0, R) % BP
            row = (sample < B) & (p < P)
            X = tl.load(
                x + (sample * xb)[None, :] + (c[:, None] * xc + p[None, :] * xp),
                mask=has_c[:, None] & row[None, :],
                other=0.0,
            )
            a = _dot(w, X, PRECISION)
            if bias is not None:
                a += tl.load(bias + k, mask=k < K, other=0.0).to(tl.float32)[:, None]
            dk = tl.load(d + sample[None, :] * K + k[:, None], mask=row[None, :] & (k < K)[:, None], other=0.0)
            e = a * (dk / lift)
            grad += _dot(e.to(kind), tl.trans(X), PRECISION)
            if bias is not None:
                ones += tl.sum(e, 1)
    at = (part.to(tl.int64) * K + k[:, None]) * C + c[None, :]
    tl.store(grad_weight + at, grad * (lift * 2 / P), mask=(k < K)[:, None] & has_c[None, :])
    if bias is not None:
        tl.store(grad_bias + part * K + k, ones * (lift * 2 / P), mask=k < K)


@triton.jit
def head_second_moment(
    weight, d, second, grad_weight, B, C, K, share, PRECISION: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Program (i, j): 2 sum_b d[b, k] S_b w_k of BK classes over samples j share .. (j + 1) share - 1; grad_weight [parts, K, C]."""
    part = tl.program_id(1)
    k = tl.program_id(0) * BK + tl.arange(0, BK)
    c = tl.arange(0, BC)
    mask = (k < K)[:, None] & (c < C)[None, :]
    w = tl.load(weight + k[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    grad = tl.zeros([BK, BC], tl.float32)
    for b in range(part * share, tl.minimum((part + 1) * share, B)):
        row = tl.zeros([], tl.int64) + b  # 64 bits: B C^2 may pass 2^31
        at = row * C * C + c[:, None] * C + c[None, :]
        S = tl.load(second + at, mask=(c < C)[:, None] & (c < C)[None, :], other=0.0)
        dk = tl.load(d + row * K + k, mask=k < K, other=0.0)
        grad += _dot(w, S, PRECISION) * dk[:, None]
    at = (part.to(tl.int64) * K + k[:, None]) * C + c[None, :]
    tl.store(grad_weight + at, 2 * grad, mask=mask)


class Blocks(NamedTuple):
    """Sizes of a launch: samples, positions, channels and classes of a tile, cells of the grid, warps of the sweeps and of the head."""

    NS: int
    BP: int
    BC: int
    BK: int
    BG: int
    warps: int
    head_warps: int


def blocks(algorithm, B, C, P, K, cells, itemsize):
    """The heuristic table, for 64 K registers and 160 KiB of shared memory (sm_80, 90, 100); tests/test_triton.py compiles all of it.

    Direct holds a tile X [BC, R] in shared memory and its gradient [BC, R] in registers, with one [BK, BC] of W at a time; R is what leaves no
    spill. 16 bits: 16 K elements, on tensor cores; 16 positions and twice the warps from BC = 512 on. float32: products are FMA, whose
    operands take registers too: 4 K elements, BC <= 256.
    Second moment holds S or M [BC, BC] in registers: at BC = 128 that is 128 a thread with 4 warps, so it has 8 (16 in float32)."""
    narrow = itemsize == 2
    BC = max(16, triton.next_power_of_2(C))
    most = triton.next_power_of_2(P)
    BG = max(16, triton.next_power_of_2(cells)) if cells else 16
    if algorithm == "second_moment":
        warps = (8 if BC > 64 else 4) * (1 if narrow else 2)
        return Blocks(
            1, min(max(16, most), 64 if narrow and not cells else 32), BC, 16 if BC > 64 else 32, BG, warps, warps
        )
    R = max(16, min(64, (16384 if narrow and BC < 512 else 4096) // BC))
    BP = min(R, most)
    NS = max(R // BP, 1)
    while NS > 1 and NS * BP > 16 and NS // 2 >= B:
        NS //= 2
    if cells:  # the grid's products have NS BG columns
        NS = min(NS, max(1, 16 // BP, 64 // BG))
    BK = min(max(16, triton.next_power_of_2(K)), 32 if BC <= 128 and narrow else 16)
    warps = 16 if BC > 256 else 8 if BC > 128 or not narrow else 4
    return Blocks(NS, BP, BC, BK, BG, warps, warps if narrow else 4)


class _Launch:
    """One batch through the kernels above: buffers, block sizes, and the launches in order."""

    def __init__(self, x, weight, bias, grid_weight, how):
        self.x = x if is_rows(x) else x.contiguous()
        B, C, H, W = x.shape
        self.P, self.K = H * W, len(weight)
        self.weight, self.bias = weight.flatten(1).contiguous(), None if bias is None else bias.contiguous()
        self.grid_weight, self.second_moment = grid_weight, how.algorithm == "second_moment"
        self.G = (
            (0, 0)
            if grid_weight is None
            else tuple(min(n, g) for n, g in zip((H, W), grid_weight.shape[2:], strict=True))
        )
        self.blocks = blocks(how.algorithm, B, C, self.P, self.K, self.G[0] * self.G[1], x.element_size())
        self.groups = -(-B // self.blocks.NS)
        self.positions, self.parts = self._parts()
        self.fused = self.parts == 1 and grid_weight is None
        exact = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
        self.precision = {"PRECISION": exact if x.dtype == torch.float32 else "tf32"}
        self.g, self.d = self._new(B, self.K), self._new(B, self.K)
        self.sums = self._new(self.parts, 2, B)
        self.means = None if grid_weight is None else self._new(self.parts, B, C, self.G[0] * self.G[1])
        self.second = self._new(self.parts, B, C, C) if self.second_moment else None
        self.mu = self._new(self.parts, B, C) if self.second_moment and bias is not None else None

    def _new(self, *shape):
        return torch.empty(shape, device=self.x.device, dtype=torch.float32)

    def _parts(self):
        """(positions of a program, programs a sample): several where samples alone do not fill two programs a multiprocessor."""
        tiles = -(-self.P // self.blocks.BP)
        wanted = max(1, 2 * _multiprocessors(self.x.device) // max(1, self.groups))
        each = -(-tiles // min(tiles, wanted))
        return each * self.blocks.BP, -(-tiles // each)

    def sweep(
        self, stages, loss=None, losses=None, dtau=None, grad_x=None, y=None, norm=0, cells=None, eps=0.0, g=None
    ):
        B, C, H, W = self.x.shape
        out = grad_x if grad_x is not None else y if y is not None else self.x
        arguments = dict(
            x=self.x, weight=self.weight, bias=self.bias, g=self.g if g is None else g, d=self.d, grad_x=grad_x, y=y, sums=self.sums,
            means=self.means if "first" in stages else None, cells=cells, loss=losses, dtau=dtau, **_loss_arguments(loss),
            B=B, C=C, P=self.P, H=H, W=W, K=self.K, GH=self.G[0], GW=self.G[1], positions=self.positions,
            xb=self.x.stride(0), xc=_strides(self.x)[0], xp=_strides(self.x)[1], ob=out.stride(0), oc=_strides(out)[0], op=_strides(out)[1],
            eps=eps, FIRST="first" in stages, LOSS="loss" in stages, SECOND="second" in stages, NORM=norm, **self.precision,
            BP=self.blocks.BP, BC=self.blocks.BC, BK=self.blocks.BK, BG=self.blocks.BG, num_warps=self.blocks.warps,
        )  # fmt: skip
        parts = 1 if stages == ("head",) else self.parts
        if self.second_moment:
            direct_only = {
                "second": self.second, "mu": self.mu, "HEAD": "head" in stages,
                "HEAD_PRECISION": "tf32" if self.x.dtype != torch.float32 else self.precision["PRECISION"],
            }  # fmt: skip
            second_moment[(self.groups, parts)](**arguments, **direct_only)
        else:
            direct[(self.groups, parts)](**arguments, NS=self.blocks.NS)

    def first(self):
        """g, with what the later stages need: sums, S and mu, cell means."""
        if self.second_moment:
            self.sweep(("first", "head") if self.parts == 1 else ("first",))
            if self.parts > 1:
                self.second, self.mu = self.second.sum(0), None if self.mu is None else self.mu.sum(0)
                self.sweep(("head",))
        else:
            g = self._new(self.parts, *self.g.shape) if self.parts > 1 else self.g
            self.sweep(("first",), g=g)
            self.g = g.sum(0) if self.parts > 1 else g
        if self.parts > 1:
            self.sums = self.sums.sum(0)
        if self.means is not None:
            self.means = self.means.sum(0) / _areas(self.x, self.G)
            self.g += self.means.flatten(1) @ self._grid_rows().T

    def _grid_rows(self):
        return self.grid_weight[..., : self.G[0], : self.G[1]].float().flatten(1)

    def cells(self):
        if self.grid_weight is None:
            return None
        return (self.d @ self._grid_rows()).view(len(self.x), -1, self.G[0] * self.G[1])

    def losses(self, loss):
        losses, dtau = self._new(len(self.x)), self._new(len(self.x)) if loss.learned_tau is not None else None
        return losses, dtau

    def loss(self, loss, losses, dtau):
        B = len(self.x)
        loss_kernel[(-(-B // 4),)](
            g=self.g, d=self.d, loss=losses, dtau=dtau, B=B, K=self.K, **_loss_arguments(loss), NS=4, BK=self._loss_tile(), num_warps=4
        )  # fmt: skip

    def _loss_tile(self):
        return min(max(16, triton.next_power_of_2(self.K)), 256)

    def head_gradients(self):
        """dL/dW, dL/dbeta, dL/dV for the d in self.d; None where there is no such parameter."""
        B, C = self.x.shape[:2]
        tiles = -(-self.K // self.blocks.BK)
        units = B if self.second_moment else self.groups
        parts = max(1, min(units, 2 * _multiprocessors(self.x.device) // tiles))
        share = -(-units // parts)
        parts = -(-units // share)
        partial = self._new(parts, self.K, C)
        grad_bias = None
        if self.second_moment:
            head_second_moment[(tiles, parts)](
                self.weight, self.d, self.second, partial, B, C, self.K, share,
                PRECISION="tf32" if self.x.dtype != torch.float32 else self.precision["PRECISION"],
                BC=self.blocks.BC, BK=self.blocks.BK, num_warps=self.blocks.head_warps,
            )  # fmt: skip
            grad_weight = partial.sum(0)
            if self.bias is not None:
                beta, mu = self.bias.float(), self.mu.view(B, C)
                grad_weight += 2 * beta[:, None] * (self.d.T @ mu)
                grad_bias = 2 * (self.d * (mu @ self.weight.float().T + beta)).sum(0)
        else:
            part_bias = None if self.bias is None else self._new(parts, self.K)
            largest = self.d.abs().amax().view(1) if self.x.dtype == torch.float16 else None
            head_direct[(tiles, parts)](
                self.x, self.weight, self.bias, self.d, largest, partial, part_bias, B, C, self.P, self.K, self.groups, share,
                self.x.stride(0), *_strides(self.x), **self.precision, NS=self.blocks.NS, BP=self.blocks.BP, BC=self.blocks.BC,
                BK=self.blocks.BK, num_warps=self.blocks.head_warps,
            )  # fmt: skip
            grad_weight = partial.sum(0)
            grad_bias = None if part_bias is None else part_bias.sum(0)
        grad_grid = None
        if self.grid_weight is not None:
            grad_grid = torch.zeros_like(self.grid_weight, dtype=torch.float32, memory_format=torch.contiguous_format)
            part = grad_grid[..., : self.G[0], : self.G[1]]
            part.copy_((self.d.T @ self.means.flatten(1)).view(part.shape))
        return grad_weight.view(self.K, C, 1, 1), grad_bias, grad_grid


def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _strides(x):
    """Of channels and positions, for x dense in either layout."""
    return (1, x.shape[1]) if is_rows(x) else (x.shape[2] * x.shape[3], 1)


def _areas(x, grid):
    """Positions in each cell, [GH GW]."""
    heights, widths = (
        torch.tensor(
            [((i + 1) * size + cells - 1) // cells - i * size // cells for i in range(cells)], dtype=torch.float32
        )
        for size, cells in zip(x.shape[2:], grid, strict=True)
    )
    return (heights[:, None] * widths).flatten().to(x.device, non_blocking=True)


def _loss_arguments(loss):
    if loss is None:
        return {
            "target": None,
            "tau_factor": None,
            "scale_factor": None,
            "tau": 1.0,
            "margin": 0.0,
            "smoothing": 0.0,
            "scale": 1.0,
        }
    return {
        "target": loss.target, "tau_factor": loss.learned_tau, "scale_factor": loss.grad_scale, "tau": loss.tau, "margin": loss.margin,
        "smoothing": loss.label_smoothing, "scale": loss.scale,
    }  # fmt: skip


def _fits(x, weight, padding):
    """Whether the kernels above take these arguments; otherwise PyTorch's convolutions and products do (composed/goodness.py)."""
    return weight is not None and weight.shape[2:] == (1, 1) and tuple(padding) == (0, 0) and x.numel() > 0


def _on_device(x):
    return torch.cuda.device_of(x) if x.is_cuda else torch.no_grad()


def goodness(x, weight, bias, grid_weight, padding, plan, dtype):
    """g [B, K] float32."""
    if not _fits(x, weight, padding):
        return composed.goodness(x, weight, bias, grid_weight, padding, plan, dtype)
    with _on_device(x):
        launch = _Launch(x, weight, bias, grid_weight, plan)
        launch.first()
        return launch.g


def goodness_backward(d, x, weight, bias, grid_weight, padding, plan, dtype, need_x):
    """Gradients of sum(d * g): (x or None, weight, bias, grid_weight)."""
    if not _fits(x, weight, padding):
        return composed.goodness_backward(d, x, weight, bias, grid_weight, padding, plan, dtype, need_x)
    with _on_device(x):
        launch = _Launch(x, weight, bias, grid_weight, plan)
        if launch.second_moment or grid_weight is not None:
            launch.first()
        launch.d = d.float().contiguous()
        grad_x = empty_like(x) if need_x else None
        if need_x:
            launch.sweep(("second",), grad_x=grad_x, cells=launch.cells())
        return grad_x, *launch.head_gradients()


NORMS = {"none": 0, "layer_norm": 1, "layer_norm_channels": 2}


def goodness_step(x, weight, bias, grid_weight, padding, plan, dtype, loss, need_x, normalize, eps):
    """Per-sample losses [B], g [B, K], the four gradients, dL/dtau or None, and the normalised x."""
    if not _fits(x, weight, padding):
        return composed.goodness_step(x, weight, bias, grid_weight, padding, plan, dtype, loss, need_x, normalize, eps)
    with _on_device(x):
        launch = _Launch(x, weight, bias, grid_weight, plan)
        grad_x = empty_like(x) if need_x else None
        y = None if normalize == "none" else empty_like(x)
        losses, dtau = launch.losses(loss)
        second = {"grad_x": grad_x, "y": y, "norm": NORMS[normalize], "eps": eps}
        if launch.fused:
            stages = ("first", "head", "loss", "second")
            launch.sweep(stages, loss, losses, dtau, **second)
        else:
            launch.first()
            launch.loss(loss, losses, dtau)
            launch.sweep(("second",), cells=launch.cells(), **second)
        grads = launch.head_gradients()
        return losses, launch.g, grad_x, *grads, None if dtau is None else dtau.sum() * loss.tau, y
