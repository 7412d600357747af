"""Muon's step by the compiled library, float32 on the CPU (csrc/cpu/muon.cpp)."""

import torch

from fastff.kernels.torch import muon as fallback


def update(params, grads, momenta, lr, momentum, weight_decay):
    """As fallback.update, by which tensors are updated that are no matrices in memory, or learning rates that are tensors."""
    if isinstance(lr, torch.Tensor) or not all(map(_is_matrix, params, momenta)):
        fallback.update(params, grads, momenta, lr, momentum, weight_decay)
    else:
        alike = [
            g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for p, g in zip(params, grads, strict=True)
        ]
        decay, rate = 1 - lr * weight_decay, fallback.SCALE * lr
        torch.ops.fastff.muon_native(params, alike, momenta, fallback.ROWS, momentum, decay, rate)


def _is_matrix(p, momentum):
    """Whether rows p[i] lie behind each other in memory, and the momentum likewise."""
    dense = p.is_contiguous() or (p.dim() == 4 and p.is_contiguous(memory_format=torch.channels_last))
    return dense and momentum.stride() == p.stride() and momentum.dtype is p.dtype
