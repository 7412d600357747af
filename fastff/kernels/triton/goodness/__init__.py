"""Goodness, its loss and its local gradient as persistent Triton kernels, whose programs take whole samples, one after another.

One sweep for a batch: a program reads a sample once from device memory, computes goodness, the loss and d, and goes over it a second time, out of
the L2 cache, for the gradient and the layer-normalised next input.

    first part     direct: a = W x by tiles, g = mean a^2        second moment: S = X X^T / P, g = w^T S w + 2 beta (w . mu) + beta^2
    loss           from g of the program's samples: loss, d = dL/dg, dL/dtau
    second part    direct: dL/dx = (2/P) W^T (d * a), dL/dW      second moment: dL/dx = (2/P)(M X + c), M = W^T diag(d) W
    head           second moment only, a launch of its own: dL/dW from S
    reduce         a small launch: what the programs have added up over their samples (dL/dW, losses, sums of batch norm), in a fixed order

For more channels and classes than a sweep can hold, three matrix products (products.py) take the places of the two parts of direct.

The same kernels run in pieces where a piece needs the whole batch between the two parts: with a hidden layer of the spatial term or grid weights too
large to be read for each group of samples (their products are cuBLAS's), with losses of pairs, and with few large samples, which several programs
share (partial sums again added in a fixed order). No floating-point atomics: the same input gives the same bits.

Bytes: x read twice (the second time mostly from L2), dL/dx and the next input written once; the floor is three times x. Direct: in pieces of BC
channels, x is read from L2 2 C / BC + 1 times. Products: direct 4 P C K multiply-adds a sample (a twice; 3 where a sample is one tile), second moment
2 P C^2 + 3 K C^2. float32 accumulation; float32 products in TF32 only where PyTorch's own are, S and M of 16-bit inputs in TF32. What `reason`
refuses runs on PyTorch's operators: kernel sizes 3 and 5 (cuDNN), the spatial term without squares, many classes under direct.

Never run on a GPU yet: interpreted and compiled ahead of time only (tests/test_triton.py).
"""

import torch
import triton

from fastff import spec
from fastff.kernels.layout import dense, empty_like, is_channels_last
from fastff.kernels.torch import goodness as torch_goodness
from fastff.kernels.triton import blocks, epilogue, group_goodness, launch, loss, normalization
from fastff.kernels.triton.goodness import grid, reduce
from fastff.kernels.triton.goodness.arguments import Config, Head, Result, Scratch
from fastff.kernels.triton.goodness.direct import direct
from fastff.kernels.triton.goodness.products import Products
from fastff.kernels.triton.goodness.second_moment import head_second_moment, second_moment
from fastff.kernels.triton.goodness.spatial import SpatialTerm
from fastff.kernels.triton.launch import constants, float32_precision, multiprocessors, on_device, shares

NO_END = epilogue.Finish(None, None, None, None)
NORMALIZATIONS = ("none", "layer_norm", "layer_norm_channels")  # fused here; the others run by themselves


class Launch:
    """One batch through the kernels above: buffers, block sizes, and the launches in order. `around`: launches of an epilogue that ends in x."""

    def __init__(self, x, projection, plan, around=None, sizes=None):
        self.x = dense(x)
        B, C, H, W = x.shape
        weight, bias, self.grid_weight, *_ = projection
        K, self.B, hidden = len(weight), B, projection.hidden
        cells = grid.grid_sizes(self.grid_weight, x)
        many = 0 if self.grid_weight is None else cells[0] * cells[1]
        M = C if hidden is None else len(hidden.weight)
        self.second_moment, by_products = plan.algorithm == "second_moment", plan.algorithm == "products"
        self.source, self.norm, self.counts = (
            (epilogue.Source(self.x, None, None), epilogue.NO_NORM, (0, 0)) if around is None else (around.source, around.norm, around.counts)
        )  # fmt: skip
        self.around = around
        b = sizes or blocks.sizes(x.device, plan.algorithm, B, C, H * W, K, many, x.element_size(), around is not None)
        inside = None
        if many and hidden is None and not by_products:
            arch = blocks.architecture(x.device)
            inside = blocks.with_grid_inside(b, B, C, K, many, x.element_size(), around is not None, arch)
        self.grid_inside, self.blocks = inside is not None, inside or b
        b = self.blocks
        self.tiles, self.groups, self.chunks = -(-H * W // b.BP), -(-B // b.NS), -(-C // b.BC)
        self.processors = multiprocessors(x.device)
        # several programs a sample where samples are large, or leave half of the multiprocessors without any
        few = 2 * self.groups * self.chunks <= self.processors
        each, self.parts = shares(self.tiles, self.processors // (self.groups * self.chunks) if few else 1)
        if by_products:  # each program of a takes one tile
            each, self.parts = 1, self.tiles
        self.positions = each * b.BP
        exact = float32_precision()
        narrow = x.dtype != torch.float32
        self.config = Config(
            C, H * W, H, W, K, *cells, M, is_channels_last(self.x), b.NS, b.BP, b.BC, b.BK, b.BG, triton.next_power_of_2(K),
            around and around.config.ACTIVATION, "tf32" if narrow else exact, "tf32" if narrow else exact, "tf32" if narrow else "tf32x3",
            0, self.parts == 1, False, False, None, False,
        )  # fmt: skip
        self.head = Head(
            weight.flatten(1).contiguous(), None if bias is None else bias.contiguous(),
            self.grid_weight[..., : cells[0], : cells[1]].contiguous() if many else None, None if hidden is None else hidden.weight.contiguous(),
        )  # fmt: skip
        # z in a launch of its own: behind several programs a sample, in float32 in pieces, whose sweep has no register left, and where the cells of a
        # tile's samples would not fit the shared memory
        self.samples_of_z = min(b.NS, max(1, 64 // b.BG))
        in_pieces = not narrow and self.chunks > 1
        self.hidden_apart = self.parts > 1 or in_pieces or by_products or self.samples_of_z < b.NS
        second = self.second_moment
        d_as_x = by_products and not many and x.dtype == torch.bfloat16
        self.scratch = Scratch(
            self.new(self.parts, B, K), x.new_empty(B, K) if d_as_x else self.new(B, K), None if by_products else self.new(self.parts, 2, B),
            self.new(self.parts, B, C, C) if second else None, self.new(self.parts, B, C) if second and bias is not None else None,
            self.new(self.parts, B, C, *cells) if many and not by_products else None, self.new(B, C, *cells) if many else None,
            self.new(self.chunks, B, K) if self.grid_inside and not second else None,
            self.new(B, M, *cells) if hidden else None, self.new(-(-B // self.samples_of_z), 2, M) if hidden else None,
        )  # fmt: skip
        self.grid = SpatialTerm(self, hidden) if many else None
        self.products = Products(self, self.grid_weight) if by_products else None
        self.weights = self.sums = None

    def new(self, *shape):
        """Memory for float32 numbers."""
        return torch.empty(shape, device=self.x.device, dtype=torch.float32)

    def sweep(self, stages, arguments=loss.NO_LOSS, grad_x=None, normalized=None, eps=0.0, parts=None, **constant):
        """Launch these stages ("first", "head", "loss", "second") of the algorithm's kernel, or the products of the first or of the second."""
        if self.products is not None:
            if "first" in stages:
                self.products.outputs()
            else:
                self.weights = self.products.gradients(grad_x)
            return
        b, parts = self.blocks, parts or self.parts
        items, tiles = self.groups * parts, -(-self.positions // b.BP)
        wanted = max(1, blocks.resident(b) * self.processors // self.chunks)
        share = max(1, min(-(-items // wanted), 4 * launch.MOST // tiles))
        programs, scratch = -(-items // share), self.scratch
        if "second" in stages:
            C, K = self.config.C, self.config.K
            self.weights = None if self.second_moment else self.new(programs, K * C + K)
            self.sums = None if self.around is None else self.new(programs, 2, C)
        else:
            scratch = scratch._replace(cells=None)
        if "first" not in stages:
            scratch = scratch._replace(means=None)
        if self.hidden_apart:
            scratch = scratch._replace(z=None)
        result = Result(grad_x, normalized, self.weights, self.sums, None)
        config = self.config._replace(
            WHOLE=parts == 1,
            FIRST="first" in stages,
            HEAD="head" in stages and self.second_moment,
            SECOND="second" in stages,
            **constant,
        )
        kernel = second_moment if self.second_moment else direct
        kernel[programs, self.chunks](
            self.source, self.norm, self.head, scratch, result, arguments, self.B, self.positions, parts, *self.counts, eps, constants(config),
            **blocks.options(b),
        )  # fmt: skip

    def first(self):
        """Compute g of the squares, with what the later stages need: sums, S and mu, means over cells, z."""
        self.sweep(("first", "head") if self.parts == 1 else ("first",))
        if self.parts > 1:
            scratch, names = self.scratch, ("g", "sums", "second", "mu", "means")
            of_parts = {name: t for name in names if (t := getattr(scratch, name)) is not None}
            self.scratch = scratch._replace(**{name: self.new(1, *t.shape[1:]) for name, t in of_parts.items()})
            most = max(t[0].numel() for t in of_parts.values())
            reduce.join[max(-(-self.B // reduce.ROWS.value), -(-most // reduce.COLUMNS.value)),](
                scratch._replace(g=None) if self.second_moment else scratch, self.scratch, self.B, self.positions, self.parts,
                constants(self.config), num_warps=4,
            )  # fmt: skip
            if self.second_moment:
                self.sweep(("head",), parts=1)
        if self.products is not None and self.grid is not None:
            self.scratch = self.scratch._replace(means=self.products.means())
        if self.hidden_apart and self.scratch.z is not None:
            programs = len(self.scratch.moments), -(-self.config.M // grid.HIDDEN.value)
            config = constants(self.config._replace(NS=self.samples_of_z))
            grid.hidden_layer[programs](self.head, self.scratch, self.B, config, num_warps=4)

    def reduced(self, arguments=loss.NO_LOSS, number=None, grad_x=None):
        """(dL/dW [K, C, 1, 1], dL/dbeta, dL/dV, EpilogueGradients, dL/d(a hidden layer's weight), the reduced loss, dL/dtau), after the second sweep;
        None where there is no such parameter. number: of the loss of `arguments`; grad_x: what this sweep has written."""
        C, K, M, b = self.config.C, self.config.K, self.config.M, self.blocks
        if self.second_moment:
            tiles = -(-K // b.HK)
            share, parts = shares(self.B, 2 * self.processors // tiles, times=4)
            self.weights = self.new(parts, K * C + K)
            head_second_moment[tiles, parts](
                self.head, self.scratch, self.weights, self.B, share, constants(self.config._replace(BK=b.HK)),
                **blocks.options(b._replace(warps=b.head_warps)),
            )  # fmt: skip
        term, sums, hidden = self.grid, self.sums, self.grid and self.grid.weights
        computed = term and term.grad_weight  # by cuBLAS
        grad_grid = self.new(*self.head.grid_weight.shape) if term and computed is None else None
        end, of_end, *rest = (NO_END, 0, 0, None) if sums is None else self.around.finish(grad_x)
        columns = K * C + K, 0 if hidden is None else M * C
        BK = min(reduce.CLASSES, max(16, self.config.LK))
        programs = sum(-(-n // 128) for n in columns)
        programs += 0 if grad_grid is None else -(-grad_grid[0].numel() // 64) * -(-K // BK)
        out = self.new(K * C + K + 2 * C + M * C + 2)
        reduce.reduce[programs + 1 + of_end,](
            Result(None, None, self.weights, sums, hidden), *(0 if t is None else len(t) for t in (self.weights, sums, hidden)), out,
            self.scratch, arguments, term and term.inputs, grad_grid, self.B, end, rest[0],
            constants(self.config._replace(BK=BK, LOSS=number)), rest[1], num_warps=8,
        )  # fmt: skip
        weight, bias, norm, hidden, (value, grad_tau) = out.split([K * C, K, 2 * C, M * C, 2])
        gradients = None if sums is None else self.around.gradients(end, norm.view(2, C))
        grads = weight.view(K, C, 1, 1), None if self.head.bias is None else bias
        grads += (None if term is None else term.padded(grad_grid if computed is None else computed),)
        return *grads, gradients, hidden.view(M, C), value, grad_tau

    def step(self, wanted, normalize, grad_x):
        """(StepResult of a spec.Loss and a spec.Normalization, EpilogueGradients or None); grad_x, where there is one, is written."""
        losses, of_tau = loss.buffers(wanted, self.scratch.g[0])
        arguments = loss.arguments(wanted, self.B, losses, of_tau)
        normalized = None if normalize.name == "none" else empty_like(self.x)
        second = {
            "grad_x": grad_x, "normalized": normalized, "NORM": normalization.constant(normalize), "eps": normalize.eps,
        }  # fmt: skip
        number = loss.constant(wanted)
        inside = self.products is None and (self.grid is None or self.grid_inside)
        if self.parts == 1 and inside and wanted.name not in spec.PAIRED_LOSSES:
            self.sweep(("first", "head", "loss", "second"), arguments, LOSS=number, **second)
        else:
            self.first()
            if self.grid is None:
                loss.run(self.scratch.g[0], self.scratch.d, wanted, losses, of_tau)
            else:
                self.grid.step(wanted, losses, of_tau)
            self.sweep(("second",), parts=self.parts, **second)
        *grads, around, hidden, value, grad_tau = self.reduced(arguments, number, grad_x)
        losses, grad_tau = losses if wanted.reduction == "none" else value, None if of_tau is None else grad_tau
        result = spec.StepResult(losses, self.scratch.g[0], grad_x, *grads, grad_tau, normalized)
        if self.scratch.z is not None:
            statistics, grads = self.grid.norm.statistics, self.grid.layer.grads
            result = result.with_hidden((hidden, grads[1], grads[0]), statistics[0], statistics[3])
        return result, around


def reason(x, projection, plan, epilogue=False):
    """Why the kernels here do not take these arguments, or None: PyTorch's convolutions and products compute them then."""
    weight = projection.weight
    if weight is None:
        return "a head without squares is a matrix product"
    if weight.shape[2:] != (1, 1) or tuple(projection.padding) != (0, 0):
        return "heads of 3 x 3 and 5 x 5 are convolutions"
    if x.numel() == 0:
        return "there are no samples"
    C, arch = x.shape[1], blocks.architecture(x.device)
    return blocks.refusal(plan.algorithm, C, len(weight), x.element_size(), epilogue, arch)


def goodness(x, projection, plan):
    """g [B, K] float32."""
    if reason(x, projection, plan):
        return torch_goodness.goodness(x, projection, plan)
    with on_device(x):
        launch = Launch(x, projection, plan)
        launch.first()
        if launch.grid is not None:
            launch.grid.goodness()
        return launch.scratch.g[0]


def goodness_backward(d, x, projection, plan, need_grad_x):
    """Gradients of sum(d * g): (x or None, weight, bias, grid_weight)."""
    if reason(x, projection, plan):
        return torch_goodness.goodness_backward(d, x, projection, plan, need_grad_x)
    with on_device(x):
        launch = Launch(x, projection, plan)
        if launch.second_moment or launch.products is not None or launch.grid is not None:
            launch.first()
        launch.scratch = launch.scratch._replace(d=d.float().contiguous())
        if launch.grid is not None:
            launch.grid.backward()
        grad_x = empty_like(x) if need_grad_x else None
        launch.sweep(("second",), grad_x=grad_x)
        return grad_x, *launch.reduced()[:3]


def step(step, plan):
    """The StepResult of a spec.Step with a Projection; its losses are reduced where it was one sweep that computed them."""
    if step.epilogue is None:
        return _step(step, plan)
    if not reason(step.x, step.goodness, plan, epilogue=True) and step.normalization.name in NORMALIZATIONS:
        return _step_with_epilogue(step, plan)
    return epilogue.step_in_parts(step, lambda inner: _step(inner, plan))


def _step(step, plan):
    """A step without an epilogue."""
    x, normalize = step.x, step.normalization
    with on_device(x):
        if reason(x, step.goodness, plan):
            inner = torch_goodness.step(step._replace(normalization=spec.Normalization()), plan)
        else:
            fused = plan.algorithm != "products" and normalize.name in NORMALIZATIONS
            grad_x = empty_like(x) if step.need_grad_x else None
            inner, _ = Launch(x, step.goodness, plan).step(
                step.loss, normalize if fused else spec.Normalization(), grad_x
            )
        if inner.normalized is None and normalize.name != "none":
            inner = inner._replace(normalized=group_goodness.normalize(x, normalize))
        return inner


def _step_with_epilogue(step, plan):
    """A step whose sweeps make x of y."""
    with on_device(step.x):
        around = epilogue.Launches(step.x, step.epilogue)
        launch = Launch(around.y, step.goodness, plan, around)
        inner, gradients = launch.step(step.loss, step.normalization, empty_like(around.y))
        return inner.before_epilogue(gradients, around.mean, around.var)
