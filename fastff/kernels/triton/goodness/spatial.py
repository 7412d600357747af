"""The spatial term between the two sweeps: from means over cells to goodness, the loss and d, and back to the gradient of the means.

    spatial           g += V a, the loss and d, dL/da = V^T d: of the means a, or of a hidden layer's a = relu(batch_norm(z)), whose batch norm has
                      the samples of the whole batch, and so begins when the first sweep has ended
    hidden_gradient   of a hidden layer, when `spatial` has ended: dL/dz, dL/d(means) = U^T dL/dz, and dL/dU by program

Where the grid's weights V are too large for few programs to read, and for losses of pairs, the products with V are cuBLAS's.
"""

from collections import namedtuple

import torch
import triton
import triton.language as tl

from fastff import spec
from fastff.kernels.triton import loss
from fastff.kernels.triton.epilogue import CHANNELS, NO_NORM, Norm, norm_gradients, store_all_statistics, store_pair
from fastff.kernels.triton.goodness.arguments import Config, Head, Scratch, dot
from fastff.kernels.triton.goodness.grid import COLUMNS, HIDDEN, cells_at, grid_weights, hidden_weights
from fastff.kernels.triton.launch import constants, shares
from fastff.kernels.triton.loss import LossArguments, of_goodness

ROWS = tl.constexpr(16)  # samples of a product with V
MOST_CLASSES = 128  # that `spatial` keeps in registers
MOST_BYTES = 2**21  # of V that each of its programs reads twice, in about 40 us


Hidden = namedtuple("Hidden", "a grad sums grads")
"""What is made of a hidden layer beside its statistics: a and the gradient of what ReLU is applied to, [B, M, cells]; sums [programs, 2, M] of this
gradient and of its product with z - mean; grads [4, M] (epilogue.norm_gradients)."""


@triton.jit
def columns_at(m0, config: Config):
    """Channels, offsets in a sample and mask of the columns of BC channels from m0 on and their BG cells, [BC BG]."""
    cells: tl.constexpr = config.GH * config.GW
    column = tl.arange(0, config.BC * config.BG)
    m, cell = m0 + column // config.BG, column % config.BG
    return m, m * cells + cell, (m < config.M) & (cell < cells)


@triton.jit
def samples_at(item):
    """The samples of an item, [ROWS]."""
    return tl.zeros([], tl.int64) + item * ROWS + tl.arange(0, ROWS)


@triton.jit
def before_relu(z, norm: Norm, m, config: Config):
    """What ReLU is applied to, and z - mean, of columns of the channels m."""
    known = m < config.M
    off = z - tl.load(norm.statistics + m, mask=known, other=0.0)[None, :]
    scale = tl.load(norm.statistics + config.M + m, mask=known, other=0.0)
    return off * scale[None, :] + tl.load(norm.statistics + 2 * config.M + m, mask=known, other=0.0)[None, :], off


@triton.jit(do_not_specialize=["B"])
def spatial(head: Head, scratch: Scratch, norm: Norm, layer: Hidden, loss: LossArguments, B, config: Config):
    """Program i: ROWS samples from ROWS i on, and so on. FIRST: a of a hidden layer, and with LOSS the term, the loss and d. SECOND: the gradient of
    the means, or of what a hidden layer's ReLU is applied to, with its sums; from d with LOSS, else from dL/da in layer.grad."""
    columns: tl.constexpr = config.M * config.GH * config.GW
    k = tl.arange(0, config.BK)
    if (norm.statistics is not None) and config.FIRST:
        cells: tl.constexpr = config.GH * config.GW
        store_all_statistics(norm, config.M, tl.cdiv(B, config.NS), config.NS * cells, B.to(tl.int64) * cells)
    items = tl.cdiv(B, ROWS)
    if config.FIRST:
        for item in range(tl.program_id(0), items, tl.num_programs(0)):
            n = samples_at(item)
            term = tl.zeros([ROWS, config.BK], tl.float32)
            for m0 in range(0, config.M, config.BC):
                m, e, here = columns_at(m0, config)
                at, mask = n[:, None] * columns + e[None, :], (n < B)[:, None] & here[None, :]
                if norm.statistics is None:
                    a = tl.load(scratch.means + at, mask=mask, other=0.0)
                else:
                    h, _ = before_relu(tl.load(scratch.z + at, mask=mask, other=0.0), norm, m, config)
                    a = tl.where(mask & ~(h < 0), h, 0.0)  # a NaN stays one
                    tl.store(layer.a + at, a, mask=mask)
                if config.LOSS is not None:
                    term = dot(a, tl.trans(grid_weights(head, k, e, config)), term, config.CELL_PRECISION)
            if config.LOSS is not None:
                known = (n < B)[:, None] & (k < config.K)[None, :]
                at = n[:, None] * config.K + k[None, :]
                g = tl.load(scratch.g + at, mask=known, other=0.0) + term
                d, value, slope = of_goodness(g, n, k, loss, B, config.K, config.LOSS)
                tl.store(scratch.g + at, g, mask=known)
                tl.store(scratch.d + at, d, mask=known)
                tl.store(loss.losses + n, value, mask=n < B)
                if loss.grad_tau is not None:
                    tl.store(loss.grad_tau + n, slope, mask=n < B)
        tl.debug_barrier()
    if config.SECOND:
        for m0 in range(0, config.M, config.BC):
            first_sum = tl.zeros([config.BC * config.BG], tl.float32)
            second_sum = tl.zeros([config.BC * config.BG], tl.float32)
            m, e, here = columns_at(m0, config)
            if config.LOSS is not None:
                V = grid_weights(head, k, e, config)
            for item in range(tl.program_id(0), items, tl.num_programs(0)):
                n = samples_at(item)
                at, mask = n[:, None] * columns + e[None, :], (n < B)[:, None] & here[None, :]
                if config.LOSS is None:
                    grad = tl.load(layer.grad + at, mask=mask, other=0.0)
                else:
                    known = (n < B)[:, None] & (k < config.K)[None, :]
                    d = tl.load(scratch.d + n[:, None] * config.K + k[None, :], mask=known, other=0.0)
                    grad = dot(d, V, None, config.CELL_PRECISION)
                if norm.statistics is None:
                    tl.store(scratch.cells + at, grad, mask=mask)
                else:
                    h, off = before_relu(tl.load(scratch.z + at, mask=mask, other=0.0), norm, m, config)
                    grad = tl.where(mask & (h > 0), grad, 0.0)
                    tl.store(layer.grad + at, grad, mask=mask)
                    first_sum += tl.sum(grad, 0)
                    second_sum += tl.sum(tl.where(mask, grad * off, 0.0), 0)
            if norm.statistics is not None:
                shape: tl.constexpr = [config.BC, config.BG]
                first, second = tl.sum(tl.reshape(first_sum, shape), 1), tl.sum(tl.reshape(second_sum, shape), 1)
                store_pair(layer.sums, tl.program_id(0), first, second, m0 + tl.arange(0, config.BC), config.M)


@triton.jit
def before_norm(scratch: Scratch, norm: Norm, layer: Hidden, first, m, B, config: Config):
    """dL/dz of NS samples and the channels m, [HIDDEN, NS BG]."""
    at, mask = cells_at(first, m, config.M, B, config)
    known = m < config.M
    grad = tl.load(layer.grad + at, mask=mask, other=0.0)
    if norm.mean is None:
        off = (
            tl.load(scratch.z + at, mask=mask, other=0.0) - tl.load(norm.statistics + m, mask=known, other=0.0)[:, None]
        )
        grad -= tl.load(layer.grads + 2 * config.M + m, mask=known, other=0.0)[:, None]
        grad -= off * tl.load(layer.grads + 3 * config.M + m, mask=known, other=0.0)[:, None]
    scale = tl.load(norm.statistics + config.M + m, mask=known, other=0.0)
    return tl.where(mask, grad * scale[:, None], 0.0)


@triton.jit(do_not_specialize=["B", "parts"])
def hidden_gradient(head: Head, scratch: Scratch, norm: Norm, layer: Hidden, weights, B, parts, config: Config):
    """Program (i, j): groups i, i + programs, ... of NS samples and BC channels of the means: their gradient, and its row of weights [programs, M C].
    Every program computes layer.grads, all the same, from sums [parts, 2, M]."""
    count = B.to(tl.float32) * (config.GH * config.GW)
    for m0 in range(0, config.M, CHANNELS):
        m = m0 + tl.arange(0, CHANNELS)
        bias, weight, first, second = norm_gradients(layer.sums, parts, norm.statistics, m, config.M, count, CHANNELS)
        store_pair(layer.grads, 0, bias, weight, m, config.M)
        store_pair(layer.grads, 1, first, second, m, config.M)
    tl.debug_barrier()
    c = tl.program_id(1) * config.BC + tl.arange(0, config.BC)
    groups = tl.cdiv(B, config.NS)
    for item in range(tl.program_id(0), groups, tl.num_programs(0)):
        first = tl.zeros([], tl.int64) + item * config.NS
        cells = tl.zeros([config.BC, config.NS * config.BG], tl.float32)
        for m0 in range(0, config.M, HIDDEN):
            m = m0 + tl.arange(0, HIDDEN)
            grad = before_norm(scratch, norm, layer, first, m, B, config)
            cells = dot(tl.trans(hidden_weights(head, m, c, config)), grad, cells, config.CELL_PRECISION)
        at, mask = cells_at(first, c, config.C, B, config)
        tl.store(scratch.cells + at, cells, mask=mask)
    for m0 in range(0, config.M, HIDDEN):
        m = m0 + tl.arange(0, HIDDEN)
        total = tl.zeros([HIDDEN, config.BC], tl.float32)
        for item in range(tl.program_id(0), groups, tl.num_programs(0)):
            first = tl.zeros([], tl.int64) + item * config.NS
            at, mask = cells_at(first, c, config.C, B, config)
            mean = tl.load(scratch.means + at, mask=mask, other=0.0)
            total = dot(
                before_norm(scratch, norm, layer, first, m, B, config), tl.trans(mean), total, config.CELL_PRECISION
            )
        at = weights + tl.program_id(0) * (config.M * config.C) + m[:, None] * config.C + c[None, :]
        tl.store(at, total, mask=(m < config.M)[:, None] & (c < config.C)[None, :])


class SpatialTerm:
    """The launches above, after the first sweep of `launch`, whose scratch they read and complete."""

    def __init__(self, launch, hidden):
        self.launch, self.hidden = launch, hidden
        self.norm, self.layer = NO_NORM, Hidden(None, None, None, None)
        self.weights = self.grad_weight = None
        self.programs = min(-(-launch.B // ROWS.value), launch.processors)
        if hidden is not None:
            _, weight, bias, eps, mean, var = hidden
            z, M, new = launch.scratch.z, launch.config.M, launch.new
            self.norm = Norm(weight, bias, mean, var, eps, launch.scratch.moments, new(5, M))
            self.layer = Hidden(new(*z.shape), new(*z.shape), new(self.programs, 2, M), new(4, M))

    @property
    def inputs(self):
        """What the grid's weights V are multiplied with, [B, M cells]."""
        return (self.launch.scratch.means[0] if self.hidden is None else self.layer.a).flatten(1)

    @property
    def weight(self):
        """V [K, M cells]."""
        return self.launch.head.grid_weight.flatten(1).float()

    def goodness(self):
        """Add the term to g by cuBLAS."""
        if self.hidden is not None:
            self._run(FIRST=True)
        self.launch.scratch.g[0].addmm_(self.inputs, self.weight.T)

    def backward(self):
        """Write the gradients from d: of V by cuBLAS, and of the means over cells in scratch.cells."""
        scratch = self.launch.scratch
        self.grad_weight = (scratch.d.T @ self.inputs).view(self.launch.head.grid_weight.shape)
        target = scratch.cells if self.hidden is None else self.layer.grad
        torch.mm(scratch.d, self.weight, out=target.flatten(1))
        if self.hidden is not None:
            self._run(SECOND=True)
            self._hidden_gradient()

    def step(self, wanted, losses, grad_tau):
        """Write the term into g, the losses, d and the gradients; that of V is left to the reduction where `spatial` does all products."""
        scratch, V = self.launch.scratch, self.launch.head.grid_weight
        if wanted.name in spec.PAIRED_LOSSES or len(V) > MOST_CLASSES or V.nbytes > MOST_BYTES:
            self.goodness()
            loss.run(scratch.g[0], scratch.d, wanted, losses, grad_tau)
            self.backward()
        else:
            arguments = loss.arguments(wanted, self.launch.B, losses, grad_tau)
            self._run(arguments, FIRST=True, LOSS=loss.constant(wanted), SECOND=True)
            if self.hidden is not None:
                self._hidden_gradient()

    def _run(self, arguments=loss.NO_LOSS, **stages):
        launch = self.launch
        BG = triton.next_power_of_2(launch.config.GH * launch.config.GW)
        config = launch.config._replace(FIRST=False, LOSS=None, SECOND=False, NS=launch.samples_of_z)._replace(**stages)
        config = config._replace(BC=max(1, COLUMNS.value // BG), BG=BG, BK=max(16, config.LK))
        spatial[self.programs,](
            launch.head, launch.scratch, self.norm, self.layer, arguments, launch.B, constants(config), num_warps=4
        )

    def _hidden_gradient(self):
        launch = self.launch
        C, M, BG = launch.config.C, launch.config.M, launch.config.BG
        config = launch.config._replace(NS=max(1, 64 // BG), BC=min(64, max(16, triton.next_power_of_2(C))))
        pieces, groups = -(-C // config.BC), -(-launch.B // config.NS)
        _, programs = shares(groups, 2 * launch.processors // pieces, times=4)
        self.weights = launch.new(programs, M * C)
        hidden_gradient[programs, pieces](
            launch.head, launch.scratch, self.norm, self.layer, self.weights, launch.B, self.programs, constants(config), num_warps=8,
            maxnreg=255,  # else the assembler takes 128, and spills
        )  # fmt: skip

    def padded(self, grad):
        """dL/dV, with zeros for the cells that are more than the positions."""
        V = self.launch.grid_weight
        if grad.shape == V.shape:
            return grad
        padded = grad.new_zeros(V.shape)
        padded[..., : grad.shape[2], : grad.shape[3]] = grad
        return padded
