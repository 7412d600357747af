"""The epilogue of a block, x = activation(batch_norm(y) + residual), and its gradients: device functions for the goodness kernels, and kernels.

    channel_sums   partial sums of each channel by program                                                    reads y
    finalize       mean and variance, joined in a fixed order, and what batch norm makes of them
    apply          x                                                                                         reads y, residual; writes x
    derive         dL/dh and its two sums by channel and program, h before the activation      reads y, residual, dL/dx; writes dL/dh
    finish         dL/dy = scale (dL/dh - mean(dL/dh) - (y - mean) mean(dL/dh (y - mean)) / var)             reads y, dL/dh; writes dL/dy

The goodness kernels (goodness/) make x of every tile that they load and never write it. Each program of their first sweep does at its begin what
`finalize` does. dL/dh and its sums leave with their second sweep, and their reduction does what `finish` does. So only channel_sums runs beside them.
A program that adds up what others have left reads about a quarter of a megabyte from L2 for it, in the time of a launch.

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

POSITIONS, LEAST = 64, 256  # of a tile, and of a program that takes several
CHANNELS, PARTS = tl.constexpr(32), tl.constexpr(128)  # of sums that others have left: what a program adds up at a time


Source = namedtuple("Source", "x residual affine")
"""What a tile of the head's input is made of: x itself (affine None), or activation((x - mean) scale + shift + residual).

affine [3, C] = mean, scale, shift; residual (or None) has the strides of x."""


Norm = namedtuple("Norm", "weight bias mean var eps partial statistics")
"""A batch norm: weight, bias and known mean and var [C] (or None), eps; where mean is None, partial [parts, 2, C] of the values that are normalized:
their sums and squares about the mean by program; statistics [5, C]: mean, scale, shift, variance and 1 / deviation (`store_statistics`)."""

NO_NORM = Norm(None, None, None, None, 0.0, None, None)


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
    """Program (i, j): sum of x and squares about the mean of the j-th `tiles` tiles of R positions; [parts, 2, C]."""
    part = tl.program_id(1)
    c = tl.program_id(0) * tile.BC + tl.arange(0, tile.BC)
    total = tl.zeros([tile.BC, tile.R], tl.float32)
    square = tl.zeros([tile.BC, tile.R], tl.float32)
    start = part.to(tl.int64) * tiles * tile.R
    end = tl.minimum(start + tiles * tile.R, positions)
    for r0 in range(0, tiles * tile.R, tile.R):
        at, mask = tile_at(start + r0, end, c, tile)
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        square += tl.where(mask, between(total, r0 / tile.R, value, 1.0), 0.0)
        total += value
    own = end - start
    whole, squares = joined(total, square, lane_counts(own, tl.arange(0, tile.R), tile.R)[None, :], own)
    store_pair(partial, part, whole, squares, c, tile.C)


@triton.jit
def store_statistics(norm: Norm, c, C, parts, share, n):
    """Write columns c [CHANNELS] of norm.statistics, of n values of each channel of which every program had `share`."""
    has_c = c < C
    if norm.mean is None:
        whole, square = joined_programs(norm.partial, c, C, 2 * C, parts, n, share, PARTS, CHANNELS)
        mean, var = whole / n, square / n
    else:
        mean = tl.load(norm.mean + c, mask=has_c, other=0.0).to(tl.float32)
        var = tl.load(norm.var + c, mask=has_c, other=0.0).to(tl.float32)
    rstd = 1 / tl.sqrt(var + norm.eps)
    scale, shift = rstd, tl.zeros_like(mean)
    if norm.weight is not None:
        scale *= tl.load(norm.weight + c, mask=has_c, other=0.0).to(tl.float32)
    if norm.bias is not None:
        shift = tl.load(norm.bias + c, mask=has_c, other=0.0).to(tl.float32)
    store_pair(norm.statistics, 0, mean, scale, c, C)
    store_pair(norm.statistics, 1, shift, var, c, C)
    tl.store(norm.statistics + 4 * C + c, rstd, mask=has_c)


@triton.jit
def store_all_statistics(norm: Norm, C, parts, share, n):
    """Write norm.statistics: every program does, all of them the same, and reads what it wrote."""
    for c0 in range(0, C, CHANNELS):
        store_statistics(norm, c0 + tl.arange(0, CHANNELS), C, parts, share, n)
    tl.debug_barrier()


@triton.jit
def store_known_statistics(norm: Norm, c0, tile: Tile):
    """The same of BC channels from c0 on, if their mean and variance are known: it takes no sum, and so no launch before this one."""
    if norm.mean is not None:
        for i in range(0, tile.BC, CHANNELS):
            store_statistics(norm, c0 + i + tl.arange(0, CHANNELS), tile.C, 0, 0, 0)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["positions", "share", "parts"])
def finalize(norm: Norm, positions, share, parts, tile: Tile):
    """Program i: the statistics of CHANNELS channels."""
    store_statistics(norm, tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS), tile.C, parts, share, positions)


@triton.jit(do_not_specialize=["positions"])
def apply(source: Source, norm: Norm, x, positions, tile: Tile):
    """x of R positions and BC channels."""
    store_known_statistics(norm, tl.program_id(1) * tile.BC, tile)
    c = tl.program_id(1) * tile.BC + tl.arange(0, tile.BC)
    at, mask = tile_at(tl.program_id(0).to(tl.int64) * tile.R, positions, c, tile)
    tl.store(x + at, load_tile(source, at, c, tile.C, mask, tile.ACTIVATION), mask=mask)


@triton.jit(do_not_specialize=["positions", "tiles"])
def derive(source: Source, norm: Norm, grad_x, grad_h, partial, positions, tiles, tile: Tile):
    """dL/dh from dL/dx (in the same memory, perhaps), and by program, as in channel_sums, the sums of dL/dh and of dL/dh (x - mean)."""
    store_known_statistics(norm, tl.program_id(0) * tile.BC, tile)
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
def added_up(partial, parts, columns, e, SIZE: tl.constexpr, PARTS: tl.constexpr):
    """Sums of partial [parts, columns] of the SIZE columns e, PARTS parts at a time."""
    part = tl.arange(0, PARTS)
    total = tl.zeros([PARTS, SIZE], tl.float32)
    for i in range(0, parts, PARTS):
        r = (i + part).to(tl.int64)
        mask = (r < parts)[:, None] & (e < columns)[None, :]
        total += tl.load(partial + r[:, None] * columns + e[None, :], mask=mask, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def norm_gradients(partial, parts, statistics, c, C, n, SIZE: tl.constexpr):
    """Of a batch norm of n values and the channels c [SIZE], from partial [parts, 2, C], the sums of dL/dh and of dL/dh (x - mean): the gradients of
    its bias and weight, and the means of dL/dh and of dL/dh (x - mean) / var."""
    first = added_up(partial, parts, 2 * C, c, SIZE, PARTS)
    rstd = tl.load(statistics + 4 * C + c, mask=c < C, other=0.0)
    second = added_up(partial, parts, 2 * C, c + C, SIZE, PARTS) * rstd
    return first, second, first / n, second * rstd / n


Finish = namedtuple("Finish", "y grad_h grad_y statistics")
"""Tensors of `finish`: y, dL/dh, dL/dy (in the memory of dL/dh, perhaps) and the statistics [5, C]."""


@triton.jit
def finish_share(program, tensors: Finish, partial, parts, grads, positions, tiles, tile: Tile):
    """Write dL/dy of BC channels and `tiles` tiles of R positions, from the sums in partial (`norm_gradients`). The first programs write grads
    [2, C], those of bias and weight."""
    blocks: tl.constexpr = (tile.C + tile.BC - 1) // tile.BC
    c = program % blocks * tile.BC + tl.arange(0, tile.BC)
    has_c = c < tile.C
    n = positions.to(tl.float32)
    bias, weight, first, second = norm_gradients(partial, parts, tensors.statistics, c, tile.C, n, tile.BC)
    if program < blocks:
        store_pair(grads, 0, bias, weight, c, tile.C)
    mean = tl.load(tensors.statistics + c, mask=has_c, other=0.0)
    scale = tl.load(tensors.statistics + tile.C + c, mask=has_c, other=0.0)
    start = (program // blocks).to(tl.int64) * tiles * tile.R
    end = tl.minimum(start + tiles * tile.R, positions)
    for r0 in range(0, tiles * tile.R, tile.R):
        at, mask = tile_at(start + r0, end, c, tile)
        off = tl.load(tensors.y + at, mask=mask, other=0.0).to(tl.float32) - mean[:, None]
        grad = tl.load(tensors.grad_h + at, mask=mask, other=0.0).to(tl.float32)
        grad = (grad - first[:, None] - off * second[:, None]) * scale[:, None]
        tl.store(tensors.grad_y + at, grad.to(tensors.grad_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["parts", "positions", "tiles"])
def finish(tensors: Finish, partial, parts, grads, positions, tiles, tile: Tile):
    """`finish_share` of each program."""
    finish_share(tl.program_id(0), tensors, partial, parts, grads, positions, tiles, tile)


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
        statistics = torch.empty(5, C, device=y.device, dtype=torch.float32)
        partial, self.counts = None, (0, 0)  # the parts that sums are made of, and the positions of one
        if mean is None:
            partial, share = self._sums(channel_sums, self.config._replace(R=POSITIONS * 4 // y.element_size()), self.y)
            self.counts = len(partial), share
        self.norm = Norm(epilogue.weight, epilogue.bias, mean, var, epilogue.eps, partial, statistics)
        self.mean, self.var = statistics[0], statistics[3]
        residual = None if epilogue.residual is None else self._laid_out(epilogue.residual)
        self.source = Source(self.y, residual, statistics[:3])

    def _laid_out(self, tensor):
        """The tensor in the memory layout of y."""
        tensor = dense(tensor)
        return tensor if is_channels_last(tensor) == is_channels_last(self.y) else empty_like(self.y).copy_(tensor)

    def _divided(self, R):
        """(tiles of R positions that a program takes, programs for the same channels)."""
        programs = min(2 * multiprocessors(self.y.device) // self.blocks, -(-self.positions // LEAST))
        return shares(-(-self.positions // R), programs)

    def _sums(self, kernel, tile, *tensors):
        """Partial sums [parts, 2, C], and the number of positions of a part."""
        share, parts = self._divided(tile.R)
        partial = torch.empty((parts, 2, tile.C), device=self.y.device, dtype=torch.float32)
        kernel[self.blocks, parts](*tensors, partial, self.positions, share, constants(tile), num_warps=8)
        return partial, share * tile.R

    def forward(self):
        """x, as y."""
        x, tile = empty_like(self.y), constants(self.config)
        if self.norm.mean is None:
            parts, share = self.counts
            finalize[-(-self.config.C // CHANNELS.value),](self.norm, self.positions, share, parts, tile, num_warps=4)
        apply[-(-self.positions // POSITIONS), self.blocks](
            self.source, self.norm, x, self.positions, tile, num_warps=4
        )
        return x

    def backward(self, grad_x, overwrite=False, added=None):
        """EpilogueGradients from grad_x, in whose memory the result may lie; `added` are those of another loss."""
        grad_x = self._laid_out(grad_x)
        grad_h = grad_x if overwrite else empty_like(self.y)
        partial, _ = self._sums(derive, self.config, self.source, self.norm, grad_x, grad_h)
        if added is not None:
            grad_h.add_(added.residual)
            own = torch.stack([added.bias, added.weight / self.norm.statistics[4]])
            partial = torch.cat([partial, own[None]])
        tensors, programs, *rest = self.finish(grad_h)
        grads = torch.empty(2, self.config.C, device=self.y.device, dtype=torch.float32)
        finish[programs,](tensors, partial, len(partial), grads, self.positions, *rest, num_warps=8)
        return self.gradients(tensors, grads)

    def finish(self, grad_h):
        """(Finish, number of programs, tiles of each, constants) of the launch that makes dL/dy, in the memory of grad_h if that is not wanted."""
        share, parts = self._divided(POSITIONS)
        grad_y = empty_like(self.y) if self.epilogue.wants_residual else grad_h
        tensors = Finish(self.y, grad_h, grad_y, self.norm.statistics)
        return tensors, parts * self.blocks, share, constants(self.config)

    def gradients(self, tensors, grads):
        """EpilogueGradients after this launch, which wrote grads [2, C]."""
        residual = tensors.grad_h if self.epilogue.wants_residual else None
        return EpilogueGradients(tensors.grad_y, residual, grads[1], grads[0])


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
