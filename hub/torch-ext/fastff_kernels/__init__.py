"""fastff's CPU operators. `ops` has all of them; their schemas are in the C++ files that register them."""

import platform

import torch

if platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
    raise ImportError("fastff_kernels: expected a processor with AVX2")

from ._ops import ops

__all__ = ["layer_norm", "ops"]


def layer_norm(x, eps=1e-5):
    """Return x [B, ...] less its mean and divided by its standard deviation, both of each sample, without parameters."""
    images = x if x.dim() == 4 else x.flatten(1)[:, :, None, None]
    return ops.normalize_native(images, 1, 1, eps).view(x.shape)
