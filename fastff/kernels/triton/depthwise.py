"""Depthwise convolution, k x k with one filter a channel: forward with batch norm's sums, dL/dweight, and dL/dx where it is asked for.

A tile is [R, BC], R output positions (of all samples, in a row) by BC channels; its k^2 loads of x overlap and come out of L1 and L2, so each array
moves through device memory once: forward reads x and writes y, dL/dweight reads x and the gradient, dL/dx reads the gradient and writes dL/dx.
That is the floor; arithmetic is k^2 multiply-adds an element, 9 to 25 for 4 bytes moved, on a chip that has 20 for 1: memory bounds it.
Lanes run along channels in channels_last and along positions otherwise (Triton orders a tile by the stride that is 1).
Sums and dL/dweight: one partial result a program, added in a fixed order. float32 accumulation.

Never run on a GPU yet: interpreted and compiled ahead of time only (tests/test_triton.py).
"""

import torch
import triton
import triton.language as tl

from fastff.kernels.composed.depthwise import out_like
from fastff.kernels.composed.goodness import dense, empty_like, is_rows
from fastff.kernels.triton.goodness import multiprocessors, on_device


@triton.jit
def convolve(
    x, weight, y, sums, B, C, H, W, HO, WO, xb, xc, xh, xw, yb, yc, yh, yw,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, KERNEL: tl.constexpr, ADJOINT: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y [B, C, HO, WO] from x [B, C, H, W]; ADJOINT: dL/dx (as y) from the gradient (as x) of a convolution with this stride and padding.

    Program (i, j): R positions, BC channels. sums [programs i, 2, C] of y and y^2, or None."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    b, place = rows // (HO * WO), rows % (HO * WO)
    i, j = place // WO, place % WO
    here, known = b < B, c < C
    total = tl.zeros([R, BC], tl.float32)
    for u in range(KERNEL):
        for v in tl.static_range(KERNEL):
            if ADJOINT:
                h, w = i + PADDING - u, j + PADDING - v
                inside = (h >= 0) & (w >= 0) & (h % STRIDE == 0) & (w % STRIDE == 0)
                h, w = h // STRIDE, w // STRIDE
                inside &= (h < H) & (w < W)
            else:
                h, w = i * STRIDE + u - PADDING, j * STRIDE + v - PADDING
                inside = (h >= 0) & (w >= 0) & (h < H) & (w < W)
            at = (b * xb + h * xh + w * xw)[:, None] + (c * xc)[None, :]
            value = tl.load(x + at, mask=(here & inside)[:, None] & known[None, :], other=0.0).to(tl.float32)
            filter_ = tl.load(weight + c * (KERNEL * KERNEL) + (u * KERNEL + v), mask=known, other=0.0).to(tl.float32)
            total += value * filter_[None, :]
    mask = here[:, None] & known[None, :]
    narrow = total.to(y.dtype.element_ty)
    tl.store(y + (b * yb + i * yh + j * yw)[:, None] + (c * yc)[None, :], narrow, mask=mask)
    if sums is not None:
        stored = tl.where(mask, narrow.to(tl.float32), 0.0)
        at = tl.program_id(0).to(tl.int64) * 2 * C + c
        tl.store(sums + at, tl.sum(stored, 0), mask=known)
        tl.store(sums + at + C, tl.sum(stored * stored, 0), mask=known)


@triton.jit
def weight_gradient(
    x, grad, partial, B, C, H, W, HO, WO, share, xb, xc, xh, xw, yb, yc, yh, yw,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, KERNEL: tl.constexpr, TAPS: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Program (i, j): partial [programs i, k^2, C] = sum over tiles i share .. (i + 1) share - 1 of R positions of grad * shifted x."""
    part = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    known = c < C
    tap = tl.arange(0, TAPS)
    total = tl.zeros([TAPS, BC], tl.float32)
    for tile in range(share):
        rows = (part * share + tile) * R + tl.arange(0, R)
        b, place = rows // (HO * WO), rows % (HO * WO)
        i, j = place // WO, place % WO
        here = b < B
        g = tl.load(
            grad + (b * yb + i * yh + j * yw)[:, None] + (c * yc)[None, :],
            mask=here[:, None] & known[None, :],
            other=0.0,
        ).to(tl.float32)
        for u in range(KERNEL):
            for v in tl.static_range(KERNEL):
                h, w = i * STRIDE + u - PADDING, j * STRIDE + v - PADDING
                inside = here & (h >= 0) & (w >= 0) & (h < H) & (w < W)
                at = (b * xb + h * xh + w * xw)[:, None] + (c * xc)[None, :]
                value = tl.load(x + at, mask=inside[:, None] & known[None, :], other=0.0).to(tl.float32)
                total += tl.where((tap == u * KERNEL + v)[:, None], tl.sum(g * value, 0)[None, :], 0.0)
    at = (part * (KERNEL * KERNEL) + tap[:, None]) * C + c[None, :]
    tl.store(partial + at, total, mask=(tap < KERNEL * KERNEL)[:, None] & known[None, :])


def tiles(channels_last, C):
    """(R, BC, warps): 512 elements, 4 a thread: a row of k taps is unrolled, its loads in flight at once (more elements, or all k^2, spill).

    Lanes along channels take up to 64 of them; lanes along positions, few channels a tile."""
    BC = min(64, max(16, triton.next_power_of_2(C))) if channels_last else 4
    return 512 // BC, BC, 4


def _sizes(x, weight, stride, padding):
    """(R, BC, what both kernels take as constants)."""
    R, BC, warps = tiles(is_rows(x) and x.shape[1] > 1, x.shape[1])
    sizes = {"STRIDE": stride, "PADDING": padding, "KERNEL": weight.shape[2], "R": R, "BC": BC, "num_warps": warps}
    return R, BC, sizes


def forward(x, weight, stride, padding, sums=True):
    """(y, sums [2, C] or None)."""
    y = out_like(x, weight, stride, padding)
    x = dense(x)
    return y, _convolve(x, weight, y, stride, padding, sums)


def _convolve(x, weight, y, stride, padding, sums=False, adjoint=False):
    C = x.shape[1]
    R, BC, sizes = _sizes(y, weight, stride, padding)
    programs = -(-(y.shape[0] * y.shape[2] * y.shape[3]) // R)
    partial = torch.empty(programs, 2, C, device=x.device, dtype=torch.float32) if sums else None
    if programs:
        with on_device(x):
            convolve[(programs, -(-C // BC))](
                x, weight.contiguous(), y, partial, x.shape[0], C, *x.shape[2:], *y.shape[2:], *x.stride(), *y.stride(), ADJOINT=adjoint, **sizes
            )  # fmt: skip
    return partial.sum(0) if sums else None


def backward(grad, x, weight, stride, padding, need_x):
    """(dL/dx or None, dL/dweight)."""
    x, grad, k = dense(x), dense(grad), weight.shape[2]
    B, C = x.shape[:2]
    dx = empty_like(x) if need_x else None
    if need_x:
        _convolve(grad, weight, dx, stride, padding, adjoint=True)
    R, BC, sizes = _sizes(x, weight, stride, padding)
    count = -(-(B * grad.shape[2] * grad.shape[3]) // R)
    groups = -(-C // BC)
    parts = max(1, min(count, 4 * multiprocessors(x.device) // groups))
    share = -(-count // parts)
    partial = torch.empty(parts, k * k, C, device=x.device, dtype=torch.float32)
    with on_device(x):
        weight_gradient[(parts, groups)](
            x, grad, partial, B, C, *x.shape[2:], *grad.shape[2:], share, *x.stride(), *grad.stride(),
            TAPS=triton.next_power_of_2(k * k), **sizes,
        )  # fmt: skip
    return dx, partial.sum(0).T.reshape(weight.shape).to(weight.dtype)
