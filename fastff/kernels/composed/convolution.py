"""The gradient of a convolution's weight by PyTorch's own operator."""

import torch


def weight_gradient(grad, x, kernel, stride, padding):
    """grad [B, D, P, Q], x [B, C, H, W] -> [D, C, k, k]."""
    weight = x.new_empty((1,)).expand(grad.shape[1], x.shape[1], kernel, kernel)  # its shape is what counts
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]
