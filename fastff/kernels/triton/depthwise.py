"""Depthwise convolution, k x k with one filter a channel: forward, dL/dweight, and dL/dx where it is asked for.

A tile is [R, BC], R output positions (of all samples, in a row) by BC channels; its k^2 loads of x overlap and come out of L1 and L2, so each array
moves through device memory once: forward reads x and writes y, dL/dweight reads x and the gradient, dL/dx reads the gradient and writes dL/dx.
That is the floor; arithmetic is k^2 multiply-adds an element, 9 to 25 for 4 bytes moved, on a chip that has 20 for 1: memory bounds it.
Lanes run along channels in channels_last and along positions otherwise (Triton orders a tile by the stride that is 1).
dL/dweight: one partial result a program, added in a fixed order. float32 accumulation.

Never run on a GPU yet: interpreted and compiled ahead of time only (tests/test_triton.py).
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl

from fastff.kernels.layout import dense, empty_like, is_channels_last
from fastff.kernels.torch.depthwise import out_like
from fastff.kernels.triton.launch import constants, multiprocessors, on_device, shares

Image = namedtuple("Image", "x H W")
"""x [B, C, H, W] or another tensor of this form."""


Config = namedtuple("Config", "STRIDE PADDING KERNEL ADJOINT TAPS LAST C R BC")
"""Constants: those of the convolution; whether it is the adjoint; k^2, padded; whether memory is channels_last, and channels (which say how many
bytes an access may take); output positions and channels of a tile."""


@triton.jit
def positions_at(image: Image, rows, B):
    """(sample, row, column, whether it exists) of the positions `rows` of the batch."""
    place = rows % (image.H * image.W)
    b = rows // (image.H * image.W)
    return b, place // image.W, place % image.W, b < B


@triton.jit
def offsets(image: Image, b, h, w, c, config: Config):
    """Offsets of a tile [R, BC]."""
    if config.LAST:
        at = (((b * image.H + h) * image.W + w) * config.C)[:, None] + c[None, :]
    else:
        at = ((b * config.C * image.H + h) * image.W + w)[:, None] + c[None, :] * (image.H * image.W)
    return at


@triton.jit
def load(image: Image, b, h, w, here, c, config: Config):
    """A tile [R, BC] in float32: 0 where not `here`."""
    mask = here[:, None] & (c < config.C)[None, :]
    return tl.load(image.x + offsets(image, b, h, w, c, config), mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["B"])
def convolve(source: Image, weight, result: Image, B, config: Config):
    """y from x; ADJOINT: dL/dx (the result) from the gradient (the source) of a convolution with this stride and padding.

    Program (i, j): R positions, BC channels."""
    rows = tl.program_id(0).to(tl.int64) * config.R + tl.arange(0, config.R)
    c = tl.program_id(1) * config.BC + tl.arange(0, config.BC)
    known = c < config.C
    b, i, j, here = positions_at(result, rows, B)
    total = tl.zeros([config.R, config.BC], tl.float32)
    for u in range(config.KERNEL):
        for v in tl.static_range(config.KERNEL):
            if config.ADJOINT:
                h, w = i + config.PADDING - u, j + config.PADDING - v
                inside = (h >= 0) & (w >= 0) & (h % config.STRIDE == 0) & (w % config.STRIDE == 0)
                h, w = h // config.STRIDE, w // config.STRIDE
            else:
                h, w = i * config.STRIDE + u - config.PADDING, j * config.STRIDE + v - config.PADDING
                inside = (h >= 0) & (w >= 0)
            inside &= here & (h < source.H) & (w < source.W)
            value = load(source, b, h, w, inside, c, config)
            tap = weight + c * (config.KERNEL * config.KERNEL) + (u * config.KERNEL + v)
            total += value * tl.load(tap, mask=known, other=0.0).to(tl.float32)[None, :]
    mask = here[:, None] & known[None, :]
    tl.store(result.x + offsets(result, b, i, j, c, config), total.to(result.x.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["B", "share"])
def weight_gradient(source: Image, grad: Image, partial, B, share, config: Config):
    """Program (i, j): partial [programs i, k^2, C] = sum over tiles i share .. (i + 1) share - 1 of R positions of grad * shifted x."""
    part = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * config.BC + tl.arange(0, config.BC)
    tap = tl.arange(0, config.TAPS)
    total = tl.zeros([config.TAPS, config.BC], tl.float32)
    for tile in range(share):
        rows = (part * share + tile) * config.R + tl.arange(0, config.R)
        b, i, j, here = positions_at(grad, rows, B)
        g = load(grad, b, i, j, here, c, config)
        for u in range(config.KERNEL):
            for v in tl.static_range(config.KERNEL):
                h, w = i * config.STRIDE + u - config.PADDING, j * config.STRIDE + v - config.PADDING
                inside = here & (h >= 0) & (w >= 0) & (h < source.H) & (w < source.W)
                value = load(source, b, h, w, inside, c, config)
                own = (tap == u * config.KERNEL + v)[:, None]
                total += tl.where(own, tl.sum(g * value, 0)[None, :], 0.0)
    at = (part * (config.KERNEL * config.KERNEL) + tap[:, None]) * config.C + c[None, :]
    tl.store(partial + at, total, mask=(tap < config.KERNEL * config.KERNEL)[:, None] & (c < config.C)[None, :])


def tiles(channels_last, C):
    """(R, BC, warps): 512 elements, 4 a thread: a row of k taps is unrolled, its loads in flight at once (more elements, or all k^2, spill).

    Lanes along channels take up to 64 of them; lanes along positions, few channels a tile."""
    BC = min(64, max(16, triton.next_power_of_2(C))) if channels_last else 4
    return 512 // BC, BC, 4


def _config(x, weight, stride, padding, adjoint=False):
    """(Config, warps) for tiles of tensors laid out as x."""
    k, last, C = weight.shape[2], is_channels_last(x), x.shape[1]
    R, BC, warps = tiles(last and C > 1, C)
    return Config(stride, padding, k, adjoint, triton.next_power_of_2(k * k), last, C, R, BC), warps


def forward(x, weight, stride, padding):
    """y"""
    x, y = dense(x), out_like(x, weight, stride, padding)
    _convolve(x, weight, y, _config(x, weight, stride, padding))
    return y


def _convolve(x, weight, y, config):
    """Write y."""
    config, warps = config
    programs = -(-(y.shape[0] * y.shape[2] * y.shape[3]) // config.R)
    if programs:
        with on_device(x):
            grid, images = (programs, -(-x.shape[1] // config.BC)), [Image(t, *t.shape[2:]) for t in (x, y)]
            convolve[grid](images[0], weight.contiguous(), images[1], len(x), constants(config), num_warps=warps)


def backward(grad, x, weight, stride, padding, need_grad_x):
    """(dL/dx or None, dL/dweight)."""
    x, k = dense(x), weight.shape[2]
    grad = grad.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)
    B, C = x.shape[:2]
    grad_x = empty_like(x) if need_grad_x else None
    if need_grad_x:
        _convolve(grad, weight, grad_x, _config(x, weight, stride, padding, adjoint=True))
    config, warps = _config(x, weight, stride, padding)
    count = -(-(B * grad.shape[2] * grad.shape[3]) // config.R)
    groups = -(-C // config.BC)
    share, parts = shares(count, 4 * multiprocessors(x.device) // groups)
    partial = torch.empty(parts, k * k, C, device=x.device, dtype=torch.float32)
    with on_device(x):
        images = [Image(t, *t.shape[2:]) for t in (x, grad)]
        weight_gradient[parts, groups](
            *images, partial, B, share, constants(config), num_warps=warps,
            maxnreg=128,  # else the assembler for sm_80 takes 96, and spills
        )  # fmt: skip
    return grad_x, partial.sum(0).T.reshape(weight.shape).to(weight.dtype)
