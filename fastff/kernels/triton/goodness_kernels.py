"""The kernels of goodness.py: both sweeps of either algorithm, the loss between them, and the head's gradients.

Shapes are in goodness.py. A tile X is [BC, R] channels by rows; masks at every edge; offsets between samples in 64 bits.
"""

import triton
import triton.language as tl

from fastff.kernels.triton import INTERPRETED as _interpreted

INTERPRETED = tl.constexpr(_interpreted)


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
def activate(h, ACT: tl.constexpr):
    """Activations by their place in ACTIVATIONS of fastff/reference.py."""
    if ACT == 1:
        h = tl.where(h < 0, 0.0, h)
    elif ACT == 2:
        h = tl.where(h < 0, 0.0, tl.where(h > 6, 6.0, h))
    elif ACT == 3:
        h = h * tl.where(h < -3, 0.0, tl.where(h > 3, 6.0, h + 3)) / 6
    elif ACT == 4:
        h = h * tl.sigmoid(h)
    elif ACT == 5:
        h = 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))
    return h


@triton.jit
def slope(h, ACT: tl.constexpr):
    """The activation's derivative at h."""
    if ACT == 1:
        value = tl.where(h > 0, 1.0, 0.0)
    elif ACT == 2:
        value = tl.where((h > 0) & (h < 6), 1.0, 0.0)
    elif ACT == 3:
        value = tl.where(h <= -3, 0.0, tl.where(h >= 3, 1.0, h / 3 + 0.5))
    elif ACT == 4:
        s = tl.sigmoid(h)
        value = s * (1 + h * (1 - s))
    elif ACT == 5:
        value = 0.5 * (1 + tl.erf(h * 0.7071067811865476)) + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
    else:
        value = tl.full(h.shape, 1.0, tl.float32)
    return value


@triton.jit
def before_activation(y, residual, affine, at, c, C, mask):
    """h = (y - mean) scale + shift + residual of a tile [BC, R], and y - mean; affine [3, C] = mean, scale, shift."""
    mean = tl.load(affine + c, mask=c < C, other=0.0)
    scale = tl.load(affine + C + c, mask=c < C, other=0.0)
    shift = tl.load(affine + 2 * C + c, mask=c < C, other=0.0)
    off = tl.where(mask, tl.load(y + at, mask=mask, other=0.0).to(tl.float32) - mean[:, None], 0.0)
    h = off * scale[:, None] + shift[:, None]
    if residual is not None:
        h += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    return h, off


@triton.jit
def tile(x, residual, affine, at, c, C, mask, ACT: tl.constexpr):
    """The head's input [BC, R]: x itself, or with a tail (ACT) what it makes of x, rounded to x's type."""
    if ACT is None:
        X = tl.load(x + at, mask=mask, other=0.0)
    else:
        h, _ = before_activation(x, residual, affine, at, c, C, mask)
        X = tl.where(mask, activate(h, ACT), 0.0).to(x.dtype.element_ty)
    return X


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
def statistics(sums, n, B, n_elements, shift, eps):
    """Mean and 1 / deviation of samples n from the sums of x - shift and its square, sums [2, B]."""
    total = tl.load(sums + n, mask=n < B, other=0.0)
    square = tl.load(sums + B + n, mask=n < B, other=0.0)
    mean = total / n_elements
    variance = tl.maximum(square / n_elements - mean * mean, 0.0)
    return mean + shift, 1 / tl.sqrt(variance + eps)


@triton.jit
def direct(
    x, residual, affine, channel_sums, weight, bias, g, d, grad_x, y, sums, means, cells, target, loss, dtau, tau_factor, scale_factor,
    B, C, P, H, W, K, GH, GW, positions, xb, xc, xp, ob, oc, op, tau, margin, smoothing, scale, eps,
    FIRST: tl.constexpr, LOSS: tl.constexpr, SECOND: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    ACT: tl.constexpr, NS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Program (i, j): samples i NS .. i NS + NS - 1, positions j * positions and on. A row of its tiles is one position of one sample.

    x [B, C, P] by strides xb, xc, xp; grad_x and y by ob, oc, op; weight [K, C]; g [parts, B, K], d [B, K], sums [parts, 2, B],
    means [parts, B, C, GH GW] (sums over cells in fact), cells [B, C, GH GW] = d V. With a tail (ACT): x is y of fastff/reference.py's tail,
    residual alike, affine [3, C] = mean, scale, shift; grad_x is dL/dh; channel_sums [programs, 2, C] of dL/dh and dL/dh (y - mean)."""
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
    shift = tl.zeros(
        [R], tl.float32
    )  # a number near each sample's values, which the sums for layer norm are relative to
    if ACT is None:
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
                from_x = base[None, :] + (c[:, None] * xc + p[None, :] * xp)
                X = tile(x, residual, affine, from_x, c, C, mask, ACT)
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
            mean, rstd = statistics(sums, sample, B, C * P, shift, eps)
        largest = tl.full([R], 1.0, tl.float32)
        if kind == tl.float16:  # d is about 1 / B: brought to 1 before it meets 5 bits of exponent
            largest = tl.zeros([R], tl.float32)
            for k0 in range(0, K, BK):
                k = k0 + tl.arange(0, BK)
                dk = tl.load(d + sample[None, :] * K + k[:, None], mask=here[None, :] & (k < K)[:, None], other=0.0)
                largest = tl.maximum(largest, tl.max(tl.abs(dk), 0))
            largest = tl.where(largest == 0, 1.0, largest)
        first_sum = tl.zeros([BC], tl.float32)
        second_sum = tl.zeros([BC], tl.float32)
        for p0 in range(start, end, BP):
            p = p0 + tl.arange(0, R) % BP
            row = here & (p < end)
            mask = has_c[:, None] & row[None, :]
            from_x = base[None, :] + (c[:, None] * xc + p[None, :] * xp)
            X = tile(x, residual, affine, from_x, c, C, mask, ACT)
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
                if ACT is not None:
                    h, off = before_activation(x, residual, affine, from_x, c, C, mask)
                    grad = tl.where(mask, grad * slope(h, ACT), 0.0)
                    first_sum += tl.sum(grad, 1)
                    second_sum += tl.sum(grad * off, 1)
                tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=mask)
            if NORM > 0:
                _next_input(X, y, at, mask, mean, rstd, C, eps, NORM)
        if ACT is not None:
            own = channel_sums + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + part) * 2 * C + c
            tl.store(own, first_sum, mask=has_c)
            tl.store(own + C, second_sum, mask=has_c)


@triton.jit
def second_moment(
    x, residual, affine, channel_sums, weight, bias, g, d, second, mu, grad_x, y, sums, means, cells, target, loss, dtau, tau_factor, scale_factor,
    B, C, P, H, W, K, GH, GW, positions, xb, xc, xp, ob, oc, op, tau, margin, smoothing, scale, eps,
    FIRST: tl.constexpr, HEAD: tl.constexpr, LOSS: tl.constexpr, SECOND: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_PRECISION: tl.constexpr, ACT: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BG: tl.constexpr,
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
    x += b * xb
    if residual is not None:
        residual += b * xb
    square_at = c[:, None] * C + c[None, :]
    square_mask = has_c[:, None] & has_c[None, :]
    shift = tl.zeros([], tl.float32)  # a number near the sample's values, which the sums for layer norm are relative to
    if ACT is None:
        shift = tl.load(x).to(tl.float32)
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
            from_x = c[:, None] * xc + p[None, :] * xp
            X = tile(x, residual, affine, from_x, c, C, mask, ACT)
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
            mean, rstd = statistics(sums, b, B, C * P, shift, eps)
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
        first_sum = tl.zeros([BC], tl.float32)
        second_sum = tl.zeros([BC], tl.float32)
        for p0 in range(start, end, BP):
            p = p0 + tl.arange(0, BP)
            mask = has_c[:, None] & (p < end)[None, :]
            from_x = c[:, None] * xc + p[None, :] * xp
            X = tile(x, residual, affine, from_x, c, C, mask, ACT)
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
                if ACT is not None:
                    h, off = before_activation(x, residual, affine, from_x, c, C, mask)
                    grad = tl.where(mask, grad * slope(h, ACT), 0.0)
                    first_sum += tl.sum(grad, 1)
                    second_sum += tl.sum(grad * off, 1)
                tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=mask)
            if NORM > 0:
                row = tl.zeros([BP], tl.float32)
                _next_input(X, y, at, mask, row + mean, row + rstd, C, eps, NORM)
        if ACT is not None:
            own = channel_sums + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + part) * 2 * C + c
            tl.store(own, first_sum, mask=has_c)
            tl.store(own + C, second_sum, mask=has_c)


@triton.jit
def loss_kernel(
    g, d, target, loss, dtau, tau_factor, scale_factor, B, K, tau, margin, smoothing, scale, NS: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """Loss and d of NS samples a program, where the sweeps run apart."""
    n = tl.program_id(0).to(tl.int64) * NS + tl.arange(0, NS)
    _loss_of(g, d, target, loss, dtau, tau, tau_factor, margin, smoothing, scale, scale_factor, n, B, K, NS, BK)


@triton.jit
def head_direct(
    x, residual, affine, weight, bias, d, largest, grad_weight, grad_bias, B, C, P, K, groups, share, xb, xc, xp,
    PRECISION: tl.constexpr, ACT: tl.constexpr, NS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
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
            from_x = (sample * xb)[None, :] + (c[:, None] * xc + p[None, :] * xp)
            X = tile(x, residual, affine, from_x, c, C, has_c[:, None] & row[None, :], ACT)
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
