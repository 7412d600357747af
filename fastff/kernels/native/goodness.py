"""A Projection's goodness and whole local steps on it by the compiled library, in float32 on the CPU (csrc/cpu/goodness.cpp, tail.cpp).

16-bit tensors are widened whole. fastff/kernels/torch takes what the library has no kernel for: kernel sizes 3 and 5, and the direct algorithm
for many classes of many channels, whose time is that of large matrix products, where BLAS is faster (K C = 512,000: 20 ms against 11 at
(32, 512, 4 x 4, 1000); 51,200: as fast). With AVX-512 the products are as fast here as BLAS and the batched ones of PyTorch half as fast
(7.8 ms, 16 by BLAS, 9.6 in eager code, one thread), so there they stay here, as long as there are groups of samples for all threads.
"""

import torch

from fastff.kernels import native
from fastff.kernels.native import group_goodness
from fastff.kernels.torch import goodness as fallback
from fastff.kernels.torch import normalization as torch_normalization
from fastff.kernels.torch.epilogue import completed
from fastff.spec import ACTIVATIONS, StepResult

GOODNESS, STEP, BACKWARD = range(3)
LARGE_PRODUCT = 1 << 17
# Time relative to batched products: it computes halves of two of the four, and t stays in the cache (0.5 to 1.1 at 12 shapes).
SECOND_MOMENT_COST = 0.65


def fits(x, projection, plan):
    """Return whether the library has a kernel for these arguments."""
    weight = projection.weight
    if projection.dtype(x) != torch.float32 or x.numel() == 0:
        return False
    if weight is None:
        return True
    small = plan.algorithm == "second_moment" or weight.shape[0] * weight.shape[1] <= LARGE_PRODUCT
    return weight.shape[2:] == (1, 1) and projection.padding == (0, 0) and (small or _takes_large(weight))


def _takes_large(weight):
    groups = max(2, (1 << 20) // (weight.shape[0] * weight.shape[1]))
    return native.has_avx512() and torch.get_num_threads() <= groups


def goodness(x, projection, plan):
    """Return g [B, K] in float32."""
    if not fits(x, projection, plan):
        return fallback.goodness(x, projection, plan)
    return _call(x, projection, plan, GOODNESS)[0]


def goodness_backward(d, x, projection, plan, need_grad_x):
    """Return the gradients of sum(d * g) for x, weight, bias and grid_weight: None for absent ones, and for x unless it is needed."""
    if not fits(x, projection, plan):
        return fallback.goodness_backward(d, x, projection, plan, need_grad_x)
    _, _, _, grad_x, *grads, _ = _call(x, projection, plan, BACKWARD, d=d.float(), need_grad_x=need_grad_x)
    return grad_x if need_grad_x else None, *_head_gradients(projection, grads)


def normalize(x, normalization):
    """Return x normalized, or None for "none"."""
    if normalization.name != "layer_norm":
        return group_goodness.normalize(x, normalization)
    if x.dtype != torch.float32:  # PyTorch's is faster for 16-bit types
        return torch_normalization.normalize(x, normalization)
    return torch.ops.fastff.layer_norm_native(x, normalization.eps)


def step(local, plan):
    """Return the StepResult of a Step, its losses not reduced."""
    x, projection, loss, normalization = local.x, local.goodness, local.loss, local.normalization
    if not fits(x, projection, plan) or loss.name != "cross_entropy":
        return fallback.step(local, plan, normalize)
    if normalization.name not in ("none", "layer_norm"):
        return completed(local, lambda local: step(local, plan), normalize)
    if local.epilogue is not None:
        return _result(local, _call_with_epilogue(local, plan))
    options = {"eps": normalization.eps, "need_grad_x": local.need_grad_x, "normalize": normalization.name != "none"}
    return _result(local, _call(x, projection, plan, STEP, loss, **options))


def _tensors(x, projection, loss):
    """Return the tensors that both operators of the library begin with."""
    _, _, grid_weight, _ = projection
    if grid_weight is not None:  # at most one cell a position
        grid_weight = grid_weight[..., : x.shape[2], : x.shape[3]]
    factors = (None, None, None) if loss is None else (loss.target, loss.learned_tau, loss.grad_scale)
    floats = (projection.weight, projection.bias, grid_weight, *factors[1:])
    weight, bias, grid_weight, *rest = (None if t is None else t.float() for t in floats)
    return x.float(), weight, bias, grid_weight, factors[0], *rest


def _numbers(x, loss):
    return (
        (1.0, 0.0, 0.0, 1.0) if loss is None else (loss.tau, loss.margin, loss.label_smoothing, loss.scale(x.shape[0]))
    )


def _call(x, projection, plan, mode, loss=None, d=None, eps=0.0, need_grad_x=False, normalize=False):
    return torch.ops.fastff.goodness_native(
        *_tensors(x, projection, loss), d, mode, plan.algorithm == "second_moment", *_numbers(x, loss), eps, need_grad_x, normalize
    )  # fmt: skip


def _call_with_epilogue(local, plan):
    x, epilogue, normalization = local.x, local.epilogue, local.normalization
    own = (None if t is None else t.float() for t in (epilogue.residual, epilogue.weight, epilogue.bias))
    return torch.ops.fastff.tail_native(
        *_tensors(x, local.goodness, local.loss), *own, epilogue.eps, ACTIVATIONS.index(epilogue.activation),
        plan.algorithm == "second_moment", *_numbers(x, local.loss), normalization.eps,
        epilogue.need_grad_residual and epilogue.residual is not None, normalization.name == "layer_norm",
    )  # fmt: skip


def _head_gradients(projection, grads):
    """Return None for absent parameters, and a gradient of zero for cells of the grid beyond the positions of x."""
    grad_weight, grad_bias, grad_grid = (None if p is None else t for p, t in zip(projection[:3], grads, strict=True))
    if grad_grid is not None and grad_grid.shape != projection.grid_weight.shape:
        whole = torch.zeros_like(projection.grid_weight, memory_format=torch.contiguous_format)
        whole[..., : grad_grid.shape[2], : grad_grid.shape[3]] = grad_grid
        grad_grid = whole
    return grad_weight, grad_bias, grad_grid


def _result(local, out):
    g, losses, grad_tau, grad_x, *grads = out[:7]
    grad_tau = None if local.loss.learned_tau is None else grad_tau.sum() * local.loss.tau
    return StepResult(losses, g, grad_x, *_head_gradients(local.goodness, grads), grad_tau, *out[7:])
