"""torch.ops.fastff.layer_norm: each sample to mean 0 and variance 1 over all its elements, without affine (Ba et al. 2016).

x [B, ...] -> the same shape and dtype, dense, channels_last where x is. Rows: the Triton kernel, the compiled kernel, PyTorch's own, the reference.
"""

import torch

from fastff.kernels import native, triton
from fastff.kernels import reference as reference_kernels
from fastff.kernels.layout import as_result_of, empty_like, is_channels_last, samples
from fastff.kernels.torch.normalization import layer_norm
from fastff.ops.table import Implementation, Lazy, always, choose, implement


def _native_skip_reason(x):
    if x.dtype not in (torch.float32, torch.float64):
        return f"slower than PyTorch's for 16-bit types, x is {x.dtype}"
    return None


def _native(x, eps):
    return torch.ops.fastff.layer_norm_native(x, eps)


def _triton(x, eps):
    return Lazy("fastff.kernels.triton.layer_norm").layer_norm(x, eps)


ROWS = [
    Implementation("triton", triton.reason, _triton),
    Implementation("native", native.takes(), _native, skip_reason=_native_skip_reason),
    Implementation("torch", always, layer_norm),
    Implementation("reference", always, reference_kernels.layer_norm),
]

_lib = torch.library.Library("fastff", "FRAGMENT")
_lib.define("layer_norm(Tensor x, float eps, str impl) -> Tensor")


def _run(x, eps, impl):
    if x.numel() == 0:
        return empty_like(x)
    return as_result_of(x, choose("layer_norm", ROWS, impl, x).run(x, eps))


implement(_lib, "layer_norm", _run, lambda x, eps, impl: empty_like(x))


def _save(ctx, inputs, output):
    x, ctx.eps, _ = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad):
    """Call PyTorch's backward on samples as rows of a matrix: 7 times faster than the formula in elementwise operators, and differentiable."""
    (x,) = ctx.saved_tensors
    if x.numel() == 0:
        return grad, None, None
    flat, back = samples(x, is_channels_last(x))
    flat_grad, _ = samples(grad, is_channels_last(x))
    _, mean, rstd = torch.native_layer_norm(flat, flat.shape[1:], None, None, ctx.eps)
    out, _, _ = torch.ops.aten.native_layer_norm_backward(
        flat_grad, flat, flat.shape[1:], mean, rstd, None, None, [True, False, False]
    )
    return back(out), None, None


torch.library.register_autograd("fastff::layer_norm", _backward, setup_context=_save, lib=_lib)
