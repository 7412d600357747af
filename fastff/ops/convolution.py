"""torch.ops.fastff.convolution_weight_gradient, the one gradient of a convolution that layer-wise training needs, and a convolution that has it.

    grad [B, D, P, Q], x [B, C, H, W], kernel k, stride, padding -> dL/dweight [D, C, k, k]

Rows: the compiled kernel (with AVX2 1.1 to 2.2 times as fast as oneDNN's at 3 x 3 and 5 x 5 from 16 channels on, channels_last; with AVX-512 for
few positions or many weights alone), PyTorch's own, which defines the op.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from fastff.kernels import native
from fastff.kernels.layout import is_channels_last, laid
from fastff.kernels.native.depthwise import SIZES
from fastff.kernels.torch.convolution import weight_gradient
from fastff.ops import depthwise
from fastff.ops import gradients as partial
from fastff.ops.table import Implementation, always, choose, dispatched, kernel_for, register, transformed, unseen

FEWEST_CHANNELS = 16  # of the compiled kernel: its panels
# With AVX-512 the compiled kernel is quicker than oneDNN's, which passes through the weights more often, at few positions of a minibatch (one thread
# of an EPYC 9005: 1.4 to 8 times at 32 to 512 positions, 0.7 to 1.0 at 2,048) or with many weights (2 to 5 times). Contiguous tensors are brought
# into the layout and the gradient back: 1.2 to 2.9 times at 128 and 256 positions, with fewer than 2^17 weights 0.95 to 1.5; 1.0 to 1.1 at 512.
FEW_POSITIONS, FEW_POSITIONS_CONTIGUOUS, MANY_WEIGHTS = 512, 256, 1 << 20
# Weights from which on a contiguous convolution of few positions is quicker as products with panels of columns, both ways (one thread of an
# EPYC 9005, forward and gradient against oneDNN: 256 channels 2.5 and 3.5 times at 32 positions, 1.4 and 2.4 at 128, 1.1 and 1.4 at 256; 512
# channels 7.0 and 9.9, 1.7 and 3.6, 1.2 and 1.5; 128 channels 1.2, 0.9 and 0.8 forward). With AVX2 1.1 to 1.8 and 1.3 to 14 times.
WEIGHTS_OF_PANELS = 1 << 18
# Sizes from which on a convolution by 3 x 3 filters, stride 1, in channels_last is quicker with 16 multiplications for each 2 x 2 outputs than with
# 36 (one thread of an EPYC 9005, against oneDNN: 40 to 512 channels 1.3 to 1.7 times forward and for the gradient of x, 1.1 to 1.6 for the weight's;
# 20 to 80 channels 1.3, 1.1 to 1.6, 1.0; 16 channels 0.9, 0.9, 0.7; 512 channels of 512 outputs 0.6, 0.6, 1.1, of 1,024 outputs 1.3, 1.5, 1.6).
WINOGRAD_CHANNELS, WINOGRAD_POSITIONS, WINOGRAD_FILTERS = 20, 512, 1 << 18
# Multiply-adds up to which a 1 x 1 convolution is quicker as a matrix product (1.1 to 1.7 times; 2^26: 0.8).
LARGEST_PRODUCT = 1 << 25


def _native(grad, x, kernel, stride, padding):
    return torch.ops.fastff.convolution_weight_gradient_native(grad, x, kernel, stride, padding)


ROWS = [
    Implementation(
        "native",
        native.takes(torch.float32, empty=False),
        _native,
        "fewer than 16 channels, and of more than 256 positions contiguous ones and with AVX-512 less than 2^20 weights, by oneDNN",
        native.slow,
    ),
    Implementation("torch", always, weight_gradient),
    Implementation("reference", always, weight_gradient, "the same as torch"),
]


def _run(grad, x, kernel, stride, padding, impl):
    if x.dim() != 4 or grad.dim() != 4 or x.shape[0] != grad.shape[0]:
        raise ValueError(f"grad: expected [B, D, P, Q] for x [B, C, H, W], got {list(grad.shape)} and {list(x.shape)}")
    if grad.dtype != x.dtype:
        raise TypeError(f"grad: expected {x.dtype} as x is, got {grad.dtype}")
    if kernel < 1 or stride < 1 or padding < 0:
        raise ValueError(f"kernel, stride, padding: expected at least 1, 1, 0, got {kernel}, {stride}, {padding}")
    expected = [(n + 2 * padding - kernel) // stride + 1 for n in x.shape[2:]]
    if list(grad.shape[2:]) != expected:
        raise ValueError(f"grad: expected {expected} positions of this convolution, got {list(grad.shape[2:])}")
    out = choose("convolution", ROWS, impl, x).run(grad, x, kernel, stride, padding)
    like = _fake(grad, x, kernel, stride, padding, impl)
    return out if out.stride() == like.stride() else like.copy_(out)


def _fake(grad, x, kernel, stride, padding, impl):
    return x.new_empty((grad.shape[1], kernel, kernel, x.shape[1])).permute(0, 3, 1, 2)


register(
    "convolution_weight_gradient(Tensor grad, Tensor x, int kernel, int stride, int padding, str impl) -> Tensor",
    _run,
    _fake,
)

PYTORCH, PRODUCT, KERNEL, PANELS, WINOGRAD = "pytorch", "product", "kernel", "panels", "winograd"


def way(x, weight, stride, padding, groups):
    """Return how a convolution of x and its gradients are fastest: PYTORCH, PRODUCT (of matrices), KERNEL (the ops of fastff),
    PANELS (csrc/cpu/convolution_few.cpp) or WINOGRAD (csrc/cpu/convolution_winograd.cpp)."""
    if x.dim() != 4 or x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != x.dtype:
        return PYTORCH
    if torch.is_autocast_enabled("cpu") or stride < 1 or padding < 0:
        return PYTORCH
    k, channels = weight.shape[2], x.shape[1]
    if groups > 1:
        return KERNEL if k in SIZES and kernel_for("depthwise", depthwise.ROWS, x) else PYTORCH
    laid_out = is_channels_last(x)
    if channels == 1 or not (laid_out or x.is_contiguous()):
        return PYTORCH
    if laid_out and k == 1 and stride == 1 and padding == 0 and x.numel() * weight.shape[0] <= LARGEST_PRODUCT:
        return PRODUCT
    if k == 1 or channels < FEWEST_CHANNELS or not kernel_for("convolution", ROWS, x):
        return PYTORCH
    height, width = ((n + 2 * padding - k) // stride + 1 for n in x.shape[2:])
    positions = x.shape[0] * height * width
    fits = min(height, width) > 0 and weight.shape[1] == channels and not dispatched(x, weight)
    large = positions >= WINOGRAD_POSITIONS and min(channels, weight.shape[0]) >= WINOGRAD_CHANNELS
    filters = weight.numel() // 9 <= min(256 * positions, WINOGRAD_FILTERS)
    if laid_out and fits and large and filters and (k, stride) == (3, 1) and padding < 3:
        return WINOGRAD
    if laid_out:
        few = positions <= FEW_POSITIONS or weight.numel() >= MANY_WEIGHTS or not native.has_avx512()
    else:
        few = positions <= FEW_POSITIONS_CONTIGUOUS
        if few and fits and weight.is_contiguous() and weight.numel() >= WEIGHTS_OF_PANELS:
            return PANELS
    return KERNEL if few else PYTORCH


def _weight_gradient(grad, x, kernel, stride, padding):
    """Compute dL/dweight, through the dispatcher only if it must (fastff/ops/table.py)."""
    if dispatched(x, grad):
        return torch.ops.fastff.convolution_weight_gradient(grad, x, kernel, stride, padding, "auto")
    return choose("convolution", ROWS, "auto", x).run(grad, x, kernel, stride, padding)


def forward(x, weight, bias, stride, padding, groups, how):
    """Compute conv2d with k x k filters, one group or one for each channel."""
    if how == PRODUCT:
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    if how == KERNEL and groups > 1:
        y = depthwise.output(x, weight, stride, padding)
        return y if bias is None else y.add_(bias[:, None, None])
    if how == PANELS and (bias is None or bias.shape == weight.shape[:1]):
        y = torch.ops.fastff.convolution_few_native(x.detach(), weight.detach(), stride, padding)
        return y if bias is None else y.add_(bias.detach()[:, None, None])
    if how == WINOGRAD and (bias is None or bias.shape == weight.shape[:1]):
        bias = None if bias is None else bias.detach()
        return torch.ops.fastff.convolution_winograd_native(x.detach(), weight.detach(), bias, padding, False)
    return F.conv2d(x, weight, bias, stride, padding, groups=groups)


def gradients(grad, x, weight, stride, padding, groups, how, wanted):
    """Return dL/dx, dL/dweight and dL/dbias: those that are wanted, else None."""
    if not any(wanted):
        return None, None, None
    need_grad_x, need_weight, need_bias = wanted
    grad_x = grad_weight = grad_bias = None
    if how == KERNEL and groups > 1:
        grad_x, grad_weight = depthwise.gradients(grad, x, weight, stride, padding, need_grad_x)
        need_grad_x = need_weight = False
    elif how == WINOGRAD:
        if need_grad_x:
            grad_x = torch.ops.fastff.convolution_winograd_native(grad, weight.detach(), None, 2 - padding, True)
        if need_weight:
            last = not weight.is_contiguous()
            grad_weight = torch.ops.fastff.convolution_winograd_gradient_native(grad, x, padding, last)
        need_grad_x = need_weight = False
    elif how in (KERNEL, PANELS) and need_weight:
        run = _weight_gradient if how == KERNEL else torch.ops.fastff.convolution_few_gradient_native
        grad_weight = run(grad, x, weight.shape[2], stride, padding)
        grad_weight = laid(grad_weight, not weight.is_contiguous())  # autograd would copy it, and slowly
        need_weight = False
    elif how == PRODUCT and need_weight:
        flat_grad = grad.permute(0, 2, 3, 1).flatten(0, 2)
        grad_weight = (flat_grad.T @ x.permute(0, 2, 3, 1).flatten(0, 2)).view(weight.shape)
        need_weight = False
    if need_bias and not need_weight:  # convolution_backward would do the weight's work again
        grad_bias, need_bias = grad.sum((0, 2, 3)), False
    if need_grad_x or need_weight or need_bias:
        pairs, mask = ([stride] * 2, [padding] * 2, [1, 1]), [need_grad_x, need_weight, need_bias]
        found = torch.ops.aten.convolution_backward(
            grad, x, weight, [weight.shape[0]], *pairs, False, [0, 0], groups, mask
        )
        grad_x, grad_weight, grad_bias = (
            a if b is None else b for a, b in zip((grad_x, grad_weight, grad_bias), found, strict=True)
        )
    return grad_x if wanted[0] else None, grad_weight, grad_bias


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, *options):
        ctx.save_for_backward(x, weight)
        ctx.options, ctx.has_bias = options, bias is not None
        return forward(x, weight, bias, *options)

    @staticmethod
    @unseen
    def backward(ctx, grad):
        need_grad_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        x, weight = ctx.saved_tensors
        parameters = (partial.needs_parameters() and need for need in (need_weight, need_bias and ctx.has_bias))
        *options, how = ctx.options
        if torch.is_grad_enabled():  # the gradient is to be differentiated, which PyTorch's can be
            how = PYTORCH
        found = gradients(grad, x, weight, *options, how, [partial.needs_input(x, need_grad_x), *parameters])
        return *found, None, None, None, None


def convolve(x, weight, bias, stride, padding, groups, how=None):
    """Compute conv2d of x [B, C, H, W] with k x k filters, with the values and gradients of PyTorch, as fast as can be here. `how`: the way."""
    how = how or way(x, weight, stride, padding, groups)
    run = _Convolve.apply if how in (KERNEL, PANELS, WINOGRAD) and torch.is_grad_enabled() else forward
    return run(x, weight, bias, stride, padding, groups, how)


def in_numbers(x, weight, stride, padding, dilation, groups):
    """Return stride and padding of F.conv2d as the numbers that `way` takes, or None: for filters that are not square, in some groups, and others."""
    if x.dim() != 4 or weight.dim() != 4:
        return None
    pairs = [  # "same" is none
        tuple(option) * (2 if len(option) == 1 else 1) if hasattr(option, "__len__") else (option, option)
        for option in (stride, 0 if padding == "valid" else padding, dilation, weight.shape[2:])
    ]
    if any(len(pair) != 2 or pair[0] != pair[1] for pair in pairs) or pairs[2][0] != 1:
        return None
    top, k, channels = pairs[1][0], weight.shape[2], x.shape[1]
    return (pairs[0][0], top) if groups == 1 or (groups == channels == len(weight) and top < k) else None


class Quick(TorchFunctionMode):
    """The mode in which F.conv2d of tensors on a CPU is computed as fast as can be here, whatever code calls it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.conv2d and not transformed():
            return self._conv2d(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _conv2d(self, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        options = in_numbers(input, weight, stride, padding, dilation, groups) if input.numel() else None
        if options is None:
            return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
        return convolve(input, weight, bias, *options, groups)
