"""Goodness, its loss and its local gradient as Triton kernels whose programs take whole samples.

One launch for a batch (no spatial term, enough samples to fill the GPU): a program reads its samples once from device memory, computes
goodness, the loss and d, and goes over them a second time, out of the L2 cache, for the gradient and the layer-normalised next input.

    first sweep    direct: a = W X by tiles, g = mean a^2        second moment: S = X X^T / P, g = w^T S w + 2 beta (w . mu) + beta^2
    loss           from g of the program's samples: loss, d = dL/dg, dL/dtau
    second sweep   direct: dL/dx = (2/P) W^T (d * a), a recomputed   second moment: dL/dx = (2/P)(M X + c), M = W^T diag(d) W
    head           a second, small launch: dL/dW (and dL/dbeta), partial sums over groups of samples, added in a fixed order

The same kernels run in pieces where a piece needs the whole batch between the sweeps: with the spatial term (its [B, C G^2] x [C G^2, K]
product is cuBLAS's), with losses of pairs, and with few large samples, which several programs share (partial sums again added in a fixed
order). No floating-point atomics: the same input gives the same bits.

Bytes: x read twice (the second time mostly from L2), dL/dx and the next input written once; the floor is three times x. Products: direct
5 P C K multiply-adds a sample (a three times), second moment 2 P C^2 + 3 K C^2. float32 accumulation; float32 products in TF32 only where
PyTorch's own are, S and M of 16-bit inputs in TF32. Kernel sizes 3 and 5, and the spatial term without squares,
are not fused: they run on PyTorch's operators, whose convolutions are cuDNN's.

Never run on a GPU yet: interpreted and compiled ahead of time only (tests/test_triton.py).
"""

import torch

from fastff import spec
from fastff.kernels.layout import dense, empty_like
from fastff.kernels.torch import goodness as torch_goodness
from fastff.kernels.triton import blocks, epilogue, group_goodness, loss, normalization
from fastff.kernels.triton.goodness.arguments import Config, Head, Result, Scratch, Shape
from fastff.kernels.triton.goodness.direct import direct
from fastff.kernels.triton.goodness.grid import Grid, GridTerm, grid_sizes
from fastff.kernels.triton.goodness.head import head_direct, head_second_moment
from fastff.kernels.triton.goodness.second_moment import second_moment
from fastff.kernels.triton.launch import constants, float32_precision, multiprocessors, on_device, shares, strides

SECOND_MOMENT_CHANNELS = 128  # S [C, C] lives in registers
NORMALIZATIONS = ("none", "layer_norm", "layer_norm_channels")  # fused here; the others run by themselves


class Launch:
    """One batch through the kernels above: buffers, block sizes, and the launches in order. `around`: launches of an epilogue that ends in x."""

    def __init__(self, x, projection, plan, around=None, sizes=None):
        self.x = dense(x)
        B, C, H, W = x.shape
        weight, bias, grid_weight, *_ = projection
        self.head = Head(weight.flatten(1).contiguous(), None if bias is None else bias.contiguous())
        self.second_moment = plan.algorithm == "second_moment"
        self.shape = Shape(B, C, H * W, H, W, len(weight))
        self.source = epilogue.Source(self.x, None, None, *strides(self.x)) if around is None else around.source
        cells = grid_sizes(grid_weight, x)
        self.blocks = sizes or blocks.sizes(
            x.device,
            plan.algorithm,
            B,
            C,
            H * W,
            len(weight),
            cells[0] * cells[1],
            x.element_size(),
            around is not None,
        )
        self.groups = -(-B // self.blocks.NS)
        self.positions, self.parts = self._parts()
        self.fused = self.parts == 1 and grid_weight is None
        self.grid = None if grid_weight is None else GridTerm(projection, self.x, self.parts)
        self.channel_sums = None if around is None else self._new(self.groups * self.parts, 2, C)
        self.scratch = Scratch(
            self._new(B, len(weight)), self._new(B, len(weight)), self._new(self.parts, 2, B),
            self._new(self.parts, B, C, C) if self.second_moment else None,
            self._new(self.parts, B, C) if self.second_moment and bias is not None else None,
        )  # fmt: skip
        exact = float32_precision()
        narrow = x.dtype != torch.float32
        b = self.blocks
        self.config = Config(
            False, False, None, False, 0, around and around.config.ACTIVATION, "tf32" if narrow else exact, "tf32" if narrow else exact,
            "tf32" if narrow else "tf32x3", b.NS, b.BP, b.BC, b.BK, b.BG,
        )  # fmt: skip

    def _new(self, *shape):
        return torch.empty(shape, device=self.x.device, dtype=torch.float32)

    def _parts(self):
        """(positions of a program, programs a sample): several where samples are large, or do not fill two programs a multiprocessor."""
        each, parts = shares(
            -(-self.shape.P // self.blocks.BP), 2 * multiprocessors(self.x.device) // max(1, self.groups)
        )
        return each * self.blocks.BP, parts

    def sweep(
        self, stages, arguments=loss.NO_LOSS, grad_x=None, normalized=None, cells=None, eps=0.0, g=None, **constant
    ):
        """Launch these stages ("first", "head", "loss", "second") of the algorithm's kernel."""
        out = grad_x if grad_x is not None else normalized if normalized is not None else self.x
        result = Result(grad_x, normalized, self.channel_sums, *strides(out))
        means = self.grid.means if self.grid is not None and "first" in stages else None
        grid = Grid(means, cells, *(self.grid.sizes if self.grid else (0, 0)))
        scratch = self.scratch if g is None else self.scratch._replace(g=g)
        config = self.config._replace(
            FIRST="first" in stages, HEAD="head" in stages and self.second_moment, SECOND="second" in stages, **constant
        )
        kernel = second_moment if self.second_moment else direct
        kernel[self.groups, 1 if stages == ("head",) else self.parts](
            self.source, result, self.head, scratch, grid, arguments, self.shape, self.positions, eps, constants(config),
            num_warps=self.blocks.warps,
        )  # fmt: skip

    def first(self):
        """Compute g, with what the later stages need: sums, S and mu, cell means."""
        several = self.parts > 1
        if self.second_moment:
            self.sweep(("first",) if several else ("first", "head"))
            if several:
                self._add_up("second", "mu")
                self.sweep(("head",))
        else:
            g = self._new(self.parts, *self.scratch.g.shape) if several else self.scratch.g
            self.sweep(("first",), g=g)
            self.scratch = self.scratch._replace(g=g.sum(0) if several else g)
        if several:
            sums = normalization.joined_parts(
                self.scratch.sums, self.shape.C * self.shape.P, self.shape.C * self.positions
            )
            self.scratch = self.scratch._replace(sums=sums)
        if self.grid is not None:
            self.scratch.g.add_(self.grid.goodness(self.x))

    def _add_up(self, *names):
        sums = {name: part.sum(0) for name in names if (part := getattr(self.scratch, name)) is not None}
        self.scratch = self.scratch._replace(**sums)

    def cells(self):
        """The gradient of the means over cells for the d in scratch, or None."""
        if self.grid is None:
            return None
        self.grid.backward(self.scratch.d)
        return self.grid.cells

    def head_gradients(self):
        """dL/dW [K, C, 1, 1], dL/dbeta, dL/dV for the d in scratch, after `cells`; None where there is no such parameter."""
        B, C, K = self.shape.B, self.shape.C, self.shape.K
        tiles = -(-K // self.blocks.BK)
        units = B if self.second_moment else self.groups * -(-self.shape.P // self.blocks.BP)
        share, parts = shares(units, 2 * multiprocessors(self.x.device) // tiles, times=4)
        partial, config, d = self._new(parts, K, C), constants(self.config), self.scratch.d
        grad_bias = None
        if self.second_moment:
            head_second_moment[tiles, parts](
                self.head, self.scratch, partial, self.shape, share, config, num_warps=self.blocks.head_warps
            )
            grad_weight = partial.sum(0)
            if self.head.bias is not None:
                beta, mu = self.head.bias.float(), self.scratch.mu.view(B, C)
                grad_weight += 2 * beta[:, None] * (d.T @ mu)
                grad_bias = 2 * (d * (mu @ self.head.weight.float().T + beta)).sum(0)
        else:
            part_bias = None if self.head.bias is None else self._new(parts, K)
            largest = d.abs().amax().view(1) if self.x.dtype == torch.float16 else None
            head_direct[tiles, parts](
                self.source, self.head, self.scratch, largest, partial, part_bias, self.shape, self.groups, share, config,
                num_warps=self.blocks.head_warps,
            )  # fmt: skip
            grad_weight = partial.sum(0)
            grad_bias = None if part_bias is None else part_bias.sum(0)
        grad_grid = None if self.grid is None else self.grid.grads[0]
        return grad_weight.view(K, C, 1, 1), grad_bias, grad_grid

    def step(self, wanted, normalize, grad_x):
        """The StepResult of a spec.Loss and a spec.Normalization; grad_x, where there is one, is written."""
        losses, grad_tau = loss.buffers(wanted, self.scratch.g)
        normalized = None if normalize.name == "none" else empty_like(self.x)
        second = {
            "grad_x": grad_x, "normalized": normalized, "NORM": normalization.constant(normalize), "eps": normalize.eps,
        }  # fmt: skip
        if self.fused and wanted.name not in spec.PAIRED_LOSSES:
            arguments = loss.arguments(wanted, self.shape.B, losses, grad_tau)
            self.sweep(("first", "head", "loss", "second"), arguments, LOSS=loss.constant(wanted), **second)
        else:
            self.first()
            loss.run(self.scratch.g, self.scratch.d, wanted, losses, grad_tau)
            self.sweep(("second",), cells=self.cells(), **second)
        grads = self.head_gradients()
        grad_tau = None if grad_tau is None else grad_tau.sum() * wanted.tau
        result = spec.StepResult(losses, self.scratch.g, grad_x, *grads, grad_tau, normalized)
        if self.grid is None or self.grid.hidden is None:
            return result
        return result.with_hidden(self.grid.grads[1:], *self.grid.statistics)


def fits(x, projection, plan):
    """Whether the kernels here take these arguments; otherwise PyTorch's convolutions and products do."""
    weight = projection.weight
    return (
        plan.algorithm != "products"
        and weight is not None
        and weight.shape[2:] == (1, 1)
        and tuple(projection.padding) == (0, 0)
        and x.numel() > 0
    )


def fits_with_epilogue(y, plan):
    """Whether y, the residual and what is made of them fit beside a tile of the sweeps without spilling (tests/test_triton.py)."""
    return plan.algorithm == "second_moment" or y.shape[1] <= (256 if y.element_size() == 2 else 64)


def goodness(x, projection, plan):
    """g [B, K] float32."""
    if not fits(x, projection, plan):
        return torch_goodness.goodness(x, projection, plan)
    with on_device(x):
        launch = Launch(x, projection, plan)
        launch.first()
        return launch.scratch.g


def goodness_backward(d, x, projection, plan, need_grad_x):
    """Gradients of sum(d * g): (x or None, weight, bias, grid_weight)."""
    if not fits(x, projection, plan):
        return torch_goodness.goodness_backward(d, x, projection, plan, need_grad_x)
    with on_device(x):
        launch = Launch(x, projection, plan)
        if launch.second_moment or launch.grid is not None:
            launch.first()
        launch.scratch = launch.scratch._replace(d=d.float().contiguous())
        grad_x, cells = empty_like(x) if need_grad_x else None, launch.cells()
        if need_grad_x:
            launch.sweep(("second",), grad_x=grad_x, cells=cells)
        return grad_x, *launch.head_gradients()


def step(step, plan):
    """The StepResult of a spec.Step with a Projection, its losses not reduced."""
    if step.epilogue is None:
        return _step(step, plan)
    if (
        fits(step.x, step.goodness, plan)
        and fits_with_epilogue(step.x, plan)
        and step.normalization.name in NORMALIZATIONS
    ):
        return _step_with_epilogue(step, plan)
    return epilogue.step_in_parts(step, lambda inner: _step(inner, plan))


def _step(step, plan):
    """A step without an epilogue."""
    x, normalize = step.x, step.normalization
    with on_device(x):
        if not fits(x, step.goodness, plan):
            inner = torch_goodness.step(step._replace(normalization=spec.Normalization()), plan)
        else:
            fused = normalize if normalize.name in NORMALIZATIONS else spec.Normalization()
            inner = Launch(x, step.goodness, plan).step(step.loss, fused, empty_like(x) if step.need_grad_x else None)
        if inner.normalized is None and normalize.name != "none":
            inner = inner._replace(normalized=group_goodness.normalize(x, normalize))
        return inner


def _step_with_epilogue(step, plan):
    """A step whose sweeps make x of y."""
    with on_device(step.x):
        around = epilogue.Launches(step.x, step.epilogue)
        launch = Launch(around.y, step.goodness, plan, around)
        inner = launch.step(step.loss, step.normalization, empty_like(around.y))
        return inner.before_epilogue(around.finish(inner.grad_x, launch.channel_sums), around.mean, around.var)
