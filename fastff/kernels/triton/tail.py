"""The tail of a block around the goodness kernels: batch norm, residual and activation as they load a tile, their gradients as they store it.

    statistics   mean and variance of each channel: partial sums by program, added in a fixed order       reads y
    sweeps       of goodness.py: x = activation((y - mean) scale + shift + residual) is made of every tile that is loaded and never written;
                 dL/dh and its two sums by channel leave with the second sweep                            reads y, residual; writes dL/dh, next input
    in parts     the same by two kernels around goodness_step, which write and read x: for more channels than fit beside y and the residual,
                 whose samples are small
    finish       dL/dy = scale (dL/dh - mean(dL/dh) - (y - mean) mean(dL/dh (y - mean)) / var)            reads y, dL/dh; writes dL/dy over it

Formulas: fastff/reference.py. Never run on a GPU yet: interpreted and compiled ahead of time only (tests/test_triton.py).
"""

import torch
import triton
import triton.language as tl

from fastff.kernels.composed import tail as composed
from fastff.kernels.composed.goodness import dense, empty_like, is_rows
from fastff.kernels.triton import goodness
from fastff.kernels.triton.goodness import multiprocessors, on_device, strides
from fastff.kernels.triton.goodness_kernels import before_activation, slope, tile

ROWS = 64  # positions of a tile


@triton.jit
def channel_sums(y, partial, positions, C, P, share, yb, yc, yp, R: tl.constexpr, BC: tl.constexpr):
    """Program (i, j): sums of y - y[first position] and of its square over positions j share .. (j + 1) share - 1 of the batch; [parts, 2, C]."""
    part = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    has_c = c < C
    pivot = tl.load(y + c * yc, mask=has_c, other=0.0).to(tl.float32)
    total = tl.zeros([BC, R], tl.float32)
    square = tl.zeros([BC, R], tl.float32)
    start = part.to(tl.int64) * share
    for r0 in range(0, share, R):
        row = start + r0 + tl.arange(0, R)
        inside = (row < start + share) & (row < positions)
        at = (row // P) * yb + (row % P) * yp
        mask = has_c[:, None] & inside[None, :]
        value = tl.load(y + at[None, :] + c[:, None] * yc, mask=mask, other=0.0).to(tl.float32)
        off = tl.where(mask, value - pivot[:, None], 0.0)
        total += off
        square += off * off
    own = partial + part * 2 * C + c
    tl.store(own, tl.sum(total, 1), mask=has_c)
    tl.store(own + C, tl.sum(square, 1), mask=has_c)


@triton.jit
def apply(y, residual, affine, x, positions, C, P, yb, yc, yp, ACT: tl.constexpr, R: tl.constexpr, BC: tl.constexpr):
    """x of R positions and BC channels."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    mask = (c < C)[:, None] & (row < positions)[None, :]
    at = ((row // P) * yb + (row % P) * yp)[None, :] + c[:, None] * yc
    tl.store(x + at, tile(y, residual, affine, at, c, C, mask, ACT), mask=mask)


@triton.jit
def derive(
    y,
    residual,
    affine,
    grad,
    partial,
    positions,
    C,
    P,
    share,
    yb,
    yc,
    yp,
    ACT: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
):
    """dL/dh over dL/dx, and its sums as in channel_sums: of dL/dh and of dL/dh (y - mean)."""
    part = tl.program_id(1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    has_c = c < C
    total = tl.zeros([BC, R], tl.float32)
    product = tl.zeros([BC, R], tl.float32)
    start = part.to(tl.int64) * share
    for r0 in range(0, share, R):
        row = start + r0 + tl.arange(0, R)
        inside = (row < start + share) & (row < positions)
        at = ((row // P) * yb + (row % P) * yp)[None, :] + c[:, None] * yc
        mask = has_c[:, None] & inside[None, :]
        h, off = before_activation(y, residual, affine, at, c, C, mask)
        value = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        value = tl.where(mask, value * slope(h, ACT), 0.0)
        tl.store(grad + at, value.to(grad.dtype.element_ty), mask=mask)
        total += value
        product += value * off
    own = partial + part * 2 * C + c
    tl.store(own, tl.sum(total, 1), mask=has_c)
    tl.store(own + C, tl.sum(product, 1), mask=has_c)


@triton.jit
def finish(y, grad_h, grad_y, affine, means, positions, C, P, yb, yc, yp, R: tl.constexpr, BC: tl.constexpr):
    """dL/dy of R positions and BC channels; means [2, C] of dL/dh and of dL/dh (y - mean) / var; grad_y may be grad_h."""
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    has_c = c < C
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    mask = has_c[:, None] & (row < positions)[None, :]
    at = ((row // P) * yb + (row % P) * yp)[None, :] + c[:, None] * yc
    mean = tl.load(affine + c, mask=has_c, other=0.0)
    scale = tl.load(affine + C + c, mask=has_c, other=0.0)
    first = tl.load(means + c, mask=has_c, other=0.0)
    second = tl.load(means + C + c, mask=has_c, other=0.0)
    off = tl.load(y + at, mask=mask, other=0.0).to(tl.float32) - mean[:, None]
    grad = tl.load(grad_h + at, mask=mask, other=0.0).to(tl.float32)
    grad = (grad - first[:, None] - off * second[:, None]) * scale[:, None]
    tl.store(grad_y + at, grad.to(grad_y.dtype.element_ty), mask=mask)


def channels_of_a_tile(C):
    return min(max(16, triton.next_power_of_2(C)), 64)


class Walk:
    """Launches of the kernels here over all of dense y: by tile, or by share of the positions with partial sums, added in a fixed order."""

    def __init__(self, y):
        B, C, H, W = y.shape
        self.y, self.BC, self.positions = y, channels_of_a_tile(C), B * H * W
        self.blocks = -(-C // self.BC)
        self.sizes = (C, H * W, y.stride(0), *strides(y))

    def tiles(self, kernel, *tensors, **constants):
        C, P, *offsets = self.sizes
        kernel[(-(-self.positions // ROWS), self.blocks)](
            self.y, *tensors, self.positions, C, P, *offsets, **constants, R=ROWS, BC=self.BC, num_warps=4
        )

    def sums(self, kernel, *tensors, **constants):
        """[2, C]"""
        C, P, *offsets = self.sizes
        parts = max(1, min(4 * multiprocessors(self.y.device) // self.blocks, -(-self.positions // (4 * ROWS))))
        share = -(-self.positions // (parts * ROWS)) * ROWS
        parts = -(-self.positions // share)
        partial = torch.empty((parts, 2, C), device=self.y.device, dtype=torch.float32)
        kernel[(self.blocks, parts)](
            self.y,
            *tensors,
            partial,
            self.positions,
            C,
            P,
            share,
            *offsets,
            **constants,
            R=ROWS,
            BC=self.BC,
            num_warps=8,
        )
        return partial.sum(0)


def fused(y, plan):
    """Whether y, the residual and what is made of them fit beside a tile of the sweeps without spilling (tests/test_triton.py)."""
    return plan.algorithm == "second_moment" or y.shape[1] <= (256 if y.element_size() == 2 else 64)


def tail_step(y, tail, head, step):
    """(what goodness_step gives, Gradients)."""
    weight, bias, grid_weight, padding, plan, _, loss, normalize, eps = head
    with on_device(y):
        y = dense(y)
        walk, act = Walk(y), composed.ACTIVATIONS.index(tail.activation)
        residual = None if tail.residual is None else dense(tail.residual)
        if residual is not None and is_rows(residual) != is_rows(y):
            residual = empty_like(y).copy_(residual)
        off, square = walk.sums(channel_sums) / walk.positions
        mean, var = y[0, :, 0, 0] + off, (square - off * off).clamp_(min=0)
        rstd = (var + tail.eps).rsqrt()
        scale = rstd if tail.weight is None else rstd * tail.weight.float()
        affine = torch.stack([mean, scale, torch.zeros_like(mean) if tail.bias is None else tail.bias.float()])
        if goodness.fits(y, weight, padding) and fused(y, plan):
            launch = goodness.Launch(y, weight, bias, grid_weight, plan, residual, affine, act)
            grad_h = empty_like(y)
            results = goodness.step(launch, loss, grad_h, normalize, eps)
            sums = launch.channel_sums.sum(0)
        else:
            x = empty_like(y)
            walk.tiles(apply, residual, affine, x, ACT=act)
            results = step(x)
            grad_h = results[2]
            sums = walk.sums(derive, residual, affine, grad_h, ACT=act)
        means = torch.stack([sums[0], sums[1] * rstd * rstd]) / walk.positions
        grad_y = empty_like(y) if tail.need_residual else grad_h
        walk.tiles(finish, grad_h, grad_y, affine, means)
        grad_residual = grad_h if tail.need_residual else None
        return results, composed.Gradients(grad_y, grad_residual, sums[1] * rstd, sums[0], mean, var)
