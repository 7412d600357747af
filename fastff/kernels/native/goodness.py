"""Goodness by the compiled library, in float32 on the CPU: whole samples in one pass (csrc/cpu/goodness.cpp). 16-bit tensors are widened whole.

Here: what it may be handed. Not here but in composed/goodness.py, on PyTorch's own: kernel sizes 3 and 5, and
the direct algorithm for many classes of many channels, whose time is that of large matrix products and those are BLAS's (K C = 512,000: 20 ms
against 11 at (32, 512, 4 x 4, 1000); 51,200: as fast). With AVX-512 they are as fast here as eager code's and the batched ones half as fast (7.8 ms,
16 by BLAS, 9.6 eager, one thread), so there they stay, as long as there are groups of samples for all threads (goodness.cpp).
"""

import torch

from fastff.kernels import native
from fastff.kernels.composed import goodness as composed

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
    return weight.shape[2:] == (1, 1) and tuple(padding) == (0, 0) and (small or _takes_large(weight))


def _takes_large(weight):
    groups = max(2, (1 << 20) // (weight.shape[0] * weight.shape[1]))
    return native.has_avx512() and torch.get_num_threads() <= groups


def head_of(x, weight, bias, grid_weight, loss=None):
    """The arguments that goodness_native and tail_native share: (weight .. scale factor), (tau .. scale)."""
    parameters = [None if t is None else t.float() for t in (weight, bias, cut_grid(x, grid_weight))]
    if loss is None:
        return (*parameters, None, None, None), (1.0, 0.0, 0.0, 1.0)
    factors = (None if t is None else t.float() for t in (loss.learned_tau, loss.grad_scale))
    return (*parameters, loss.target, *factors), (loss.tau, loss.margin, loss.label_smoothing, loss.scale)


def cut_grid(x, grid_weight):
    """The cells that x has: at most one a position."""
    if grid_weight is None or (grid_weight.shape[2] <= x.shape[2] and grid_weight.shape[3] <= x.shape[3]):
        return grid_weight
    return grid_weight[..., : x.shape[2], : x.shape[3]]


def gradients_of(grads, weight, bias, grid_weight):
    """(x, weight, bias, grid_weight) from what the kernel gives: None for absent ones, zeros for cells that x does not have."""
    grad_x, grad_weight, grad_bias, grad_grid = grads
    if grid_weight is not None and grad_grid.shape != grid_weight.shape:
        whole = torch.zeros_like(grid_weight, memory_format=torch.contiguous_format)
        whole[..., : grad_grid.shape[2], : grad_grid.shape[3]] = grad_grid
        grad_grid = whole
    return (
        grad_x,
        None if weight is None else grad_weight,
        None if bias is None else grad_bias,
        None if grid_weight is None else grad_grid,
    )


def step_of(out, dtype, weight, bias, grid_weight, loss, normalize, need_x=True):
    """What a row's goodness_step returns for x of this dtype."""
    g, losses, dtau, *grads, normalized = out
    grad_x, *grads = gradients_of(grads, weight, bias, grid_weight)
    dtau = None if loss.learned_tau is None else dtau.sum() * loss.tau
    normalized = normalized.to(dtype) if normalize == "layer_norm" else None
    return losses, g, grad_x.to(dtype) if need_x else None, *grads, dtau, normalized


def goodness(x, weight, bias, grid_weight, padding, plan, dtype):
    """g [B, K] float32."""
    if not fits(x, weight, padding, plan, dtype):
        return composed.goodness(x, weight, bias, grid_weight, padding, plan, dtype)
    tensors, numbers = head_of(x, weight, bias, grid_weight)
    second = plan.algorithm == "second_moment"
    return torch.ops.fastff.goodness_native(x.float(), *tensors, None, GOODNESS, second, *numbers, 0.0, False, False)[0]


def goodness_backward(d, x, weight, bias, grid_weight, padding, plan, dtype, need_x):
    """Gradients of sum(d * g): (x or None, weight, bias, grid_weight)."""
    if not fits(x, weight, padding, plan, dtype):
        return composed.goodness_backward(d, x, weight, bias, grid_weight, padding, plan, dtype, need_x)
    tensors, numbers = head_of(x, weight, bias, grid_weight)
    second = plan.algorithm == "second_moment"
    out = torch.ops.fastff.goodness_native(
        x.float(), *tensors, d.to(dtype), BACKWARD, second, *numbers, 0.0, need_x, False
    )
    grad_x, *grads = gradients_of(out[3:7], weight, bias, grid_weight)
    return grad_x.to(x.dtype) if need_x else None, *grads


def goodness_step(x, weight, bias, grid_weight, padding, plan, dtype, loss, need_x, normalize, eps):
    """Per-sample losses [B], g [B, K], the four gradients, dL/dtau or None, and the normalised x or None."""
    if not fits(x, weight, padding, plan, dtype):
        return composed.goodness_step(x, weight, bias, grid_weight, padding, plan, dtype, loss, need_x, normalize, eps)
    tensors, numbers = head_of(x, weight, bias, grid_weight, loss)
    out = torch.ops.fastff.goodness_native(
        x.float(),
        *tensors,
        None,
        STEP,
        plan.algorithm == "second_moment",
        *numbers,
        eps,
        need_x,
        normalize == "layer_norm",
    )
    return step_of(out, x.dtype, weight, bias, grid_weight, loss, normalize, need_x)
