"""torch.ops.fastff.layer_norm: each sample to mean 0 and variance 1 over all its elements, without affine (Ba et al. 2016).

x [B, ...] -> the same shape and dtype, dense, channels_last where x is. Rows: the Triton kernel, the compiled kernel, PyTorch's own, the reference.
"""

import torch
import torch.nn.functional as F

from fastff import reference
from fastff.kernels import native, triton
from fastff.kernels.composed.goodness import empty_like, is_rows
from fastff.ops.table import Implementation, Lazy, always, choose, implement


def _native_can_run(x):
    if x.device.type != "cpu":
        return f"the compiled kernel runs on the CPU, x is on {x.device}"
    return native.reason() or None


def _native_passed_over(x):
    if x.dtype not in (torch.float32, torch.float64):
        return f"slower than PyTorch's for 16-bit types, x is {x.dtype}"
    return None


def _native(x, eps):
    y = torch.ops.fastff.layer_norm_native(x, eps)
    return y if y.stride() == empty_like(x).stride() else empty_like(x).copy_(y)


def _flat(x, by_rows):
    """x as rows [B, C*H*W], channels varying fastest where `by_rows`, and the function that brings such rows back to x's shape.

    The norm takes in all elements of a sample, so their order does not matter: with is_rows(x) nothing is copied into another layout."""
    b, c, h, w = x.shape
    if by_rows:
        return x.permute(0, 2, 3, 1).reshape(b, -1), lambda y: y.view(b, h, w, c).permute(0, 3, 1, 2)
    return x.reshape(b, -1), lambda y: y.view(x.shape)


def _composed(x, eps):
    rows, back = _flat(x, is_rows(x))
    return back(F.layer_norm(rows, rows.shape[1:], eps=eps))


def _reference(x, eps):
    wide = x if x.dtype == torch.float64 else x.float()
    return empty_like(x).copy_(reference.layer_norm(wide, eps).view(x.shape))


def over_channels(x, eps):
    """The alternative: over C at each position of x [B, C, H, W]; plain PyTorch."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], eps=eps).permute(0, 3, 1, 2)


def _triton(x, eps):
    return Lazy("fastff.kernels.triton.layer_norm").layer_norm(x, eps)


ROWS = [
    Implementation("triton", triton.reason, _triton),
    Implementation("native", _native_can_run, _native, passed_over=_native_passed_over),
    Implementation("composed", always, _composed),
    Implementation("reference", always, _reference),
]

_lib = torch.library.Library("fastff", "FRAGMENT")
_lib.define("layer_norm(Tensor x, float eps, str impl) -> Tensor")


def run(x, eps, impl):
    if x.numel() == 0:
        return empty_like(x)
    return choose("layer_norm", ROWS, impl, x).run(x, eps)


implement(_lib, "layer_norm", run, lambda x, eps, impl: empty_like(x))


def _save(ctx, inputs, output):
    x, ctx.eps, _ = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    """PyTorch's own backward on the samples as flat rows (7 times faster than the formula in elementwise ops); it differentiates again."""
    (x,) = ctx.saved_tensors
    if x.numel() == 0:
        return grad, None, None
    rows, back = _flat(x, is_rows(x))
    # contiguous, as PyTorch makes them anyhow: of others its fake results have strides that the real ones do not
    rows, grad_rows = rows.contiguous(), _flat(grad, is_rows(x))[0].contiguous()
    _, mean, rstd = torch.native_layer_norm(rows, rows.shape[1:], None, None, ctx.eps)
    out, _, _ = torch.ops.aten.native_layer_norm_backward(
        grad_rows, rows, rows.shape[1:], mean, rstd, None, None, [True, False, False]
    )
    return back(out), None, None


torch.library.register_autograd("fastff::layer_norm", _backward, setup_context=_save, lib=_lib)
