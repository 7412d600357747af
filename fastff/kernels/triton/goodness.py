"""Goodness, its loss and its local gradient as Triton kernels that own whole samples.

One launch for a batch (no spatial term, enough samples to fill the GPU): a program reads its samples once from device memory, computes
goodness, the loss and d, and goes over them a second time, out of the L2 cache, for the gradient and the layer-normalised next input.

    first sweep    direct: a = W X by tiles, g = mean a^2        second moment: S = X X^T / P, g = w^T S w + 2 beta (w . mu) + beta^2
    loss           from g of the program's samples: loss, d = dL/dg, dL/dtau
    second sweep   direct: dL/dx = (2/P) W^T (d * a), a recomputed   second moment: dL/dx = (2/P)(M X + c), M = W^T diag(d) W
    head           a second, small launch: dL/dW (and dL/dbeta), partial sums over groups of samples, added in a fixed order

The same kernels run in pieces where a piece needs the whole batch between the sweeps: with the spatial term (its [B, C G^2] x [C G^2, K]
product is cuBLAS's), and with few large samples, which several programs share (partial sums again added in a fixed order). No floating-point
atomics: the same input gives the same bits.

Bytes: x read twice (the second time mostly from L2), dL/dx and the next input written once; the floor is three times x. Products: direct
5 P C K multiply-adds a sample (a three times), second moment 2 P C^2 + 3 K C^2. float32 accumulation; float32 products in TF32 only where
torch.backends.cuda.matmul.allow_tf32 says so, S and M of 16-bit inputs in TF32. kernel sizes 3 and 5, and the spatial term without squares,
are not fused: they run on composed/goodness.py, whose convolutions are cuDNN's.

Never run on a GPU yet: interpreted and compiled ahead of time only (tests/test_triton.py).
"""

import torch
import triton

from fastff.kernels.composed import goodness as composed
from fastff.kernels.composed.goodness import dense, empty_like, is_rows
from fastff.kernels.triton import blocks
from fastff.kernels.triton.goodness_kernels import direct, head_direct, head_second_moment, loss_kernel, second_moment

SECOND_MOMENT_CHANNELS = 128  # S [C, C] lives in registers


class Launch:
    """One batch through the kernels above: buffers, block sizes, and the launches in order."""

    def __init__(self, x, weight, bias, grid_weight, how, residual=None, affine=None, activation=None, sizes=None):
        self.x = dense(x)
        self.tail = {"residual": residual, "affine": affine, "ACT": activation}
        B, C, H, W = x.shape
        self.P, self.K = H * W, len(weight)
        self.weight, self.bias = weight.flatten(1).contiguous(), None if bias is None else bias.contiguous()
        self.grid_weight, self.second_moment = grid_weight, how.algorithm == "second_moment"
        self.G = (
            (0, 0)
            if grid_weight is None
            else tuple(min(n, g) for n, g in zip((H, W), grid_weight.shape[2:], strict=True))
        )
        self.blocks = sizes or blocks.sizes(
            x.device,
            how.algorithm,
            B,
            C,
            self.P,
            self.K,
            self.G[0] * self.G[1],
            x.element_size(),
            activation is not None,
        )
        self.groups = -(-B // self.blocks.NS)
        self.positions, self.parts = self._parts()
        self.fused = self.parts == 1 and grid_weight is None
        exact = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
        self.precision = {"PRECISION": exact if x.dtype == torch.float32 else "tf32"}
        self.g, self.d = self._new(B, self.K), self._new(B, self.K)
        self.channel_sums = None if activation is None else self._new(self.groups * self.parts, 2, C)
        self.sums = self._new(self.parts, 2, B)
        self.means = None if grid_weight is None else self._new(self.parts, B, C, self.G[0] * self.G[1])
        self.second = self._new(self.parts, B, C, C) if self.second_moment else None
        self.mu = self._new(self.parts, B, C) if self.second_moment and bias is not None else None

    def _new(self, *shape):
        return torch.empty(shape, device=self.x.device, dtype=torch.float32)

    def _parts(self):
        """(positions of a program, programs a sample): several where samples alone do not fill two programs a multiprocessor."""
        tiles = -(-self.P // self.blocks.BP)
        wanted = max(1, 2 * multiprocessors(self.x.device) // max(1, self.groups))
        each = -(-tiles // min(tiles, wanted))
        return each * self.blocks.BP, -(-tiles // each)

    def sweep(
        self, stages, loss=None, losses=None, dtau=None, grad_x=None, y=None, norm=0, cells=None, eps=0.0, g=None
    ):
        B, C, H, W = self.x.shape
        out = grad_x if grad_x is not None else y if y is not None else self.x
        arguments = dict(
            x=self.x, weight=self.weight, bias=self.bias, g=self.g if g is None else g, d=self.d, grad_x=grad_x, y=y, sums=self.sums,
            means=self.means if "first" in stages else None, cells=cells, loss=losses, dtau=dtau, **_loss_arguments(loss),
            B=B, C=C, P=self.P, H=H, W=W, K=self.K, GH=self.G[0], GW=self.G[1], positions=self.positions,
            xb=self.x.stride(0), xc=strides(self.x)[0], xp=strides(self.x)[1], ob=out.stride(0), oc=strides(out)[0], op=strides(out)[1],
            eps=eps, channel_sums=self.channel_sums, **self.tail, FIRST="first" in stages, LOSS="loss" in stages, SECOND="second" in stages,
            NORM=norm, **self.precision,
            BP=self.blocks.BP, BC=self.blocks.BC, BK=self.blocks.BK, BG=self.blocks.BG, num_warps=self.blocks.warps,
        )  # fmt: skip
        parts = 1 if stages == ("head",) else self.parts
        if self.second_moment:
            second_only = {
                "second": self.second, "mu": self.mu, "HEAD": "head" in stages,
                "HEAD_PRECISION": "tf32" if self.x.dtype != torch.float32 else self.precision["PRECISION"],
            }  # fmt: skip
            second_moment[(self.groups, parts)](**arguments, **second_only)
        else:
            direct[(self.groups, parts)](**arguments, NS=self.blocks.NS)

    def first(self):
        """g, with what the later stages need: sums, S and mu, cell means."""
        if self.second_moment:
            self.sweep(("first", "head") if self.parts == 1 else ("first",))
            if self.parts > 1:
                self.second, self.mu = self.second.sum(0), None if self.mu is None else self.mu.sum(0)
                self.sweep(("head",))
        else:
            g = self._new(self.parts, *self.g.shape) if self.parts > 1 else self.g
            self.sweep(("first",), g=g)
            self.g = g.sum(0) if self.parts > 1 else g
        if self.parts > 1:
            self.sums = self.sums.sum(0)
        if self.means is not None:
            self.means = self.means.sum(0) / _areas(self.x, self.G)
            self.g += self.means.flatten(1) @ self._grid_rows().T

    def _grid_rows(self):
        return self.grid_weight[..., : self.G[0], : self.G[1]].float().flatten(1)

    def cells(self):
        if self.grid_weight is None:
            return None
        return (self.d @ self._grid_rows()).view(len(self.x), -1, self.G[0] * self.G[1])

    def losses(self, loss):
        losses, dtau = self._new(len(self.x)), self._new(len(self.x)) if loss.learned_tau is not None else None
        return losses, dtau

    def loss(self, loss, losses, dtau):
        B = len(self.x)
        loss_kernel[(-(-B // 4),)](
            g=self.g, d=self.d, loss=losses, dtau=dtau, B=B, K=self.K, **_loss_arguments(loss), NS=4, BK=self._loss_tile(), num_warps=4
        )  # fmt: skip

    def _loss_tile(self):
        return min(max(16, triton.next_power_of_2(self.K)), 256)

    def head_gradients(self):
        """dL/dW, dL/dbeta, dL/dV for the d in self.d; None where there is no such parameter."""
        B, C = self.x.shape[:2]
        tiles = -(-self.K // self.blocks.BK)
        units = B if self.second_moment else self.groups
        parts = max(1, min(units, 2 * multiprocessors(self.x.device) // tiles))
        share = -(-units // parts)
        parts = -(-units // share)
        partial = self._new(parts, self.K, C)
        grad_bias = None
        if self.second_moment:
            head_second_moment[(tiles, parts)](
                self.weight, self.d, self.second, partial, B, C, self.K, share,
                PRECISION="tf32" if self.x.dtype != torch.float32 else self.precision["PRECISION"],
                BC=self.blocks.BC, BK=self.blocks.BK, num_warps=self.blocks.head_warps,
            )  # fmt: skip
            grad_weight = partial.sum(0)
            if self.bias is not None:
                beta, mu = self.bias.float(), self.mu.view(B, C)
                grad_weight += 2 * beta[:, None] * (self.d.T @ mu)
                grad_bias = 2 * (self.d * (mu @ self.weight.float().T + beta)).sum(0)
        else:
            part_bias = None if self.bias is None else self._new(parts, self.K)
            largest = self.d.abs().amax().view(1) if self.x.dtype == torch.float16 else None
            head_direct[(tiles, parts)](
                self.x, self.tail["residual"], self.tail["affine"], self.weight, self.bias, self.d, largest, partial, part_bias,
                B, C, self.P, self.K, self.groups, share,
                self.x.stride(0), *strides(self.x), **self.precision, ACT=self.tail["ACT"], NS=self.blocks.NS, BP=self.blocks.BP, BC=self.blocks.BC,
                BK=self.blocks.BK, num_warps=self.blocks.head_warps,
            )  # fmt: skip
            grad_weight = partial.sum(0)
            grad_bias = None if part_bias is None else part_bias.sum(0)
        grad_grid = None
        if self.grid_weight is not None:
            grad_grid = torch.zeros_like(self.grid_weight, dtype=torch.float32, memory_format=torch.contiguous_format)
            part = grad_grid[..., : self.G[0], : self.G[1]]
            part.copy_((self.d.T @ self.means.flatten(1)).view(part.shape))
        return grad_weight.view(self.K, C, 1, 1), grad_bias, grad_grid


def multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def strides(x):
    """Of channels and positions, for x dense in either layout."""
    return (1, x.shape[1]) if is_rows(x) else (x.shape[2] * x.shape[3], 1)


def _areas(x, grid):
    """Positions in each cell, [GH GW]; made on the device, since a step waits for nothing from the host."""
    heights, widths = (
        ((i + 1) * size + cells - 1) // cells - i * size // cells
        for size, cells in zip(x.shape[2:], grid, strict=True)
        for i in (torch.arange(cells, device=x.device),)
    )
    return (heights[:, None] * widths).flatten().float()


def _loss_arguments(loss):
    if loss is None:
        return {
            "target": None,
            "tau_factor": None,
            "scale_factor": None,
            "tau": 1.0,
            "margin": 0.0,
            "smoothing": 0.0,
            "scale": 1.0,
        }
    return {
        "target": loss.target.contiguous(), "tau_factor": loss.learned_tau, "scale_factor": loss.grad_scale, "tau": loss.tau, "margin": loss.margin,
        "smoothing": loss.label_smoothing, "scale": loss.scale,
    }  # fmt: skip


def fits(x, weight, padding):
    """Whether the kernels above take these arguments; otherwise PyTorch's convolutions and products do (composed/goodness.py)."""
    return weight is not None and weight.shape[2:] == (1, 1) and tuple(padding) == (0, 0) and x.numel() > 0


def on_device(x):
    return torch.cuda.device_of(x) if x.is_cuda else torch.no_grad()


def goodness(x, weight, bias, grid_weight, padding, plan, dtype):
    """g [B, K] float32."""
    if not fits(x, weight, padding):
        return composed.goodness(x, weight, bias, grid_weight, padding, plan, dtype)
    with on_device(x):
        launch = Launch(x, weight, bias, grid_weight, plan)
        launch.first()
        return launch.g


def goodness_backward(d, x, weight, bias, grid_weight, padding, plan, dtype, need_x):
    """Gradients of sum(d * g): (x or None, weight, bias, grid_weight)."""
    if not fits(x, weight, padding):
        return composed.goodness_backward(d, x, weight, bias, grid_weight, padding, plan, dtype, need_x)
    with on_device(x):
        launch = Launch(x, weight, bias, grid_weight, plan)
        if launch.second_moment or grid_weight is not None:
            launch.first()
        launch.d = d.float().contiguous()
        grad_x = empty_like(x) if need_x else None
        if need_x:
            launch.sweep(("second",), grad_x=grad_x, cells=launch.cells())
        return grad_x, *launch.head_gradients()


NORMS = {"none": 0, "layer_norm": 1, "layer_norm_channels": 2}


def goodness_step(x, weight, bias, grid_weight, padding, plan, dtype, loss, need_x, normalize, eps):
    """Per-sample losses [B], g [B, K], the four gradients, dL/dtau or None, and the normalised x."""
    if not fits(x, weight, padding):
        return composed.goodness_step(x, weight, bias, grid_weight, padding, plan, dtype, loss, need_x, normalize, eps)
    with on_device(x):
        grad_x = empty_like(x) if need_x else None
        return step(Launch(x, weight, bias, grid_weight, plan), loss, grad_x, normalize, eps)


def step(launch, loss, grad_x, normalize, eps):
    """goodness_step's results; grad_x, where there is one, is written."""
    y = None if normalize == "none" else empty_like(launch.x)
    losses, dtau = launch.losses(loss)
    second = {"grad_x": grad_x, "y": y, "norm": NORMS[normalize], "eps": eps}
    if launch.fused:
        launch.sweep(("first", "head", "loss", "second"), loss, losses, dtau, **second)
    else:
        launch.first()
        launch.loss(loss, losses, dtau)
        launch.sweep(("second",), cells=launch.cells(), **second)
    grads = launch.head_gradients()
    return losses, launch.g, grad_x, *grads, None if dtau is None else dtau.sum() * loss.tau, y
