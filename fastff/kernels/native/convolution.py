"""The gradient of a convolution's weight by the compiled library, float32 on the CPU (csrc/cpu/convolution.cpp)."""

import torch


def weight_gradient(grad, x, kernel, stride, padding):
    """grad [B, D, P, Q], x [B, C, H, W] -> [D, C, k, k], channels_last; inputs in another layout are copied into it."""
    return torch.ops.fastff.convolution_weight_gradient_native(grad, x, kernel, stride, padding)
