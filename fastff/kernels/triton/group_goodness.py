"""Goodness of groups of channels, its loss, its local gradient and the normalised output in one launch (fastff/reference.py has the formulas).

`samples`: a program takes a sample (a pair of them for losses of differences). First sweep: sums of x and x^2 by channel, to scratch in L2;
from there goodness by group, loss, d; second sweep: dL/dx and the next input from x read again, out of L2 up to samples of some megabytes.
`positions`: a program takes R positions of a sample with all channels, for goodness at each position and for normalisation over channels.
Where goodness is of one kind and the normalisation of the other, each has its launch. Floor: one read of x, one write of each result.

Never run on a GPU yet: interpreted and compiled ahead of time only (tests/test_triton.py).
"""

import functools

import torch
import triton
import triton.language as tl

from fastff import reference
from fastff.kernels.composed.goodness import dense, empty_like, is_rows
from fastff.kernels.composed.group_goodness import Goodness, Loss
from fastff.kernels.triton.goodness import on_device

NO_LOSS, GIVEN = -1, 5  # beside the places in reference.LOSSES
NORMS = {"none": 0, "layer_norm": 1, "group_norm": 2, "l2": 3, "rms": 4}
WARPS = 8


@triton.jit
def threshold(z, SWISH: tl.constexpr):
    """softplus(z) or z sigmoid(z), and the derivative."""
    s = 1 / (1 + tl.exp(-z))
    if SWISH:
        return z * s, s * (1 + z * (1 - s))
    return tl.maximum(z, 0.0) + tl.log(1 + tl.exp(-tl.abs(z))), s


@triton.jit
def factors(total, square, n, eps, NORM: tl.constexpr):
    """(mean, factor) of a normalisation from sums over n elements."""
    mean = total / n
    if NORM == 3:
        return mean * 0, 1 / (tl.sqrt(square) + eps)
    if NORM == 4:
        return mean * 0, 1 / tl.sqrt(square / n + eps)
    return mean, 1 / tl.sqrt(tl.maximum(square / n - mean * mean, 0.0) + eps)


@triton.jit
def member(first, second, M: tl.constexpr):
    """That of the pair's sample M."""
    if M == 0:
        return first
    return second


@triton.jit
def by_group(values, starts, K, KP: tl.constexpr, GP: tl.constexpr):
    """[KP] sums of values [C] over groups starts[k] .. starts[k + 1] - 1."""
    k = tl.arange(0, KP)
    start = tl.load(starts + k, mask=k < K, other=0)
    size = tl.load(starts + k + 1, mask=k < K, other=0) - start
    j = tl.arange(0, GP)
    v = tl.load(values + start[:, None] + j[None, :], mask=j[None, :] < size[:, None], other=0.0)
    return tl.sum(v, 1), size


@triton.jit
def samples(
    x, target, scale_factor, d, starts, group_of, scratch, g, loss, grad, y, C, P, K, half, xb, xc, xp, theta, tau, margin, smoothing, scale,
    eps, POWER: tl.constexpr, MEAN: tl.constexpr, LOSS: tl.constexpr, GOOD: tl.constexpr, NORM: tl.constexpr, PAIRED: tl.constexpr,
    BC: tl.constexpr, R: tl.constexpr, KP: tl.constexpr, GP: tl.constexpr,
):  # fmt: skip
    """Program b: sample b, or the pair b and b + half. scratch [B, 2 C + 3 K]: sums by channel, then coefficients by group."""
    unit = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, KP)
    width = 2 * C + 3 * K
    members: tl.constexpr = 2 if PAIRED else 1
    if GOOD or NORM > 0:
        for m in tl.static_range(members):
            b = unit + m * half
            for c0 in range(0, C, BC):
                c = c0 + tl.arange(0, BC)
                total = tl.zeros([BC], tl.float32)
                square = tl.zeros([BC], tl.float32)
                for p0 in range(0, P, R):
                    p = p0 + tl.arange(0, R)
                    mask = (c[:, None] < C) & (p[None, :] < P)
                    v = tl.load(x + b * xb + c[:, None] * xc + p[None, :] * xp, mask=mask, other=0.0).to(tl.float32)
                    total += tl.sum(v, 1)
                    square += tl.sum(v * v, 1)
                tl.store(scratch + b * width + c, total, mask=c < C)
                tl.store(scratch + b * width + C + c, square, mask=c < C)
        tl.debug_barrier()
    size = tl.load(starts + k + 1, mask=k < K, other=1) - tl.load(starts + k, mask=k < K, other=0)
    n = tl.where(k < K, size, 1).to(tl.float32) * P
    if GOOD:
        for m in tl.static_range(members):
            b = unit + m * half
            good, _ = by_group(scratch + b * width + (C if POWER == 2 else 0), starts, K, KP, GP)
            good = good / n if MEAN else good
            tl.store(g + b * K + k, good, mask=k < K)
            if m == 0:
                first = good
            second = good
    if LOSS >= 0:
        factor = scale
        if scale_factor is not None:
            factor *= tl.load(scale_factor)
        if LOSS == 5:
            d_first = tl.load(d + unit * K + k, mask=k < K, other=0.0)
        elif LOSS == 0:
            t = tl.load(target + unit).to(tl.int32)
            hit = k == t
            u = tl.where(k < K, tau * first - margin * hit, float("-inf"))
            top = tl.max(u, 0)
            e = tl.exp(u - top)
            total = tl.sum(e, 0)
            q = (1 - smoothing) * hit + smoothing / K
            value = top + tl.log(total) - tl.sum(tl.where(k < K, q * u, 0.0), 0)
            value = tl.where((t >= 0) & (t < K), value, float("nan"))
            tl.store(loss + unit, value)
            d_first = factor * tau * (e / total - q)
        elif PAIRED:
            value, slope = threshold(-theta * (first - second), LOSS == 4)
            tl.store(loss + unit, tl.sum(tl.where(k < K, value, 0.0), 0) / K)
            d_second = theta * slope * factor / K
            d_first = -d_second
        else:
            sign = tl.where(unit < half, 1.0, -1.0)
            value, slope = threshold(sign * (theta - first), LOSS == 2)
            tl.store(loss + unit, tl.sum(tl.where(k < K, value, 0.0), 0) / K)
            d_first = -sign * slope * factor / K
        if not PAIRED:
            d_second = d_first
    for m in tl.static_range(members):
        b = unit + m * half
        own = scratch + b * width
        if grad is not None:
            a = member(d_first, d_second, m) * POWER
            tl.store(own + 2 * C + k, a / n if MEAN else a, mask=k < K)
        if NORM > 0:
            total, _ = by_group(own, starts, K, KP, GP)
            square, _ = by_group(own + C, starts, K, KP, GP)
            if NORM != 2:
                total = tl.sum(total, 0) + tl.zeros([KP], tl.float32)
                square = tl.sum(square, 0) + tl.zeros([KP], tl.float32)
                mean, by = factors(total, square, C * P * 1.0, eps, NORM)
            else:
                mean, by = factors(total, square, n, eps, NORM)
            tl.store(own + 2 * C + K + k, mean, mask=k < K)
            tl.store(own + 2 * C + 2 * K + k, by, mask=k < K)
    if (grad is not None) or NORM > 0:
        tl.debug_barrier()
        for m in tl.static_range(members):
            b = unit + m * half
            own = scratch + b * width + 2 * C
            for c0 in range(0, C, BC):
                c = c0 + tl.arange(0, BC)
                group = tl.load(group_of + c, mask=c < C, other=0)
                if grad is not None:
                    slope_c = tl.load(own + group)
                if NORM > 0:
                    mean_c = tl.load(own + K + group)
                    by_c = tl.load(own + 2 * K + group)
                for p0 in range(0, P, R):
                    p = p0 + tl.arange(0, R)
                    mask = (c[:, None] < C) & (p[None, :] < P)
                    at = b * xb + c[:, None] * xc + p[None, :] * xp
                    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
                    if grad is not None:
                        out = slope_c[:, None] * v if POWER == 2 else slope_c[:, None] + v * 0
                        tl.store(grad + at, out.to(grad.dtype.element_ty), mask=mask)
                    if NORM > 0:
                        tl.store(y + at, ((v - mean_c[:, None]) * by_c[:, None]).to(y.dtype.element_ty), mask=mask)


@triton.jit
def positions(
    x, scale_factor, d, g, loss, grad, y, C, P, half, xb, xc, xp, theta, scale, eps,
    POWER: tl.constexpr, MEAN: tl.constexpr, LOSS: tl.constexpr, GOOD: tl.constexpr, NORM: tl.constexpr, PAIRED: tl.constexpr,
    BC: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Program (b, j): positions j R .. of sample b, or of the pair b and b + half. loss [units, parts] gets sums over the program's positions."""
    unit = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    p = part * R + tl.arange(0, R)
    inside = p < P
    members: tl.constexpr = 2 if PAIRED else 1
    for m in tl.static_range(members):
        b = unit + m * half
        total = tl.zeros([R], tl.float32)
        square = tl.zeros([R], tl.float32)
        if GOOD or NORM > 0:
            for c0 in range(0, C, BC):
                c = c0 + tl.arange(0, BC)
                mask = (c[:, None] < C) & inside[None, :]
                v = tl.load(x + b * xb + c[:, None] * xc + p[None, :] * xp, mask=mask, other=0.0).to(tl.float32)
                total += tl.sum(v, 0)
                square += tl.sum(v * v, 0)
        good = square if POWER == 2 else total
        good = good / C if MEAN else good
        if GOOD:
            tl.store(g + b * P + p, good, mask=inside)
        if m == 0:
            first, total_first, square_first = good, total, square
        second, total_second, square_second = good, total, square
    if LOSS >= 0:
        factor = scale / P
        if scale_factor is not None:
            factor *= tl.load(scale_factor)
        if LOSS == 5:
            d_first = tl.load(d + unit * P + p, mask=inside, other=0.0)
        else:
            if PAIRED:
                value, slope = threshold(-theta * (first - second), LOSS == 4)
                d_second = theta * slope * factor
                d_first = -d_second
            else:
                sign = tl.where(unit < half, 1.0, -1.0)
                value, slope = threshold(sign * (theta - first), LOSS == 2)
                d_first = -sign * slope * factor
            tl.store(loss + unit * tl.num_programs(1) + part, tl.sum(tl.where(inside, value, 0.0), 0) / P)
        if not PAIRED:
            d_second = d_first
    if (grad is not None) or NORM > 0:
        for m in tl.static_range(members):
            b = unit + m * half
            if grad is not None:
                a = member(d_first, d_second, m) * POWER
                a = a / C if MEAN else a
            if NORM > 0:
                mean, by = factors(
                    member(total_first, total_second, m), member(square_first, square_second, m), C * 1.0, eps, NORM
                )
            for c0 in range(0, C, BC):
                c = c0 + tl.arange(0, BC)
                mask = (c[:, None] < C) & inside[None, :]
                at = b * xb + c[:, None] * xc + p[None, :] * xp
                v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
                if grad is not None:
                    out = a[None, :] * v if POWER == 2 else a[None, :] + v * 0
                    tl.store(grad + at, out.to(grad.dtype.element_ty), mask=mask)
                if NORM > 0:
                    tl.store(y + at, ((v - mean[None, :]) * by[None, :]).to(y.dtype.element_ty), mask=mask)


def tiles(rows, C, P):
    """(channels, positions) of a tile of at most 2048 elements, 8 a thread (16 spill), long where memory is contiguous."""
    if rows:
        BC = min(64, triton.next_power_of_2(C))
        return BC, min(2048 // BC, triton.next_power_of_2(P))
    R = min(512, triton.next_power_of_2(P))
    return min(2048 // R, triton.next_power_of_2(C)), R


@functools.lru_cache(64)
def groups_of(channels, groups, device):
    """(starts [K + 1], group of each channel [C], channels of the largest): copied to a GPU once, so that no step waits for it."""
    sizes = reference.group_sizes(channels, groups)
    starts = [sum(sizes[:k]) for k in range(groups + 1)]
    group = [k for k, size in enumerate(sizes) for _ in range(size)]
    return *(torch.tensor(v, dtype=torch.int32, device=device) for v in (starts, group)), max(sizes)


def _launch(x, how, by_position, *, good=False, loss=None, d=None, grad=None, norm="none", eps=0.0, y=None):
    """One launch of `positions` or `samples`: (g, losses), None where not asked for."""
    x = dense(x)
    if loss is not None and loss.target is not None:
        loss = loss._replace(target=loss.target.contiguous())
    B, C, P = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    rows = is_rows(x)
    BC, R = tiles(rows, C, P)
    strides = (x.stride(0), 1, C) if rows else (x.stride(0), P, 1)
    numbers = {"dtype": torch.float32, "device": x.device}
    if loss is None:
        loss = Loss("cross_entropy", 0.0, None, 1.0, 0.0, 0.0, 1.0, None)
        kind, units = NO_LOSS if d is None else GIVEN, 0
    else:
        kind, units = reference.LOSSES.index(loss.name), loss.count(B)
    fixed = {
        "POWER": how.power, "MEAN": how.mean, "LOSS": kind, "GOOD": good, "NORM": NORMS[norm.removesuffix("_channels")],
        "PAIRED": loss.name in reference.PAIRED, "BC": BC, "R": R, "num_warps": WARPS,
    }  # fmt: skip
    programs, half = units or B, B // 2
    g = torch.empty(B, how.count(x), **numbers) if good else None
    with on_device(x):
        if by_position:
            parts = -(-P // R)
            losses = torch.empty(units, parts, **numbers) if units else None
            positions[(programs, parts)](
                x, loss.grad_scale, d, g, losses, grad, y, C, P, half, *strides, loss.theta, loss.scale, eps, **fixed
            )
            return g, None if losses is None else losses.sum(1)
        starts, group_of, largest = groups_of(C, how.groups, x.device)
        scratch = torch.empty(B, 2 * C + 3 * how.groups, **numbers)
        losses = torch.empty(units, **numbers) if units else None
        samples[(programs,)](
            x, loss.target, loss.grad_scale, d, starts, group_of, scratch, g, losses, grad, y, C, P, how.groups, half, *strides, loss.theta,
            loss.tau, loss.margin, loss.label_smoothing, loss.scale, eps, KP=triton.next_power_of_2(how.groups),
            GP=triton.next_power_of_2(largest), **fixed,
        )  # fmt: skip
    return g, losses


def goodness(x, how):
    """g [B, K] or [B, P]."""
    return _launch(x, how, how.positions, good=True)[0]


def goodness_backward(d, x, how):
    """dL/dx as x."""
    grad = empty_like(x)
    _launch(x, how, how.positions, d=d.float().contiguous(), grad=grad)
    return grad


def goodness_step(x, how, loss, normalize_as, eps, need_x):
    """(g, losses, dL/dx or None, the normalised x or None)."""
    grad = empty_like(x) if need_x else None
    if normalize_as == "none" or normalize_as.endswith("_channels") != how.positions:
        g, losses = _launch(x, how, how.positions, good=True, loss=loss, grad=grad)
        return g, losses, grad, None if normalize_as == "none" else normalize(x, normalize_as, how.groups, eps)
    y = empty_like(x)
    g, losses = _launch(x, how, how.positions, good=True, loss=loss, grad=grad, norm=normalize_as, eps=eps, y=y)
    return g, losses, grad, y


def normalize(x, how, groups, eps):
    """x normalised, as x."""
    y = empty_like(x)
    _launch(x, Goodness(groups, 1, True, False), how.endswith("_channels"), norm=how, eps=eps, y=y)
    return y
