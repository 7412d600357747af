"""The gradient of a convolution's weight by the compiled library, float32 on the CPU (csrc/cpu/convolution.cpp)."""

import torch


def weight_gradient(grad, x, kernel, stride, padding):
    """Return dL/dweight [D, C, k, k] from grad [B, D, P, Q] and x [B, C, H, W]. Inputs that are not channels_last are copied."""
    return torch.ops.fastff.convolution_weight_gradient_native(grad, x, kernel, stride, padding)
