"""Goodness of groups of channels, its loss, its local gradient and the normalised output in one launch (fastff/reference.py has the formulas).

`samples`: a program takes a sample (a pair of them for losses of pairs). First sweep: sums by channel, to scratch in L2; from there goodness
by group, loss, d; second sweep: dL/dx and the next input from x read again, out of L2 up to samples of some megabytes.
`positions`: a program takes R positions of a sample with all channels, for goodness at each position and for normalisation over channels.
Where goodness is of one kind and the normalisation of the other, each has its launch. Floor: one read of x, one write of each result.

A goodness is what an element adds to it (`term`) and the derivative of that (`derivative`).

Never run on a GPU yet: interpreted and compiled ahead of time only (tests/test_triton.py).
"""

import functools
from collections import namedtuple

import torch
import triton
import triton.language as tl

from fastff import reference, spec
from fastff.kernels.layout import dense, empty_like, is_channels_last
from fastff.kernels.triton import loss as losses
from fastff.kernels.triton import normalization
from fastff.kernels.triton.epilogue import step_in_parts
from fastff.kernels.triton.launch import constants, on_device
from fastff.kernels.triton.layer_norm import layer_norm
from fastff.kernels.triton.loss import LossArguments, gradient_scale, losses_of, of_pairs, of_samples
from fastff.kernels.triton.normalization import GROUP_NORM, NONE, between, factors, joined, moments

WARPS = 8


@triton.jit
def term(x, POWER: tl.constexpr):
    """What an element adds to goodness; 0 of 0."""
    if POWER == 1:
        return x
    return x * x


@triton.jit
def derivative(x, POWER: tl.constexpr):
    """d term / dx."""
    if POWER == 1:
        return tl.full(x.shape, 1.0, tl.float32)
    return 2 * x


Scratch = namedtuple("Scratch", "g d sums factors starts group_of")
"""g and d [B, K or P]; sums [B, 3, C] by channel: of x, of squares about the mean, of terms; factors [B, 2, K]: mean and
factor of the normalisation by group; first channel of each group [K + 1]; group of each channel [C]."""


Config = namedtuple("Config", "POWER MEAN GOODNESS LOSS MEMBERS NORM LAST C P K BC R KP GP")
"""Constants: the goodness (POWER, MEAN), whether it is wanted, the number of the loss (or None), samples of a program, the number of the
normalisation, whether memory is channels_last, channels, positions (whose sizes say how many bytes an access may take) and groups, channels and
positions of a tile, padded number and size of groups."""


@triton.jit
def load(x, b, c, p, config: Config):
    """A tile [BC, R] of sample b in float32, with its offsets and mask, which are also those of its gradient and of the next input."""
    mask = (c[:, None] < config.C) & (p[None, :] < config.P)
    at = b * (config.C * config.P)
    if config.LAST:
        at += c[:, None] + p[None, :] * config.C
    else:
        at += c[:, None] * config.P + p[None, :]
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32), at, mask


@triton.jit
def by_group(values, scratch: Scratch, K, KP: tl.constexpr, GP: tl.constexpr):
    """Values [C] of the channels starts[k] .. starts[k + 1] - 1 of each group, [KP, GP], and whether there is one."""
    k = tl.arange(0, KP)
    start = tl.load(scratch.starts + k, mask=k < K, other=0)
    size = tl.load(scratch.starts + k + 1, mask=k < K, other=0) - start
    j = tl.arange(0, GP)
    mask = j[None, :] < size[:, None]
    return tl.load(values + start[:, None] + j[None, :], mask=mask, other=0.0), mask


@triton.jit
def elements(group, known, scratch: Scratch, P):
    """Number of elements of groups."""
    end = tl.load(scratch.starts + group + 1, mask=known, other=1)
    return (end - tl.load(scratch.starts + group, mask=known, other=0)).to(tl.float32) * P


@triton.jit
def add(total, lost, term):
    """(total + term, what its rounding lost), with what was lost before: the error does not grow with the number of terms (Kahan 1965)."""
    term -= lost
    more = total + term
    return more, (more - total) - term


@triton.jit
def sum_channels(x, scratch: Scratch, b, config: Config):
    """Write the sums by channel of sample b."""
    for c0 in range(0, config.C, config.BC):
        c = c0 + tl.arange(0, config.BC)
        total = tl.zeros([config.BC], tl.float32)
        square = tl.zeros([config.BC], tl.float32)
        terms = tl.zeros([config.BC], tl.float32)
        lost, lost_square, lost_terms = terms, terms, terms
        for p0 in range(0, config.P, config.R):
            v, _, mask = load(x, b, c, p0 + tl.arange(0, config.R), config)
            if config.NORM != NONE:
                n = tl.minimum(config.P - p0, config.R) * 1.0
                more, squares = moments(v, mask, n, 1)
                square, lost_square = add(square, lost_square, squares + between(total, p0 * 1.0, more, n))
                total, lost = add(total, lost, more)
            if config.GOODNESS:
                terms, lost_terms = add(terms, lost_terms, tl.sum(term(v, config.POWER), 1))
        sums = scratch.sums + b * 3 * config.C + c
        if config.NORM != NONE:
            tl.store(sums, total, mask=c < config.C)
            tl.store(sums + config.C, square, mask=c < config.C)
        if config.GOODNESS:
            tl.store(sums + 2 * config.C, terms, mask=c < config.C)


@triton.jit
def store_goodness(scratch: Scratch, b, config: Config):
    """g of sample b from its sums."""
    k = tl.arange(0, config.KP)
    terms, _ = by_group(scratch.sums + (b * 3 + 2) * config.C, scratch, config.K, config.KP, config.GP)
    good = tl.sum(terms, 1)
    if config.MEAN:
        good /= elements(k, k < config.K, scratch, config.P)
    tl.store(scratch.g + b * config.K + k, good, mask=k < config.K)


@triton.jit
def store_factors(scratch: Scratch, b, eps, config: Config):
    """Mean and factor of the normalisation of sample b, by group (the same for all of them unless it is "group_norm")."""
    k = tl.arange(0, config.KP)
    sums = scratch.sums + b * 3 * config.C
    total, mask = by_group(sums, scratch, config.K, config.KP, config.GP)
    square, _ = by_group(sums + config.C, scratch, config.K, config.KP, config.GP)
    n = elements(k, k < config.K, scratch, config.P)
    total, square = joined(total, square, tl.where(mask, config.P * 1.0, 0.0), n)
    if config.NORM != GROUP_NORM:
        count = tl.where(k < config.K, n, 0.0)
        n = tl.zeros([config.KP], tl.float32) + config.C * config.P
        whole, squares = joined(total[None, :], square[None, :], count[None, :], config.C * config.P * 1.0)
        total, square = whole + tl.zeros([config.KP], tl.float32), squares + tl.zeros([config.KP], tl.float32)
    mean, factor = factors(total, square, n, eps, config.NORM)
    own = scratch.factors + b * 2 * config.K + k
    tl.store(own, mean, mask=k < config.K)
    tl.store(own + config.K, factor, mask=k < config.K)


@triton.jit
def store_channels(x, grad_x, normalized, scratch: Scratch, b, config: Config):
    """The second sweep over sample b."""
    for c0 in range(0, config.C, config.BC):
        c = c0 + tl.arange(0, config.BC)
        group = tl.load(scratch.group_of + c, mask=c < config.C, other=0)
        if grad_x is not None:
            slope = tl.load(scratch.d + b * config.K + group)
            if config.MEAN:
                slope /= elements(group, c < config.C, scratch, config.P)
        if config.NORM != NONE:
            mean = tl.load(scratch.factors + b * 2 * config.K + group)
            factor = tl.load(scratch.factors + (b * 2 + 1) * config.K + group)
        for p0 in range(0, config.P, config.R):
            v, at, mask = load(x, b, c, p0 + tl.arange(0, config.R), config)
            if grad_x is not None:
                out = slope[:, None] * derivative(v, config.POWER)
                tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), mask=mask)
            if config.NORM != NONE:
                out = (v - mean[:, None]) * factor[:, None]
                tl.store(normalized + at, out.to(normalized.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "eps"])
def samples(
    x, grad_x, normalized, scratch: Scratch, loss: LossArguments, B, eps, config: Config
):  # fmt: skip
    """Program b: sample b, or the pair b and b + B / 2."""
    unit = tl.program_id(0).to(tl.int64)
    half = B // 2
    if config.GOODNESS or (config.NORM != NONE):
        for m in tl.static_range(config.MEMBERS):
            sum_channels(x, scratch, unit + m * half, config)
        tl.debug_barrier()
    if config.GOODNESS:
        for m in tl.static_range(config.MEMBERS):
            store_goodness(scratch, unit + m * half, config)
    if config.LOSS is not None:
        tl.debug_barrier()
        n = unit + tl.arange(0, 1)
        losses_of(scratch.g, scratch.d, loss, n, B, config.K, config.LOSS, 1, config.KP)
    if config.NORM != NONE:
        for m in tl.static_range(config.MEMBERS):
            store_factors(scratch, unit + m * half, eps, config)
    if (grad_x is not None) or (config.NORM != NONE):
        tl.debug_barrier()
        for m in tl.static_range(config.MEMBERS):
            store_channels(x, grad_x, normalized, scratch, unit + m * half, config)


@triton.jit
def sum_positions(x, b, p, config: Config):
    """Sums over the channels of positions p [R] of sample b: of x, of squares about the mean, and goodness."""
    total = tl.zeros([config.R], tl.float32)
    square = tl.zeros([config.R], tl.float32)
    terms = tl.zeros([config.R], tl.float32)
    if config.GOODNESS or (config.NORM != NONE):
        for c0 in range(0, config.C, config.BC):
            v, _, mask = load(x, b, c0 + tl.arange(0, config.BC), p, config)
            if config.NORM != NONE:
                n = tl.minimum(config.C - c0, config.BC) * 1.0
                more, squares = moments(v, mask, n, 0)
                square += squares + between(total, c0 * 1.0, more, n)
                total += more
            if config.GOODNESS:
                terms += tl.sum(term(v, config.POWER), 0)
    if config.MEAN:
        terms /= config.C
    return total, square, terms


@triton.jit
def store_positions(
    x, grad_x, normalized, total, square, dp, b, p, eps, config: Config
):  # fmt: skip
    """The second sweep over positions p of sample b, whose goodness has the gradient dp."""
    if config.MEAN:
        dp /= config.C
    if config.NORM != NONE:
        mean, factor = factors(total, square, config.C * 1.0, eps, config.NORM)
    for c0 in range(0, config.C, config.BC):
        v, at, mask = load(x, b, c0 + tl.arange(0, config.BC), p, config)
        if grad_x is not None:
            out = dp[None, :] * derivative(v, config.POWER)
            tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), mask=mask)
        if config.NORM != NONE:
            out = (v - mean[None, :]) * factor[None, :]
            tl.store(normalized + at, out.to(normalized.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "eps"])
def positions(
    x, grad_x, normalized, scratch: Scratch, loss: LossArguments, B, eps, config: Config
):  # fmt: skip
    """Program (b, j): positions j R .. of sample b, or of the pair b and b + B / 2. losses [units, parts] gets sums over the program's positions."""
    unit = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    partner = unit + B // 2
    p = part * config.R + tl.arange(0, config.R)
    inside = p < config.P
    total, square, good = sum_positions(x, unit, p, config)
    if config.MEMBERS == 2:
        total_2, square_2, good_2 = sum_positions(x, partner, p, config)
    if config.GOODNESS:
        tl.store(scratch.g + unit * config.P + p, good, mask=inside)
        if config.MEMBERS == 2:
            tl.store(scratch.g + partner * config.P + p, good_2, mask=inside)
    if config.LOSS is not None:
        if config.MEMBERS == 2:
            value, dp_2 = of_pairs(good, good_2, loss.alpha, config.LOSS)
            dp_2 *= gradient_scale(loss) / config.P
            dp = -dp_2
        else:
            value, dp = of_samples(good, unit < B // 2, loss, config.LOSS)
            dp *= gradient_scale(loss) / config.P
        own = loss.losses + unit * tl.num_programs(1) + part
        tl.store(own, tl.sum(tl.where(inside, value, 0.0), 0) / config.P)
    elif grad_x is not None:
        dp = tl.load(scratch.d + unit * config.P + p, mask=inside, other=0.0)
    else:
        dp = good
    if (grad_x is not None) or (config.NORM != NONE):
        store_positions(x, grad_x, normalized, total, square, dp, unit, p, eps, config)
        if config.MEMBERS == 2:
            store_positions(x, grad_x, normalized, total_2, square_2, dp_2, partner, p, eps, config)


def tiles(channels_last, C, P):
    """(channels, positions) of a tile of at most 2048 elements, 8 a thread (16 spill), long where memory is contiguous."""
    if channels_last:
        BC = min(64, triton.next_power_of_2(C))
        return BC, min(2048 // BC, triton.next_power_of_2(P))
    R = min(512, triton.next_power_of_2(P))
    return min(2048 // R, triton.next_power_of_2(C)), R


@functools.cache  # for good: a recorded step (fastff/training/recording.py) reads them
def groups_of(channels, groups, device):
    """(starts [K + 1], group of each channel [C], channels of the largest): copied to a GPU once, so that no step waits for it."""
    sizes = reference.group_sizes(channels, groups)
    starts = [sum(sizes[:k]) for k in range(groups + 1)]
    group = [k for k, size in enumerate(sizes) for _ in range(size)]
    return *(torch.tensor(v, dtype=torch.int32, device=device) for v in (starts, group)), max(sizes)


def _launch(x, groups, by_position, *, wanted=None, loss=None, d=None, grad_x=None, normalize=None, normalized=None):
    """Launch `samples` or `positions`. Returns (g, losses), None where not asked for. wanted: whether g is."""
    x, new = dense(x), functools.partial(torch.empty, dtype=torch.float32, device=x.device)
    B, C, P, K = x.shape[0], x.shape[1], x.shape[2] * x.shape[3], groups.count
    last = is_channels_last(x)
    BC, R = tiles(last, C, P)
    normalize = normalize or spec.Normalization()
    norm = normalization.constant(normalize)
    paired = loss is not None and loss.name in spec.PAIRED_LOSSES
    units, parts = B // 2 if paired else B, -(-P // R) if by_position else 1
    starts, group_of, largest = groups_of(C, K, x.device)
    config = Config(
        groups.power, groups.mean, bool(wanted), None if loss is None else losses.constant(loss),
        1 + paired, norm, last, C, P, K, BC, R, triton.next_power_of_2(K), triton.next_power_of_2(largest),
    )  # fmt: skip
    columns = P if groups.positions else K
    g = new(B, columns) if wanted else None
    out = None if loss is None else new(units, parts)
    needs_d = loss is not None and not by_position
    scratch = Scratch(g, new(B, columns) if needs_d else d, None, None, starts, group_of)
    if not by_position and (wanted or norm):
        scratch = scratch._replace(sums=new(B, 3, C), factors=new(B, 2, K) if norm else None)
    arguments = losses.NO_LOSS if loss is None else losses.arguments(loss, B, out)
    kernel = positions if by_position else samples
    with on_device(x):
        kernel[units, parts](
            x, grad_x, normalized, scratch, arguments, B, normalize.eps, constants(config), num_warps=WARPS
        )
    return g, None if out is None else out.sum(1) if by_position else out[:, 0]


def goodness(x, groups):
    """g [B, K] or [B, P] of spec.Groups."""
    return _launch(x, groups, groups.positions, wanted=True)[0]


def goodness_backward(d, x, groups):
    """dL/dx as x."""
    grad_x = empty_like(x)
    _launch(x, groups, groups.positions, d=d.float().contiguous(), grad_x=grad_x)
    return grad_x


def normalize(x, normalization):
    """x by a spec.Normalization, as x."""
    if normalization.name == "layer_norm" and x.numel():
        return layer_norm(x, normalization.eps)
    normalized = empty_like(x)
    if x.numel():
        by_position = normalization.name.endswith("_channels")
        _launch(x, spec.Groups(normalization.groups), by_position, normalize=normalization, normalized=normalized)
    return normalized


def step(step):
    """The StepResult of a spec.Step with Groups, its losses not reduced."""
    return _step(step) if step.epilogue is None else step_in_parts(step, _step)


def _step(step):
    """A step without an epilogue."""
    x, groups, wanted = step.x, step.goodness, step.normalization
    by_channels = wanted.name.endswith("_channels")
    one_launch = by_channels == groups.positions and (wanted.name != "group_norm" or wanted.groups == groups.count)
    grad_x = empty_like(x) if step.need_grad_x else None
    normalized = empty_like(x) if wanted.name != "none" and one_launch else None
    together = {} if normalized is None else {"normalize": wanted, "normalized": normalized}
    g, loss = _launch(x, groups, groups.positions, wanted=True, loss=step.loss, grad_x=grad_x, **together)
    if normalized is None and wanted.name != "none":
        normalized = normalize(x, wanted)
    return spec.StepResult(loss, g, grad_x, normalized=normalized)
