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

Image = namedtuple("Image", "x B C H W sample_stride channel_stride row_stride column_stride")
"""x [B, C, H, W] or another tensor of this form, by strides."""


Config = namedtuple("Config", "STRIDE PADDING KERNEL ADJOINT TAPS R BC")
"""Constants: those of the convolution; whether it is the adjoint; k^2, padded; output positions and channels of a tile."""


@triton.jit
def positions_at(image: Image, rows):
    """(sample, row, column, whether it exists) of the positions `rows` of the batch."""
    place = rows % (image.H * image.W)
    b = rows // (image.H * image.W)
    return b, place // image.W, place % image.W, b < image.B


@triton.jit
def load(image: Image, b, h, w, here, c):
    """A tile [R, BC] in float32: 0 where not `here`."""
    at = (b * image.sample_stride + h * image.row_stride + w * image.column_stride)[:, None]
    mask = here[:, None] & (c < image.C)[None, :]
    return tl.load(image.x + at + (c * image.channel_stride)[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def convolve(source: Image, weight, result: Image, config: Config):
    """y from x; ADJOINT: dL/dx (the result) from the gradient (the source) of a convolution with this stride and padding.

    Program (i, j): R positions, BC channels."""
    rows = tl.program_id(0).to(tl.int64) * config.R + tl.arange(0, config.R)
    c = tl.program_id(1) * config.BC + tl.arange(0, config.BC)
    known = c < source.C
    b, i, j, here = positions_at(result, rows)
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
            value = load(source, b, h, w, inside, c)
            tap = weight + c * (config.KERNEL * config.KERNEL) + (u * config.KERNEL + v)
            total += value * tl.load(tap, mask=known, other=0.0).to(tl.float32)[None, :]
    mask = here[:, None] & known[None, :]
    at = (b * result.sample_stride + i * result.row_stride + j * result.column_stride)[:, None]
    tl.store(result.x + at + (c * result.channel_stride)[None, :], total.to(result.x.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradient(source: Image, grad: Image, partial, share, config: Config):
    """Program (i, j): partial [programs i, k^2, C] = sum over tiles i share .. (i + 1) share - 1 of R positions of grad * shifted x."""
    part = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * config.BC + tl.arange(0, config.BC)
    tap = tl.arange(0, config.TAPS)
    total = tl.zeros([config.TAPS, config.BC], tl.float32)
    for tile in range(share):
        rows = (part * share + tile) * config.R + tl.arange(0, config.R)
        b, i, j, here = positions_at(grad, rows)
        g = load(grad, b, i, j, here, c)
        for u in range(config.KERNEL):
            for v in tl.static_range(config.KERNEL):
                h, w = i * config.STRIDE + u - config.PADDING, j * config.STRIDE + v - config.PADDING
                inside = here & (h >= 0) & (w >= 0) & (h < source.H) & (w < source.W)
                value = load(source, b, h, w, inside, c)
                own = (tap == u * config.KERNEL + v)[:, None]
                total += tl.where(own, tl.sum(g * value, 0)[None, :], 0.0)
    at = (part * (config.KERNEL * config.KERNEL) + tap[:, None]) * source.C + c[None, :]
    tl.store(partial + at, total, mask=(tap < config.KERNEL * config.KERNEL)[:, None] & (c < source.C)[None, :])


def tiles(channels_last, C):
    """(R, BC, warps): 512 elements, 4 a thread: a row of k taps is unrolled, its loads in flight at once (more elements, or all k^2, spill).

    Lanes along channels take up to 64 of them; lanes along positions, few channels a tile."""
    BC = min(64, max(16, triton.next_power_of_2(C))) if channels_last else 4
    return 512 // BC, BC, 4


def _config(x, weight, stride, padding, adjoint=False):
    """(Config, warps) for tiles of x."""
    k = weight.shape[2]
    R, BC, warps = tiles(is_channels_last(x) and x.shape[1] > 1, x.shape[1])
    return Config(stride, padding, k, adjoint, triton.next_power_of_2(k * k), R, BC), warps


def _image(x):
    return Image(x, *x.shape, *x.stride())


def forward(x, weight, stride, padding):
    """y"""
    y = out_like(x, weight, stride, padding)
    _convolve(dense(x), weight, y, _config(y, weight, stride, padding))
    return y


def _convolve(x, weight, y, config):
    """Write y."""
    config, warps = config
    programs = -(-(y.shape[0] * y.shape[2] * y.shape[3]) // config.R)
    if programs:
        with on_device(x):
            grid = programs, -(-x.shape[1] // config.BC)
            convolve[grid](_image(x), weight.contiguous(), _image(y), constants(config), num_warps=warps)


def backward(grad, x, weight, stride, padding, need_grad_x):
    """(dL/dx or None, dL/dweight)."""
    x, grad, k = dense(x), dense(grad), weight.shape[2]
    B, C = x.shape[:2]
    grad_x = empty_like(x) if need_grad_x else None
    if need_grad_x:
        _convolve(grad, weight, grad_x, _config(grad_x, weight, stride, padding, adjoint=True))
    config, warps = _config(x, weight, stride, padding)
    count = -(-(B * grad.shape[2] * grad.shape[3]) // config.R)
    groups = -(-C // config.BC)
    share, parts = shares(count, 4 * multiprocessors(x.device) // groups)
    partial = torch.empty(parts, k * k, C, device=x.device, dtype=torch.float32)
    with on_device(x):
        weight_gradient[parts, groups](_image(x), _image(grad), partial, share, constants(config), num_warps=warps)
    return grad_x, partial.sum(0).T.reshape(weight.shape).to(weight.dtype)
