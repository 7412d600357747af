"""torch.ops.fastff.depthwise: depthwise convolution and its gradients.

    depthwise(x, weight, stride, padding)           x [B, C, H, W], weight [C, 1, k, k] -> y [B, C, H', W'] laid out as x
    depthwise_backward(grad, x, weight, ..., need_grad_x) -> (dL/dx or an empty tensor, dL/dweight)

The first convolution of a block never needs dL/dx. Rows: the Triton kernels (never timed on a GPU, so "auto" skips them), the compiled kernel,
PyTorch's own, which defines the op. An implementation has forward(x, weight, stride, padding) -> y and backward(grad, x, weight, stride, padding,
need_grad_x) -> dL/dx, or None unless it is needed, and dL/dweight.
"""

import torch

from fastff.kernels import native, triton
from fastff.kernels.layout import as_result_of, empty_like
from fastff.kernels.native import depthwise as native_depthwise
from fastff.kernels.torch import depthwise as torch_depthwise
from fastff.ops.table import Implementation, Lazy, always, choose, dispatched, register


def _native_skip_reason(x):
    if x.shape[1] < 16:
        return f"slower than PyTorch below 16 channels, x has {x.shape[1]}"
    return native.slow(x)


ROWS = [
    Implementation(
        "triton",
        triton.reason,
        Lazy("fastff.kernels.triton.depthwise"),
        skip_reason=lambda x: "never timed on a GPU, so not seen to win",
    ),
    Implementation(
        "native",
        native.takes(torch.float32),
        native_depthwise,
        "other filters than 3 x 3 and 5 x 5 by PyTorch",
        _native_skip_reason,
    ),
    Implementation("torch", always, torch_depthwise),
    Implementation("reference", always, torch_depthwise, "the same as torch"),
]


def check(x, weight, stride, padding):
    """Raise ValueError or TypeError that names the wrong argument."""
    if x.dim() != 4:
        raise ValueError(f"x: expected [B, C, H, W], got {list(x.shape)}")
    if weight.dim() != 4 or weight.shape[:2] != (x.shape[1], 1) or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"weight: expected [{x.shape[1]}, 1, k, k] for x of {x.shape[1]} channels, got {list(weight.shape)}"
        )
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: expected {x.dtype} as x is, got {weight.dtype}")
    if stride < 1:
        raise ValueError(f"stride: expected at least 1, got {stride}")
    if not 0 <= padding < weight.shape[2]:
        raise ValueError(f"padding: expected 0 to {weight.shape[2] - 1} for this kernel, got {padding}")
    if min(x.shape[2:]) + 2 * padding < weight.shape[2]:
        raise ValueError(
            f"x: expected at least {weight.shape[2]} rows and columns with the padding, got {list(x.shape)}"
        )


def _forward(x, weight, stride, padding, impl):
    check(x, weight, stride, padding)
    y = choose("depthwise", ROWS, impl, x).run.forward(x, weight, stride, padding)
    like = torch_depthwise.out_like(x, weight, stride, padding)
    return y if y.stride() == like.stride() else like.copy_(y)


def _forward_fake(x, weight, stride, padding, impl):
    return torch_depthwise.out_like(x, weight, stride, padding)


def _backward(grad, x, weight, stride, padding, need_grad_x, impl):
    check(x, weight, stride, padding)
    expected = torch_depthwise.out_shape(x, weight, stride, padding)
    if list(grad.shape) != expected or grad.dtype != x.dtype:
        raise ValueError(f"grad: expected {expected} of {x.dtype} as y is, got {list(grad.shape)} of {grad.dtype}")
    dx, dw = choose("depthwise", ROWS, impl, x).run.backward(grad, x, weight, stride, padding, need_grad_x)
    return as_result_of(x, dx) if need_grad_x else x.new_empty(0), dw.contiguous()


def _backward_fake(grad, x, weight, stride, padding, need_grad_x, impl):
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    return (empty_like(x) if need_grad_x else x.new_empty(0)), dw


def output(x, weight, stride, padding):
    """Compute y, through the dispatcher only if it must (fastff/ops/table.py)."""
    if dispatched(x, weight):
        return torch.ops.fastff.depthwise(x, weight, stride, padding, "auto")
    return choose("depthwise", ROWS, "auto", x).run.forward(x, weight, stride, padding)


def gradients(grad, x, weight, stride, padding, need_grad_x):
    """Return dL/dx, undefined unless it is needed, and dL/dweight, called as `output` calls its op."""
    if dispatched(x, grad, weight):
        return torch.ops.fastff.depthwise_backward(grad, x, weight, stride, padding, need_grad_x, "auto")
    return choose("depthwise", ROWS, "auto", x).run.backward(grad, x, weight, stride, padding, need_grad_x)


def _save(ctx, inputs, output):
    x, weight, *ctx.options = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx, grad):
    x, weight = ctx.saved_tensors
    stride, padding, impl = ctx.options
    dx, dw = torch.ops.fastff.depthwise_backward(grad, x, weight, stride, padding, ctx.needs_input_grad[0], impl)
    return (dx if ctx.needs_input_grad[0] else None), dw, None, None, None


def _no_backward(ctx, *cotangents):
    raise RuntimeError("depthwise_backward: its results are gradients and cannot be differentiated again")


_CALL = "Tensor x, Tensor weight, int stride, int padding"
register(f"depthwise({_CALL}, str impl) -> Tensor", _forward, _forward_fake, _differentiate, _save)
register(
    f"depthwise_backward(Tensor grad, {_CALL}, bool need_grad_x, str impl) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
    _no_backward,
)
