"""torch.ops.fastff.convolution_weight_gradient, the one gradient of a convolution that layer-wise training needs, and a convolution that has it.

    grad [B, D, P, Q], x [B, C, H, W], kernel k, stride, padding -> dL/dweight [D, C, k, k]

Rows: the compiled kernel (1.1 to 2.2 times as fast as oneDNN's at 3 x 3 and 5 x 5 from 16 channels on, channels_last), PyTorch's own, the reference.
"""

import torch
import torch.nn.functional as F

from fastff import reference
from fastff.kernels import native
from fastff.kernels.composed import convolution as composed
from fastff.kernels.composed.goodness import is_rows
from fastff.kernels.native import convolution as native_convolution
from fastff.ops.table import Implementation, always, choose

DEPTHWISE_SIZES = (3, 5)  # of the compiled kernel
FEWEST_CHANNELS = 16  # of the compiled kernel: its panels
LARGEST_PRODUCT = (
    1 << 25
)  # multiply-adds up to which a 1 x 1 convolution is quicker as a matrix product (1.1 to 1.7 times; 2^26: 0.8)


class Reference:
    """The definition of fastff/reference.py."""

    @staticmethod
    def weight_gradient(grad, x, kernel, stride, padding):
        wide = torch.promote_types(x.dtype, torch.float32)
        return reference.convolution_weight_gradient(grad.to(wide), x.to(wide), kernel, stride, padding).to(x.dtype)


def _native_can_run(x):
    if x.device.type != "cpu":
        return f"the compiled kernel runs on the CPU, x is on {x.device.type}"
    if x.dtype != torch.float32:
        return f"the compiled kernel is for float32, x is {x.dtype}"
    if x.numel() == 0:
        return "x is empty"
    return native.reason() or None


ROWS = [
    Implementation(
        "native", _native_can_run, native_convolution, "fewer than 16 channels and contiguous tensors by oneDNN"
    ),
    Implementation("composed", always, composed),
    Implementation("reference", always, Reference),
]

_lib = torch.library.Library("fastff", "FRAGMENT")
_lib.define(
    "convolution_weight_gradient(Tensor grad, Tensor x, int kernel, int stride, int padding, str impl) -> Tensor"
)


def _run(grad, x, kernel, stride, padding, impl):
    if x.dim() != 4 or grad.dim() != 4 or len(x) != len(grad):
        raise ValueError(f"grad: expected [B, D, P, Q] for x [B, C, H, W], got {list(grad.shape)} and {list(x.shape)}")
    if grad.dtype != x.dtype:
        raise TypeError(f"grad: expected {x.dtype} as x is, got {grad.dtype}")
    if kernel < 1 or stride < 1 or padding < 0:
        raise ValueError(f"kernel, stride, padding: expected at least 1, 1, 0, got {kernel}, {stride}, {padding}")
    expected = [(n + 2 * padding - kernel) // stride + 1 for n in x.shape[2:]]
    if list(grad.shape[2:]) != expected:
        raise ValueError(f"grad: expected {expected} positions of this convolution, got {list(grad.shape[2:])}")
    out = choose("convolution", ROWS, impl, x).run.weight_gradient(grad, x, kernel, stride, padding)
    like = _fake(grad, x, kernel, stride, padding, impl)
    return out if out.stride() == like.stride() else like.copy_(out)


def _fake(grad, x, kernel, stride, padding, impl):
    return x.new_empty((grad.shape[1], kernel, kernel, x.shape[1])).permute(0, 3, 1, 2)


_lib.impl("convolution_weight_gradient", _run, "CompositeExplicitAutograd")
torch.library.register_fake("fastff::convolution_weight_gradient", _fake, lib=_lib)


class _Convolve(torch.autograd.Function):
    """conv2d with square filters, and the gradient of its weight by the op above."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.how = stride, padding, bias is not None
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding, has_bias = ctx.how
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_weight, others = None, [need_x, False, need_bias and has_bias]
        if need_weight:
            grad_weight = torch.ops.fastff.convolution_weight_gradient(
                grad, x, weight.shape[2], stride, padding, "auto"
            )
        grad_x, _, grad_bias = (None, None, None)
        if any(others):
            grad_x, _, grad_bias = torch.ops.aten.convolution_backward(
                grad, x, weight, [len(weight)], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1, others
            )
        return grad_x, grad_weight, grad_bias, None, None


def convolve(x, weight, bias, stride, padding):
    """conv2d of x [B, C, H, W] with weight [D, C, k, k]: values and gradients as PyTorch's, by whichever way is quickest here."""
    quick = x.dim() == 4 and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if (
        not quick
        or not x.is_contiguous(memory_format=torch.channels_last)
        or x.shape[1] == 1
        or torch.is_autocast_enabled("cpu")
    ):
        return F.conv2d(x, weight, bias, stride, padding)
    (D, C, k, _), positions = weight.shape, x.numel() // x.shape[1]
    if k == 1 and stride == 1 and padding == 0 and positions * C * D <= LARGEST_PRODUCT:
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    if k > 1 and C >= FEWEST_CHANNELS and choose("convolution", ROWS, "auto", x).name != "composed":
        return _Convolve.apply(x, weight, bias, stride, padding)
    return F.conv2d(x, weight, bias, stride, padding)


class _Depthwise(torch.autograd.Function):
    """A depthwise convolution with the gradients of fastff/ops/depthwise.py."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.how = stride, padding, bias is not None
        if is_rows(x) and stride == 1:  # PyTorch's own is quicker, and its sums are not needed here
            return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))
        y = torch.ops.fastff.depthwise(x, weight, stride, padding, "auto")[0]
        return y if bias is None else y.add_(bias[:, None, None])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding, has_bias = ctx.how
        need_x = ctx.needs_input_grad[0]
        dx, dw = torch.ops.fastff.depthwise_backward(grad, x, weight, stride, padding, need_x, "auto")
        return dx if need_x else None, dw, grad.sum((0, 2, 3)) if has_bias else None, None, None


def convolve_depthwise(x, weight, bias, stride, padding):
    """conv2d of x [B, C, H, W] with one filter a channel, weight [C, 1, k, k]: values and gradients as PyTorch's."""
    quick = (
        x.dim() == 4
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.shape[1] >= FEWEST_CHANNELS
    )
    if not quick or weight.shape[2] not in DEPTHWISE_SIZES or torch.is_autocast_enabled("cpu"):
        return F.conv2d(x, weight, bias, stride, padding, groups=len(weight))
    return _Depthwise.apply(x, weight, bias, stride, padding)
