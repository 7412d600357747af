"""A Projection's goodness and whole local steps on it by the compiled library, in float32 on the CPU (csrc/cpu/goodness.cpp).

16-bit images are widened a sample at a time. fastff/kernels/torch takes what the library has no kernel for: kernel sizes 3 and 5, and the direct
algorithm for many classes of many channels, whose time is that of large matrix products, where BLAS is faster (K C = 512,000: 20 ms against 11 at
(32, 512, 4 x 4, 1000); 51,200: as fast). With AVX-512 the products are as fast here as BLAS and the batched ones of PyTorch half as fast
(7.8 ms, 16 by BLAS, 9.6 in eager code, one thread), so there they stay here, as long as there are groups of samples for all threads.
"""

import torch

from fastff.kernels import native
from fastff.kernels.native import group_goodness
from fastff.kernels.native import step as native_step
from fastff.kernels.torch import goodness as fallback
from fastff.kernels.torch import normalization as torch_normalization
from fastff.spec import Projection

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
    if not fits(x, projection, plan):
        return fallback.goodness(x, projection, plan)
    return torch.ops.fastff.goodness_forward_native(x, *_cut(projection, x), plan.algorithm == "second_moment")


def goodness_backward(d, x, projection, plan, need_grad_x):
    if not fits(x, projection, plan):
        return fallback.goodness_backward(d, x, projection, plan, need_grad_x)
    second_moment = plan.algorithm == "second_moment"
    grads = torch.ops.fastff.goodness_backward_native(x, *_cut(projection, x), second_moment, d.float(), need_grad_x)
    grad_x, grad_weight, grad_bias, grad_grid = (t if t.numel() else None for t in grads)
    return grad_x, grad_weight, grad_bias, _whole(projection, grad_grid)


def normalize(x, normalization):
    if normalization.name == "layer_norm" and x.dtype != torch.float32:  # PyTorch's is faster
        return torch_normalization.normalize(x, normalization)
    return group_goodness.normalize(x, normalization)


def step(local, plan):
    x, projection = local.x, local.goodness
    if not fits(x, projection, plan):
        return fallback.step(local, plan, normalize)
    if projection.grid_weight is None:
        return native_step.run(local, plan.algorithm == "second_moment")
    result = native_step.run(local._replace(goodness=_cut(projection, x)), plan.algorithm == "second_moment")
    return result._replace(grad_grid_weight=_whole(projection, result.grad_grid_weight))


def _cut(projection, x):
    """Return the Projection in float32, with at most one cell of the grid a position of x."""
    if projection.grid_weight is not None:
        projection = projection._replace(grid_weight=projection.grid_weight[..., : x.shape[2], : x.shape[3]])
    return Projection(*(t.float() if isinstance(t, torch.Tensor) else t for t in projection))


def _whole(projection, grad_grid):
    """Return grad_grid_weight with zeros for cells of the grid beyond the positions of x."""
    if grad_grid is None or grad_grid.shape == projection.grid_weight.shape:
        return grad_grid
    whole = torch.zeros_like(projection.grid_weight, memory_format=torch.contiguous_format)
    whole[..., : grad_grid.shape[2], : grad_grid.shape[3]] = grad_grid
    return whole
