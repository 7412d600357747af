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
def cross_entropy(g, d, loss: LossArguments, n, B, K, NS: tl.constexpr, BK: tl.constexpr):
    """Margin cross-entropy of the samples n [NS], by an online softmax over tiles of BK classes.

    A label outside 0..K-1 makes its sample's loss NaN."""
    valid = n < B
    t = tl.load(loss.target + n, mask=valid, other=0)
    tau, smoothing = loss.tau, loss.label_smoothing
    if loss.learned_tau is not None:
        tau *= tl.load(loss.learned_tau).to(tl.float32)
    scale = gradient_scale(loss)
    top = tl.full([NS], float("-inf"), tl.float32)
    total = tl.zeros([NS], tl.float32)
    hit_u = tl.zeros([NS], tl.float32)
    sum_u = tl.zeros([NS], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        known = (k < K)[None, :]
        hit = k[None, :] == t[:, None]
        gk = tl.load(g + n[:, None] * K + k[None, :], mask=valid[:, None] & known, other=0.0)
        u = gk * tau - tl.where(hit, loss.margin, 0.0)
        masked = tl.where(known, u, float("-inf"))
        new = tl.maximum(top, tl.max(masked, 1))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(masked - new[:, None]), 1)
        top = new
        hit_u += tl.sum(tl.where(hit, u, 0.0), 1)
        sum_u += tl.sum(tl.where(known, u, 0.0), 1)
    lse = top + tl.log(total)
    value = lse - (1 - smoothing) * hit_u - smoothing / K * sum_u
    value = tl.where((t >= 0) & (t < K), value, float("nan"))
    tl.store(loss.losses + n, value, mask=valid)
    grad_tau = tl.zeros([NS], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        known = valid[:, None] & (k < K)[None, :]
        hit = k[None, :] == t[:, None]
        gk = tl.load(g + n[:, None] * K + k[None, :], mask=known, other=0.0)
        u = gk * tau - tl.where(hit, loss.margin, 0.0)
        q = tl.where(hit, 1 - smoothing, 0.0) + smoothing / K
        dk = (tl.exp(u - lse[:, None]) - q) * scale
        grad_tau += tl.sum(tl.where(known, dk * gk, 0.0), 1)
        tl.store(d + n[:, None] * K + k[None, :], dk * tau, mask=known)
    if loss.grad_tau is not None:
        tl.store(loss.grad_tau + n, grad_tau, mask=valid)


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
def forward_forward(g, d, loss: LossArguments, n, B, K, LOSS: tl.constexpr, NS: tl.constexpr, BK: tl.constexpr):
    """The other losses: of the samples n [NS], the first half of which are positive, or of the pairs n and n + B / 2."""
    half = B // 2
    BY_SAMPLE: tl.constexpr = (LOSS != SYMBA) and (LOSS != SWISH_SYMBA)
    valid = n < (B if BY_SAMPLE else half)
    scale = gradient_scale(loss) / K
    total = tl.zeros([NS], tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        known = valid[:, None] & (k < K)[None, :]
        at = n[:, None] * K + k[None, :]
        gk = tl.load(g + at, mask=known, other=0.0)
        if BY_SAMPLE:
            value, dk = of_samples(gk, (n < half)[:, None], loss, LOSS)
            tl.store(d + at, dk * scale, mask=known)
        else:
            partner = at + half * K
            value, dk = of_pairs(gk, tl.load(g + partner, mask=known, other=0.0), loss.alpha, LOSS)
            tl.store(d + partner, dk * scale, mask=known)
            tl.store(d + at, -dk * scale, mask=known)
        total += tl.sum(tl.where(known, value, 0.0), 1)
    tl.store(loss.losses + n, total / K, mask=valid)


@triton.jit
def losses_of(g, d, loss: LossArguments, n, B, K, LOSS: tl.constexpr, NS: tl.constexpr, BK: tl.constexpr):
    """Read g of the samples (or pairs) n [NS]; write their losses, d, and d(loss)/d(learned_tau) where there is a pointer for it."""
    if LOSS == CROSS_ENTROPY:
        cross_entropy(g, d, loss, n, B, K, NS, BK)
    else:
        forward_forward(g, d, loss, n, B, K, LOSS, NS, BK)


@triton.jit
def loss_kernel(g, d, loss: LossArguments, B, K, LOSS: tl.constexpr, NS: tl.constexpr, BK: tl.constexpr):
    """The loss by itself: NS samples (or pairs) a program."""
    n = tl.program_id(0).to(tl.int64) * NS + tl.arange(0, NS)
    losses_of(g, d, loss, n, B, K, LOSS, NS, BK)


def buffers(loss, g):
    """Memory for (losses, d(loss)/d(learned_tau) or None) of g [B, K]."""
    losses = g.new_empty(loss.count(len(g)))
    return losses, None if loss.learned_tau is None else torch.empty_like(losses)


def run(g, d, loss, losses, grad_tau):
    """Write losses, d and grad_tau of g [B, K] in a launch of its own."""
    B, K = g.shape
    tile = min(max(16, triton.next_power_of_2(K)), 256)
    loss_kernel[(-(-B // 4),)](
        g, d, arguments(loss, B, losses, grad_tau), B, K, LOSS=constant(loss), NS=4, BK=tile, num_warps=4
    )
