"""Goodness of groups of channels by the compiled library, all four types on the CPU (csrc/cpu/group_goodness.cpp, normalization.cpp).

With an epilogue the arithmetic is in float32; float64 goes through PyTorch's epilogue."""

import torch

from fastff.kernels.native import step as native_step
from fastff.kernels.torch.epilogue import completed
from fastff.spec import NORMALIZATIONS


def goodness(x, groups):
    return torch.ops.fastff.group_goodness_forward_native(x, *groups)


def goodness_backward(d, x, groups):
    return torch.ops.fastff.group_goodness_backward_native(
        x, *groups, d.to(torch.promote_types(x.dtype, torch.float32))
    )


def normalize(x, normalization):
    if normalization.name == "none":
        return None
    name, *numbers = normalization
    return torch.ops.fastff.normalize_native(x, NORMALIZATIONS.index(name), *numbers)


def step(local):
    if local.epilogue is not None and local.x.dtype == torch.float64:
        return completed(local, step, normalize)
    return native_step.run(local)
