"""The epilogue of a block, x = activation(batch_norm(y) + residual), and its gradients: device functions for the goodness kernels, and kernels.

    channel_sums   partial sums of each channel by program                                                    reads y
    finalize       mean and variance, joined in a fixed order, and what batch norm makes of them
    apply          x                                                                                         reads y, residual; writes x
    derive         dL/dh and its two sums by channel, h before the activation                  reads y, residual, dL/dx; writes dL/dh
    add_up         the two sums of all programs, and the gradients of batch norm's parameters
    finish         dL/dy = scale (dL/dh - mean(dL/dh) - (y - mean) mean(dL/dh (y - mean)) / var)             reads y, dL/dh; writes dL/dy

The goodness kernels (goodness/) make x of every tile that they load and never write it; dL/dh and its sums leave with their second sweep, and
their reduction adds these up (store_norm_sums), so only channel_sums, finalize and finish run beside them.

Formulas: fastff/reference.py. Never run on a GPU yet: interpreted and compiled ahead of time only (tests/test_triton.py).
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl

from fastff import reference, spec
from fastff.kernels.layout import as_result_of, dense, empty_like, is_channels_last, samples, widened
from fastff.kernels.torch.normalization import normalize
from fastff.kernels.triton.launch import constants, multiprocessors, on_device, shares
from fastff.kernels.triton.normalization import between, joined, joined_programs, lane_counts
from fastff.spec import EpilogueGradients

RELU, RELU6, HARDSWISH, SILU, GELU = (
    tl.constexpr(spec.ACTIVATIONS.index(name)) for name in ("relu", "relu6", "hardswish", "silu", "gelu")
)

POSITIONS = 64  # of a tile
FEW_CHANNELS, PARTS = 16, 128  # channels of a program that adds up what others have left, and how many of those at once


Source = namedtuple("Source", "x residual affine")
"""What a tile of the head's input is made of: x itself (affine None), or activation((x - mean) scale + shift + residual).

affine [3, C] = mean, scale, shift; residual (or None) has the strides of x."""


Known = namedtuple("Known", "mean var")
"""Mean and variance [C] in float32, or None."""


Tile = namedtuple("Tile", "ACTIVATION LAST C P R BC")
"""Constants of the kernels here: the activation; whether the memory is channels_last; channels and positions of a sample (whose sizes say how
many bytes an access may take); positions and channels of a tile."""


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """The activation of h."""
    if ACTIVATION == RELU:
        h = tl.where(h < 0, 0.0, h)
    elif ACTIVATION == RELU6:
        h = tl.where(h < 0, 0.0, tl.where(h > 6, 6.0, h))
    elif ACTIVATION == HARDSWISH:
        h = h * tl.where(h < -3, 0.0, tl.where(h > 3, 6.0, h + 3)) / 6
    elif ACTIVATION == SILU:
        h = h * tl.sigmoid(h)
    elif ACTIVATION == GELU:
        h = 0.5 * h * (1 + tl.erf(h * 0.7071067811865476))
    return h


@triton.jit
def slope(h, ACTIVATION: tl.constexpr):
    """The activation's derivative at h."""
    if ACTIVATION == RELU:
        value = tl.where(h > 0, 1.0, 0.0)
    elif ACTIVATION == RELU6:
        value = tl.where((h > 0) & (h < 6), 1.0, 0.0)
    elif ACTIVATION == HARDSWISH:
        value = tl.where(h <= -3, 0.0, tl.where(h >= 3, 1.0, h / 3 + 0.5))
    elif ACTIVATION == SILU:
        s = tl.sigmoid(h)
        value = s * (1 + h * (1 - s))
    elif ACTIVATION == GELU:
        value = 0.5 * (1 + tl.erf(h * 0.7071067811865476)) + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
    else:
        value = tl.full(h.shape, 1.0, tl.float32)
    return value


@triton.jit
def before_activation(source: Source, at, c, C, mask):
    """h = (x - mean) scale + shift + residual of a tile [BC, R], and x - mean."""
    mean = tl.load(source.affine + c, mask=c < C, other=0.0)
    scale = tl.load(source.affine + C + c, mask=c < C, other=0.0)
    shift = tl.load(source.affine + 2 * C + c, mask=c < C, other=0.0)
    off = tl.where(mask, tl.load(source.x + at, mask=mask, other=0.0).to(tl.float32) - mean[:, None], 0.0)
    h = off * scale[:, None] + shift[:, None]
    if source.residual is not None:
        h += tl.load(source.residual + at, mask=mask, other=0.0).to(tl.float32)
    return h, off


@triton.jit
def load_tile(source: Source, at, c, C, mask, ACTIVATION: tl.constexpr):
    """The head's input [BC, R], in the type of x."""
    if source.affine is None:
        X = tl.load(source.x + at, mask=mask, other=0.0)
    else:
        h, _ = before_activation(source, at, c, C, mask)
        X = tl.where(mask, activate(h, ACTIVATION), 0.0).to(source.x.dtype.element_ty)
    return X


@triton.jit
def through_activation(grad, source: Source, at, c, C, mask, ACTIVATION: tl.constexpr):
    """dL/dh of a tile from dL/dx, and x - mean; dL/dx twice where there is no epilogue."""
    if source.affine is None:
        off = grad
    else:
        h, off = before_activation(source, at, c, C, mask)
        grad = tl.where(mask, grad * slope(h, ACTIVATION), 0.0)
    return grad, off


@triton.jit
def store_pair(sums, index, first, second, c, C):
    """Write sums[index] of sums [.., 2, C]."""
    at = sums + index * 2 * C + c
    tl.store(at, first, mask=c < C)
    tl.store(at + C, second, mask=c < C)


@triton.jit
def tile_at(start, end, c, tile: Tile):
    """Offsets and mask of a tile [BC, R] of the channels c, of the positions `start` to `end` of the batch."""
    row = start + tl.arange(0, tile.R)
    if tile.LAST:  # noqa: SIM108
        at = row[None, :] * tile.C + c[:, None]
    else:
        at = (row // tile.P * (tile.C * tile.P) + row % tile.P)[None, :] + c[:, None] * tile.P
    return at, (c < tile.C)[:, None] & (row < end)[None, :]


@triton.jit(do_not_specialize=["positions", "tiles"])
def channel_sums(x, partial, positions, tiles, tile: Tile):
    """Program (i, j): sum of x - x[first position] and squares about the mean of the j-th `tiles` tiles of R positions; [parts, 2, C]."""
    part = tl.program_id(1)
    c = tl.program_id(0) * tile.BC + tl.arange(0, tile.BC)
    pivot = first_position(x, c, tile)
    total = tl.zeros([tile.BC, tile.R], tl.float32)
    square = tl.zeros([tile.BC, tile.R], tl.float32)
    start = part.to(tl.int64) * tiles * tile.R
    end = tl.minimum(start + tiles * tile.R, positions)
    for r0 in range(0, tiles * tile.R, tile.R):
        at, mask = tile_at(start + r0, end, c, tile)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        off = tl.where(mask, value - pivot[:, None], 0.0)
        square += tl.where(mask, between(total, r0 / tile.R, off, 1.0), 0.0)
        total += off
    own = end - start
    whole, squares = joined(total, square, lane_counts(own, tl.arange(0, tile.R), tile.R)[None, :], own)
    store_pair(partial, part, whole, squares, c, tile.C)


@triton.jit
def first_position(x, c, tile: Tile):
    """x of the channels c at the first position, the point from which their sums are counted."""
    at = c if tile.LAST else c * tile.P
    return tl.load(x + at, mask=c < tile.C, other=0.0).to(tl.float32)


@triton.jit
def store_statistics(statistics, mean, var, weight, bias, eps, c, C):
    """Write the columns c of statistics [5, C]: mean, scale, shift, variance and 1 / deviation of a batch norm."""
    has_c = c < C
    own = statistics + c
    tl.store(own, mean, mask=has_c)
    tl.store(own + 3 * C, var, mask=has_c)
    rstd = 1 / tl.sqrt(var + eps)
    scale = rstd
    if weight is not None:
        scale *= tl.load(weight + c, mask=has_c, other=0.0).to(tl.float32)
    shift = tl.zeros_like(mean)
    if bias is not None:
        shift = tl.load(bias + c, mask=has_c, other=0.0).to(tl.float32)
    tl.store(own + C, scale, mask=has_c)
    tl.store(own + 2 * C, shift, mask=has_c)
    tl.store(own + 4 * C, rstd, mask=has_c)


@triton.jit(do_not_specialize=["positions", "share", "parts", "eps"])
def finalize(
    x, partial, known: Known, weight, bias, statistics, positions, share, parts, eps, tile: Tile, PARTS: tl.constexpr
):  # fmt: skip
    """statistics [5, C] (store_statistics) of BC channels, from the sums of programs or what is known."""
    c = tl.program_id(0) * tile.BC + tl.arange(0, tile.BC)
    has_c = c < tile.C
    if partial is None:
        mean = tl.load(known.mean + c, mask=has_c, other=0.0)
        var = tl.load(known.var + c, mask=has_c, other=0.0)
    else:
        whole, square = joined_programs(partial, c, tile.C, 2 * tile.C, parts, positions, share, PARTS, tile.BC)
        mean = first_position(x, c, tile) + whole / positions
        var = square / positions
    store_statistics(statistics, mean, var, weight, bias, eps, c, tile.C)


@triton.jit(do_not_specialize=["positions"])
def apply(source: Source, x, positions, tile: Tile):
    """x of R positions and BC channels."""
    c = tl.program_id(1) * tile.BC + tl.arange(0, tile.BC)
    at, mask = tile_at(tl.program_id(0).to(tl.int64) * tile.R, positions, c, tile)
    tl.store(x + at, load_tile(source, at, c, tile.C, mask, tile.ACTIVATION), mask=mask)


@triton.jit(do_not_specialize=["positions", "tiles"])
def derive(source: Source, grad_x, grad_h, partial, positions, tiles, tile: Tile):
    """dL/dh from dL/dx (in the same memory, perhaps), and by program, as in channel_sums, the sums of dL/dh and of dL/dh (x - mean)."""
    part = tl.program_id(1)
    c = tl.program_id(0) * tile.BC + tl.arange(0, tile.BC)
    total = tl.zeros([tile.BC, tile.R], tl.float32)
    product = tl.zeros([tile.BC, tile.R], tl.float32)
    start = part.to(tl.int64) * tiles * tile.R
    end = tl.minimum(start + tiles * tile.R, positions)
    for r0 in range(0, tiles * tile.R, tile.R):
        at, mask = tile_at(start + r0, end, c, tile)
        value = tl.load(grad_x + at, mask=mask, other=0.0).to(tl.float32)
        value, off = through_activation(value, source, at, c, tile.C, mask, tile.ACTIVATION)
        tl.store(grad_h + at, value.to(grad_h.dtype.element_ty), mask=mask)
        total += value
        product += value * off
    store_pair(partial, part, tl.sum(total, 1), tl.sum(product, 1), c, tile.C)


@triton.jit
def store_norm_sums(sums, statistics, total, positions, e, C):
    """Write columns e of sums [4, C], dL/d(batch norm's bias), dL/d(its weight), and the means of dL/dh and of dL/dh (x - mean) / var, from totals:
    column c < C is that of dL/dh, C + c that of dL/dh (x - mean)."""
    rstd = tl.load(statistics + 3 * C + e, mask=(e >= C) & (e < 2 * C), other=1.0)
    tl.store(sums + e, total * rstd, mask=e < 2 * C)
    tl.store(sums + 2 * C + e, total * rstd * rstd / positions, mask=e < 2 * C)


@triton.jit
def added_up(partial, parts, columns, e, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """Sums of partial [parts, columns] of the SIZE columns e, PARTS parts at a time."""
    part = tl.arange(0, PARTS)
    total = tl.zeros([PARTS, SIZE], tl.float32)
    for i in range(0, parts, PARTS):
        r = (i + part).to(tl.int64)
        mask = (r < parts)[:, None] & (e < columns)[None, :]
        total += tl.load(partial + r[:, None] * columns + e[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["positions", "parts"])
def add_up(partial, statistics, sums, positions, parts, tile: Tile, PARTS: tl.constexpr):
    """Columns of sums [4, C] (`store_norm_sums`), from partial [parts, 2, C]."""
    e = tl.program_id(0) * tile.BC + tl.arange(0, tile.BC)
    total = added_up(partial, parts, 2 * tile.C, e, tile.BC, PARTS)
    store_norm_sums(sums, statistics, total, positions, e, tile.C)


@triton.jit(do_not_specialize=["positions"])
def finish(source: Source, grad_h, grad_y, sums, positions, tile: Tile):
    """dL/dy of R positions and BC channels, from the means in sums [4, C]; grad_y may be grad_h."""
    c = tl.program_id(1) * tile.BC + tl.arange(0, tile.BC)
    has_c = c < tile.C
    at, mask = tile_at(tl.program_id(0).to(tl.int64) * tile.R, positions, c, tile)
    mean = tl.load(source.affine + c, mask=has_c, other=0.0)
    scale = tl.load(source.affine + tile.C + c, mask=has_c, other=0.0)
    first = tl.load(sums + 2 * tile.C + c, mask=has_c, other=0.0)
    second = tl.load(sums + 3 * tile.C + c, mask=has_c, other=0.0)
    off = tl.load(source.x + at, mask=mask, other=0.0).to(tl.float32) - mean[:, None]
    grad = tl.load(grad_h + at, mask=mask, other=0.0).to(tl.float32)
    grad = (grad - first[:, None] - off * second[:, None]) * scale[:, None]
    tl.store(grad_y + at, grad.to(grad_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rate", "correction"])
def move(running_mean, running_var, tracked, mean, var, C, rate, correction, BC: tl.constexpr):
    """Running statistics of BC channels, by `rate` towards those of a batch; one batch more is counted in `tracked`."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    has_c = c < C
    old = tl.load(running_mean + c, mask=has_c, other=0.0)
    tl.store(running_mean + c, old + rate * (tl.load(mean + c, mask=has_c, other=0.0) - old), mask=has_c)
    old = tl.load(running_var + c, mask=has_c, other=0.0)
    tl.store(running_var + c, old + rate * (tl.load(var + c, mask=has_c, other=0.0) * correction - old), mask=has_c)
    if tracked is not None:  # noqa: SIM102  # a pointer's absence is known at compile time
        if tl.program_id(0) == 0:
            tl.store(tracked, tl.load(tracked) + 1)


def update_running_statistics(running_mean, running_var, tracked, mean, var, momentum, count):
    """Move running statistics [C] by `momentum` towards mean and var, the biased variance of `count` values; count the batch."""
    C, BC = len(mean), 256
    with on_device(mean):
        correction = count / (count - 1)
        move[(-(-C // BC),)](running_mean, running_var, tracked, mean, var, C, momentum, correction, BC=BC, num_warps=4)


def channels_of_a_tile(C):
    return min(max(16, triton.next_power_of_2(C)), 64)


class Launches:
    """Launches of the kernels above for an epilogue of y: over all tiles, or over shares of the positions with partial sums added in a fixed
    order. Without mean and var, they are those of this batch."""

    def __init__(self, y, epilogue, mean=None, var=None):
        self.y, self.epilogue = dense(y), epilogue
        B, C, H, W = y.shape
        self.positions, last = B * H * W, is_channels_last(self.y)
        activation = spec.ACTIVATIONS.index(epilogue.activation)
        # a sample's positions matter to the layout of contiguous memory alone: images of other sizes need no kernels of their own
        self.config = Tile(activation, last, C, None if last else H * W, POSITIONS, channels_of_a_tile(C))
        self.blocks = -(-C // self.config.BC)
        self.few = constants(self.config._replace(BC=FEW_CHANNELS)), -(-C // FEW_CHANNELS)
        statistics = torch.empty(5, C, device=y.device, dtype=torch.float32)
        partial, parts, share = None, 0, 0
        if mean is None:
            partial, share = self._sums(channel_sums, self.y)
            parts = len(partial)
        tile, programs = self.few
        finalize[(programs,)](
            self.y, partial, Known(mean, var), epilogue.weight, epilogue.bias, statistics, self.positions, share, parts, epilogue.eps, tile,
            PARTS=PARTS, num_warps=4,
        )  # fmt: skip
        self.statistics, self.mean, self.var = statistics, statistics[0], statistics[3]
        residual = None if epilogue.residual is None else self._laid_out(epilogue.residual)
        self.source = Source(self.y, residual, statistics[:3])

    def _laid_out(self, tensor):
        """The tensor in the memory layout of y."""
        tensor = dense(tensor)
        return tensor if is_channels_last(tensor) == is_channels_last(self.y) else empty_like(self.y).copy_(tensor)

    def _tiles(self, kernel, *tensors):
        grid = -(-self.positions // POSITIONS), self.blocks
        kernel[grid](self.source, *tensors, self.positions, constants(self.config), num_warps=4)

    def _sums(self, kernel, *tensors):
        """Partial sums [parts, 2, C], and the number of positions of a part."""
        tiles = -(-self.positions // POSITIONS)
        share, parts = shares(tiles, min(4 * multiprocessors(self.y.device) // self.blocks, -(-tiles // 4)))
        partial = torch.empty((parts, 2, self.config.C), device=self.y.device, dtype=torch.float32)
        kernel[self.blocks, parts](*tensors, partial, self.positions, share, constants(self.config), num_warps=8)
        return partial, share * POSITIONS

    def forward(self):
        """x, as y."""
        x = empty_like(self.y)
        self._tiles(apply, x)
        return x

    def backward(self, grad_x, overwrite=False, added=None):
        """EpilogueGradients from grad_x, in whose memory the result may lie; `added` are those of another loss."""
        grad_x = self._laid_out(grad_x)
        grad_h = grad_x if overwrite else empty_like(self.y)
        partial, _ = self._sums(derive, self.source, grad_x, grad_h)
        if added is not None:
            grad_h.add_(added.residual)
            own = torch.stack([added.bias, added.weight / self.statistics[4]])
            partial = torch.cat([partial, own[None]])
        sums = torch.empty(4, self.config.C, device=self.y.device, dtype=torch.float32)
        tile, parts = self.few[0], partial.numel() // (2 * self.config.C)
        add_up[(-(-2 * self.config.C // FEW_CHANNELS),)](
            partial, self.statistics, sums, self.positions, parts, tile, PARTS=PARTS, num_warps=4
        )
        return self.finish(grad_h, sums)

    def finish(self, grad_h, sums):
        """The same from grad_h (overwritten) and sums [4, C] (`store_norm_sums`)."""
        keep = self.epilogue.wants_residual
        grad_y = empty_like(self.y) if keep else grad_h
        self._tiles(finish, grad_h, grad_y, sums)
        return EpilogueGradients(grad_y, grad_h if keep else None, sums[1], sums[0])


def forward(y, epilogue, normalization=None, need_x=True, statistics=None):
    """x as y, the normalized x or None, mean [C] and biased variance [C] of this batch; `statistics` (mean, var) where they are known already."""
    with on_device(y):
        launches = Launches(y, epilogue, *(statistics or ()))
        x = launches.forward()
        return x, None if normalization is None else normalize(x, normalization), launches.mean, launches.var


def backward(
    y, epilogue, mean, var, grad_x=None, grad_normalized=None, normalization=None, added=None, overwrite=False
):
    """spec.EpilogueGradients from those of x and of the normalized x; `added` are those of another loss at the same place."""
    with on_device(y):
        launches = Launches(y, epilogue, mean, var)
        if grad_normalized is not None:
            through = normalization_gradient(grad_normalized, launches.forward(), normalization)
            grad_x, overwrite = (through if grad_x is None else through.add_(grad_x)), True
        return launches.backward(grad_x, overwrite, added)


def normalization_gradient(grad, x, normalization):
    """The gradient of x from that of the normalized x, as x. Layer norm over the sample, the usual one, is an operator of PyTorch."""
    if normalization.name == "layer_norm":
        flat, back = samples(x, is_channels_last(x))
        _, mean, rstd = torch.native_layer_norm(flat, flat.shape[1:], None, None, normalization.eps)
        flat_grad, _ = samples(grad, is_channels_last(x))
        wanted = [True, False, False]
        made = torch.ops.aten.native_layer_norm_backward(
            flat_grad, flat, flat.shape[1:], mean, rstd, None, None, wanted
        )
        return back(made[0])
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        normalized = reference.normalized(widened(leaf), *normalization)
    return as_result_of(x, torch.autograd.grad(normalized, leaf, grad.to(normalized.dtype))[0])


def step_in_parts(step, run):
    """A spec.Step with an epilogue, by kernels around run(step without it), which read and write x."""
    with on_device(step.x):
        launches = Launches(step.x, step.epilogue)
        inner = run(step._replace(x=launches.forward(), epilogue=None, need_grad_x=True))
        return inner.before_epilogue(launches.backward(inner.grad_x, overwrite=True), launches.mean, launches.var)
