"""Losses of goodness g [B, K] and d = dL/dg, as device functions: one code for heads with weights and for groups of channels.

Formulas: fastff/reference.py. All arithmetic is in float32.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl

from fastff import spec

CROSS_ENTROPY, SWISH, SYMBA, SWISH_SYMBA = (
    tl.constexpr(spec.LOSSES.index(name)) for name in ("cross_entropy", "swish", "symba", "swish_symba")
)


LossArguments = namedtuple(
    "LossArguments",
    "target losses grad_tau learned_tau grad_scale tau margin label_smoothing theta theta_gap alpha scale",
)
"""target [B]; losses and grad_tau [B] are written; learned_tau and grad_scale: pointers to one number; scale: d(reduced loss) / d(one loss)."""


def arguments(loss, batch, losses, grad_tau=None):
    """LossArguments of a spec.Loss."""
    return LossArguments(
        loss.target, losses, grad_tau, loss.learned_tau, loss.grad_scale, loss.tau, loss.margin, loss.label_smoothing, loss.theta, loss.theta_gap,
        loss.alpha, loss.scale(batch),
    )  # fmt: skip


NO_LOSS = LossArguments(None, None, None, None, None, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def constant(loss):
    """The number of a spec.Loss in the kernels."""
    return spec.LOSSES.index(loss.name)


@triton.jit
def gradient_scale(loss: LossArguments):
    """The factor of all gradients."""
    scale = loss.scale
    if loss.grad_scale is not None:
        scale *= tl.load(loss.grad_scale).to(tl.float32)
    return scale


@triton.jit
def cross_entropy(g, n, k, loss: LossArguments, B, K):
    """Margin cross-entropy of the samples n [NS] from their goodness g [NS, KP] of the classes k [KP], as `of_goodness` returns it.

    A label outside 0..K-1 makes its sample's loss NaN."""
    t = tl.load(loss.target + n, mask=n < B, other=0)
    tau = loss.tau
    if loss.learned_tau is not None:
        tau *= tl.load(loss.learned_tau).to(tl.float32)
    known = (k < K)[None, :]
    hit = k[None, :] == t[:, None]
    u = g * tau - tl.where(hit, loss.margin, 0.0)
    masked = tl.where(known, u, float("-inf"))
    top = tl.max(masked, 1)
    lse = top + tl.log(tl.sum(tl.exp(masked - top[:, None]), 1))
    q = tl.where(hit, 1 - loss.label_smoothing, 0.0) + loss.label_smoothing / K
    value = tl.where((t >= 0) & (t < K), lse - tl.sum(tl.where(known, q * u, 0.0), 1), float("nan"))
    slope = tl.where(known & (n < B)[:, None], (tl.exp(u - lse[:, None]) - q) * gradient_scale(loss), 0.0)
    return slope * tau, value, tl.sum(slope * tl.where(known, g, 0.0), 1) * loss.tau


@triton.jit
def threshold(z, LOSS: tl.constexpr):
    """softplus(z), or z sigmoid(z) of the "swish" losses, and the derivative."""
    s = 1 / (1 + tl.exp(-z))
    if (LOSS == SWISH) or (LOSS == SWISH_SYMBA):  # noqa: SIM109
        return z * s, s * (1 + z * (1 - s))
    return tl.maximum(z, 0.0) + tl.log(1 + tl.exp(-tl.abs(z))), s


@triton.jit
def of_samples(g, positive, loss: LossArguments, LOSS: tl.constexpr):
    """Loss of the goodness of samples, positive ones or negative ones, and its derivative by g."""
    sign = tl.where(positive, 1.0, -1.0)
    theta = loss.theta + tl.where(positive, 0.0, loss.theta_gap)
    value, slope = threshold(sign * (theta - g), LOSS)
    return value, -sign * slope


@triton.jit
def of_pairs(positive, negative, alpha, LOSS: tl.constexpr):
    """Loss of pairs of goodness, and its derivative by that of the negative samples (which is minus that of the positive ones)."""
    value, slope = threshold(-alpha * (positive - negative), LOSS)
    return value, alpha * slope


@triton.jit
def of_goodness(g, n, k, loss: LossArguments, B, K, LOSS: tl.constexpr):
    """(d [NS, KP], losses [NS], d(loss)/d(learned_tau) [NS]) of the samples n [NS], of which the first half are positive, from their goodness
    g [NS, KP] of the classes k [KP]; d is 0 where there is no sample or class. Not for the losses of pairs."""
    if LOSS == CROSS_ENTROPY:
        d, value, grad_tau = cross_entropy(g, n, k, loss, B, K)
    else:
        known = (n < B)[:, None] & (k < K)[None, :]
        value, slope = of_samples(g, (n < B // 2)[:, None], loss, LOSS)
        d = tl.where(known, slope * (gradient_scale(loss) / K), 0.0)
        value = tl.sum(tl.where(known, value, 0.0), 1) / K
        grad_tau = value * 0
    return d, value, grad_tau


@triton.jit
def losses_of(g, d, loss: LossArguments, n, B, K, LOSS: tl.constexpr, NS: tl.constexpr, KP: tl.constexpr):
    """Read g [B, K] of the samples (or of the pairs n and n + B / 2) n [NS]; write their losses, d, and d(loss)/d(learned_tau) where there is a
    pointer for it. KP: a power of two, at least K."""
    k = tl.arange(0, KP)
    half = B // 2
    at = n[:, None] * K + k[None, :]
    if (LOSS == SYMBA) or (LOSS == SWISH_SYMBA):  # noqa: SIM109
        valid = n < half
        known = valid[:, None] & (k < K)[None, :]
        positive, negative = tl.load(g + at, mask=known, other=0.0), tl.load(g + half * K + at, mask=known, other=0.0)
        value, dk = of_pairs(positive, negative, loss.alpha, LOSS)
        dk *= gradient_scale(loss) / K
        tl.store(d + half * K + at, dk, mask=known)
        dk = -dk
        value = tl.sum(tl.where(known, value, 0.0), 1) / K
    else:
        valid = n < B
        known = valid[:, None] & (k < K)[None, :]
        dk, value, grad_tau = of_goodness(tl.load(g + at, mask=known, other=0.0), n, k, loss, B, K, LOSS)
        if loss.grad_tau is not None:
            tl.store(loss.grad_tau + n, grad_tau, mask=valid)
    tl.store(d + at, dk, mask=known)
    tl.store(loss.losses + n, value, mask=valid)


@triton.jit(do_not_specialize=["B"])
def loss_kernel(g, d, loss: LossArguments, B, K, LOSS: tl.constexpr, NS: tl.constexpr, KP: tl.constexpr):
    """The loss by itself: NS samples (or pairs) a program."""
    losses_of(g, d, loss, tl.program_id(0).to(tl.int64) * NS + tl.arange(0, NS), B, K, LOSS, NS, KP)


def buffers(loss, g):
    """Memory for (losses, d(loss)/d(learned_tau) or None) of g [B, K]."""
    losses = g.new_empty(loss.count(len(g)))
    return losses, None if loss.learned_tau is None else torch.empty_like(losses)


def run(g, d, loss, losses, grad_tau):
    """Write losses, d and grad_tau of g [B, K] in a launch of its own."""
    (B, K), KP = g.shape, triton.next_power_of_2(g.shape[1])
    NS = 4 if KP <= 1024 else 1
    loss_kernel[(-(-B // NS),)](
        g, d, arguments(loss, B, losses, grad_tau), B, K, LOSS=constant(loss), NS=NS, KP=KP, num_warps=4 if KP <= 4096 else 16
    )  # fmt: skip
