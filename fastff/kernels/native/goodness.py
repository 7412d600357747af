"""Goodness by the compiled library, float32 on the CPU: whole samples in one pass (csrc/cpu/goodness.cpp).

Here: what it may be handed. x dense in either layout. Not here but in composed/goodness.py, on PyTorch's own: kernel sizes 3 and 5, and
the direct algorithm for many classes of many channels, whose time is that of large matrix products and those are BLAS's (K C = 512,000: 20 ms
against 11 at (32, 512, 4 x 4, 1000); 51,200: as fast).
"""

import torch

from fastff.kernels.composed import goodness as composed
from fastff.kernels.composed.goodness import dense, empty_like, is_rows

GOODNESS, STEP, BACKWARD = range(3)


LARGE_PRODUCT = 1 << 17
SECOND_MOMENT_COST = (
    0.65  # of what batched products take: halves of two of its four, and t stays in the cache (0.5 to 1.1 at 12 shapes)
)


def fits(x, weight, padding, plan, dtype):
    """Whether the compiled kernel takes these arguments."""
    if dtype != torch.float32 or x.numel() == 0:
        return False
    if weight is None:
        return True
    small = plan.algorithm == "second_moment" or weight.shape[0] * weight.shape[1] <= LARGE_PRODUCT
    return weight.shape[2:] == (1, 1) and tuple(padding) == (0, 0) and small


class Call:
    """The arguments that goodness_native and tail_native share, and the tensors they write: empty where there is no such thing."""

    def __init__(self, x, weight, bias, grid_weight, loss=None):
        self.x, self.head, self.none = dense(x), (weight, bias, grid_weight), x.new_empty(0)
        self.K = len(weight if weight is not None else grid_weight)
        H, W = x.shape[2:]
        self.cut = None
        if grid_weight is not None:  # at most one cell a position
            self.cut = grid_weight[..., : min(H, grid_weight.shape[2]), : min(W, grid_weight.shape[3])]
        none, target = self.none, None
        factors: tuple = (None, None)
        self.numbers = (1.0, 0.0, 0.0, 1.0)
        if loss is not None:
            factors, target = (loss.learned_tau, loss.grad_scale), loss.target
            self.numbers = (loss.tau, loss.margin, loss.label_smoothing, loss.scale)
        self.tensors = (
            self.x, *(none if t is None else t.float().contiguous() for t in (weight, bias, self.cut)),
            none if target is None else target, *(none if t is None else t.float() for t in factors),
        )  # fmt: skip

    def sizes(self, plan, eps):
        cells = (0, 0) if self.cut is None else tuple(self.cut.shape[2:])
        return is_rows(self.x), plan.algorithm == "second_moment", self.K, *cells, *self.numbers, eps

    def outputs(self, losses, grad_x, gradients, normalized):
        """g, losses, dtau, grad_x, the head's three gradients, the normalised x."""
        (B, C), new, none = self.x.shape[:2], self.x.new_empty, self.none
        weight, bias, _ = self.head
        self.out = [
            new((B, self.K)),
            *((new(B), new(B)) if losses else (none, none)),
            empty_like(self.x) if grad_x else none,
            new((self.K, C)) if gradients and weight is not None else none,
            new(self.K) if gradients and bias is not None else none,
            new(self.cut.shape) if gradients and self.cut is not None else none,
            empty_like(self.x) if normalized else none,
        ]
        return self.out

    def gradients(self, need_x=True):
        """(x, weight, bias, grid_weight), None where there is none."""
        grad_x, grad_weight, grad_bias, grad_grid = self.out[3:7]
        weight, bias, grid_weight = self.head
        if self.cut is not None and self.cut.shape != grid_weight.shape:
            whole = torch.zeros_like(grid_weight, memory_format=torch.contiguous_format)
            whole[..., : self.cut.shape[2], : self.cut.shape[3]] = grad_grid
            grad_grid = whole
        return (
            grad_x if need_x else None,
            None if weight is None else grad_weight.view(weight.shape),
            None if bias is None else grad_bias,
            None if grid_weight is None else grad_grid,
        )

    def step(self, loss, normalize, need_x=True):
        """What a row's goodness_step returns."""
        g, losses, dtau, *_, normalized = self.out
        dtau = None if loss.learned_tau is None else dtau.sum() * loss.tau
        return losses, g, *self.gradients(need_x), dtau, normalized if normalize == "layer_norm" else None


def goodness(x, weight, bias, grid_weight, padding, plan, dtype):
    """g [B, K] float32."""
    if not fits(x, weight, padding, plan, dtype):
        return composed.goodness(x, weight, bias, grid_weight, padding, plan, dtype)
    call = Call(x, weight, bias, grid_weight)
    out = call.outputs(losses=False, grad_x=False, gradients=False, normalized=False)
    torch.ops.fastff.goodness_native(*call.tensors, call.none, GOODNESS, *call.sizes(plan, 0.0), *out)
    return out[0]


def goodness_backward(d, x, weight, bias, grid_weight, padding, plan, dtype, need_x):
    """Gradients of sum(d * g): (x or None, weight, bias, grid_weight)."""
    if not fits(x, weight, padding, plan, dtype):
        return composed.goodness_backward(d, x, weight, bias, grid_weight, padding, plan, dtype, need_x)
    call = Call(x, weight, bias, grid_weight)
    out = call.outputs(losses=False, grad_x=need_x, gradients=True, normalized=False)
    torch.ops.fastff.goodness_native(*call.tensors, d.to(dtype).contiguous(), BACKWARD, *call.sizes(plan, 0.0), *out)
    return call.gradients(need_x)


def goodness_step(x, weight, bias, grid_weight, padding, plan, dtype, loss, need_x, normalize, eps):
    """Per-sample losses [B], g [B, K], the four gradients, dL/dtau or None, and the normalised x or None."""
    if not fits(x, weight, padding, plan, dtype):
        return composed.goodness_step(x, weight, bias, grid_weight, padding, plan, dtype, loss, need_x, normalize, eps)
    call = Call(x, weight, bias, grid_weight, loss)
    out = call.outputs(losses=True, grad_x=need_x, gradients=True, normalized=normalize == "layer_norm")
    torch.ops.fastff.goodness_native(*call.tensors, call.none, STEP, *call.sizes(plan, eps), *out)
    return call.step(loss, normalize, need_x)
