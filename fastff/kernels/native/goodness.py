"""Goodness by the compiled library, float32 on the CPU: whole samples in one pass (csrc/cpu/goodness.cpp).

Here: what it may be handed. x dense in either layout. Not here but in composed/goodness.py, on PyTorch's own: kernel sizes 3 and 5, and
the direct algorithm for many classes of many channels, whose time is that of large matrix products and those are BLAS's (K C = 512,000: 20 ms
against 11 at (32, 512, 4 x 4, 1000); 51,200: as fast).
"""

import torch

from fastff.kernels.composed import goodness as composed
from fastff.kernels.composed.goodness import Loss, dense, empty_like, is_rows

GOODNESS, STEP, BACKWARD = range(3)


LARGE_PRODUCT = 1 << 17
SECOND_MOMENT_COST = (
    0.65  # of what batched products take: halves of two of its four, and t stays in the cache (0.5 to 1.1 at 12 shapes)
)


def _fits(x, weight, padding, plan, dtype):
    if dtype != torch.float32 or x.numel() == 0:
        return False
    if weight is None:
        return True
    small = plan.algorithm == "second_moment" or weight.shape[0] * weight.shape[1] <= LARGE_PRODUCT
    return weight.shape[2:] == (1, 1) and tuple(padding) == (0, 0) and small


def _call(mode, x, weight, bias, grid_weight, plan, loss, d, need_x, normalize, eps):
    """(g, losses, dtau, grad_x, grad_weight, grad_bias, grad_grid, normalized): empty tensors where there is no such thing."""
    x = dense(x)
    B, C, H, W = x.shape
    none, new = x.new_empty(0), x.new_empty
    K = len(weight if weight is not None else grid_weight)
    cut = (
        None
        if grid_weight is None
        else grid_weight[..., : min(H, grid_weight.shape[2]), : min(W, grid_weight.shape[3])]
    )
    grads = mode != GOODNESS
    out = [
        new((B, K)),
        new(B) if mode == STEP else none,
        new(B) if mode == STEP else none,
        empty_like(x) if grads and need_x else none,
        new((K, C)) if grads and weight is not None else none,
        new(K) if grads and bias is not None else none,
        new(cut.shape) if grads and cut is not None else none,
        empty_like(x) if normalize else none,
    ]
    factors = (
        [none, none]
        if loss is None
        else [none if t is None else t.float() for t in (loss.learned_tau, loss.grad_scale)]
    )
    numbers = (1.0, 0.0, 0.0, 1.0) if loss is None else (loss.tau, loss.margin, loss.label_smoothing, loss.scale)
    torch.ops.fastff.goodness_native(
        x, *(none if t is None else t.float().contiguous() for t in (weight, bias, cut)), none if loss is None else loss.target,
        none if d is None else d.contiguous(), *factors, mode, is_rows(x), plan.algorithm == "second_moment", K,
        *((0, 0) if cut is None else cut.shape[2:]), *numbers, eps, *out,
    )  # fmt: skip
    if cut is not None and grads and cut.shape != grid_weight.shape:
        whole = torch.zeros_like(grid_weight, memory_format=torch.contiguous_format)
        whole[..., : cut.shape[2], : cut.shape[3]] = out[6]
        out[6] = whole
    return out


def goodness(x, weight, bias, grid_weight, padding, plan, dtype):
    """g [B, K] float32."""
    if not _fits(x, weight, padding, plan, dtype):
        return composed.goodness(x, weight, bias, grid_weight, padding, plan, dtype)
    return _call(GOODNESS, x, weight, bias, grid_weight, plan, None, None, False, False, 0.0)[0]


def goodness_backward(d, x, weight, bias, grid_weight, padding, plan, dtype, need_x):
    """Gradients of sum(d * g): (x or None, weight, bias, grid_weight)."""
    if not _fits(x, weight, padding, plan, dtype):
        return composed.goodness_backward(d, x, weight, bias, grid_weight, padding, plan, dtype, need_x)
    out = _call(BACKWARD, x, weight, bias, grid_weight, plan, None, d.to(dtype), need_x, False, 0.0)
    return _gradients(out, weight, bias, grid_weight, need_x)


def _gradients(out, weight, bias, grid_weight, need_x):
    grad_x, grad_weight, grad_bias, grad_grid = out[3:7]
    return (
        grad_x if need_x else None,
        None if weight is None else grad_weight.view(weight.shape),
        None if bias is None else grad_bias,
        None if grid_weight is None else grad_grid,
    )


def goodness_step(x, weight, bias, grid_weight, padding, plan, dtype, loss: Loss, need_x, normalize, eps):
    """Per-sample losses [B], g [B, K], the four gradients, dL/dtau or None, and the normalised x or None."""
    if not _fits(x, weight, padding, plan, dtype):
        return composed.goodness_step(x, weight, bias, grid_weight, padding, plan, dtype, loss, need_x, normalize, eps)
    out = _call(STEP, x, weight, bias, grid_weight, plan, loss, None, need_x, normalize == "layer_norm", eps)
    dtau = None if loss.learned_tau is None else out[2].sum() * loss.tau
    grads = _gradients(out, weight, bias, grid_weight, need_x)
    return out[1], out[0], *grads, dtau, out[7] if normalize == "layer_norm" else None
