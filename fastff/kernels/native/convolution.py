"""The gradient of a convolution's weight by the compiled library, float32 on the CPU (csrc/cpu/convolution.cpp)."""

import torch


def weight_gradient(grad, x, kernel, stride, padding):
    """grad [B, D, P, Q], x [B, C, H, W] -> [D, C, k, k], channels_last; inputs in another layout are copied into it."""
    grad, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad, x))
    grad_weight = x.new_empty((grad.shape[1], kernel, kernel, x.shape[1])).permute(0, 3, 1, 2)
    torch.ops.fastff.convolution_weight_gradient_native(grad, x, stride, padding, grad_weight)
    return grad_weight
