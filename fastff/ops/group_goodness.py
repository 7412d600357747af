"""torch.ops.fastff.group_goodness, .group_goodness_backward and .normalize: goodness without weights and normalizations, differentiable.

x [B, C, H, W] -> g [B, K] over K groups of neighbouring channels, or g [B, P] over the channels at each position (K = 1). Formulas:
fastff/reference.py. An implementation has goodness(x, groups), goodness_backward(d, x, groups), normalize(x, normalization) and step(step) for
fastff/ops/step.py.
"""

import torch
import torch.nn.functional as F

from fastff import reference
from fastff.kernels import native, triton
from fastff.kernels import reference as reference_kernels
from fastff.kernels.layout import as_result_of, empty_like, widened
from fastff.kernels.native import group_goodness as native_group_goodness
from fastff.kernels.torch import group_goodness as torch_group_goodness
from fastff.kernels.torch import normalization as of_pytorch
from fastff.ops.table import Implementation, Lazy, always, choose, concerns, dispatched, implement, transformed
from fastff.spec import Groups, Normalization

ROWS = [
    Implementation("triton", triton.reason, Lazy("fastff.kernels.triton.group_goodness")),
    Implementation("native", native.takes(), native_group_goodness, "float64 behind batch norm by PyTorch's operators"),
    Implementation("torch", always, torch_group_goodness),
    Implementation("reference", always, reference_kernels),
]

_lib = torch.library.Library("fastff", "FRAGMENT")
_GROUPS = "int groups, int power, bool mean, bool positions"
_lib.define("normalize(Tensor x, str name, int groups, float eps, str impl) -> Tensor")
_lib.define(f"group_goodness(Tensor x, {_GROUPS}, str impl) -> Tensor")
_lib.define(f"group_goodness_backward(Tensor d, Tensor x, {_GROUPS}, str impl) -> Tensor")


def _goodness(x, groups, power, mean, positions, impl):
    if x.numel() == 0:
        return _goodness_fake(x, groups, power, mean, positions, impl)
    run = choose("group_goodness", ROWS, impl, x).run
    return run.goodness(x, Groups(groups, power, mean, positions)).contiguous()


def _goodness_fake(x, groups, power, mean, positions, impl):
    columns = Groups(groups, power, mean, positions).columns(x)
    return x.new_empty((x.shape[0], columns), dtype=torch.promote_types(x.dtype, torch.float32))


def _backward(d, x, groups, power, mean, positions, impl):
    if x.numel() == 0:
        return empty_like(x)
    run = choose("group_goodness", ROWS, impl, x).run
    return as_result_of(x, run.goodness_backward(d.contiguous(), x, Groups(groups, power, mean, positions)))


def _normalize(x, name, groups, eps, impl):
    if x.numel() == 0:
        return empty_like(x)
    if impl == "auto" and x.device.type == "cpu" and x.shape[2:] == (1, 1) and x.dtype == torch.float32 and eps > 0:
        if name.startswith("l2"):  # rows of a matrix: the kernel's passes are for samples of many positions
            return as_result_of(x, x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + eps))
        if name.startswith("rms"):
            return as_result_of(x, x * (x.square().mean(1, keepdim=True) + eps).rsqrt())
    normalization = Normalization(name, groups, eps)
    return as_result_of(x, choose("group_goodness", ROWS, impl, x).run.normalize(x, normalization))


implement(_lib, "normalize", _normalize, lambda x, *options: empty_like(x))
implement(_lib, "group_goodness", _goodness, _goodness_fake)
implement(_lib, "group_goodness_backward", _backward, lambda d, x, *options: empty_like(x))


def _save(ctx, inputs, output):
    x, *ctx.options = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx, d):
    (x,) = ctx.saved_tensors
    return torch.ops.fastff.group_goodness_backward(d, x, *ctx.options), *[None] * 5


def normalize_gradient(grad, x, name, groups, eps):
    """dL/dx of y = fastff.reference.normalized(x, ...) from grad = dL/dy. Differentiable."""
    if groups == 1 and name == "group_norm":
        name = "layer_norm"
    B, C, H, W = x.shape
    even = name == "layer_norm" or (name == "group_norm" and C % groups == 0)
    if even and not torch.is_grad_enabled():  # by PyTorch's own kernels
        count = groups if name == "group_norm" else 1
        x, grad = as_result_of(x, x), as_result_of(x, grad)
        _, mean, rstd = torch.native_group_norm(x, None, None, B, C, H * W, count, eps)
        mask = [True, False, False]
        return torch.ops.aten.native_group_norm_backward(grad, x, mean, rstd, None, B, C, H * W, count, mask)[0]
    count = groups if name == "group_norm" else 1
    if count > 1:
        sizes = reference.group_sizes(C, count)
        parts = zip(grad.split(sizes, 1), x.split(sizes, 1), strict=True)
        return torch.cat([normalize_gradient(g, part, "layer_norm", 1, eps) for g, part in parts], 1)
    dims, how = ((1,) if name.endswith("_channels") else (1, 2, 3)), name.removesuffix("_channels")
    if how == "l2":
        length = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
        length = length.masked_fill(length == 0, torch.inf)  # what is all zero gets no gradient
        factor = 1 / (length + eps)
        return torch.addcmul(grad * factor, x, (grad * x).sum(dims, keepdim=True) * (-factor * factor / length))
    n = C if dims == (1,) else C * H * W
    if how == "rms":
        factor = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
        return torch.addcmul(grad * factor, x, (grad * x).sum(dims, keepdim=True) * (factor**3 / -n))
    var, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    factor, x = (var + eps).rsqrt(), x - mean
    grad = (grad - grad.mean(dims, keepdim=True)) * factor
    return torch.addcmul(grad, x, (grad * x).sum(dims, keepdim=True) * (factor * factor / -n))


def _normalize_backward(grad, x, name, groups, eps, impl):
    return as_result_of(x, normalize_gradient(widened(grad), widened(x), name, groups, eps))


def _differentiate_normalize(ctx, grad):
    return _normalize_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None


def _save_backward(ctx, inputs, output):
    d, x, *ctx.options = inputs
    ctx.save_for_backward(d, x)


def _differentiate_backward(ctx, grad):
    """Differentiate power * d * x^(power - 1) / n, which is linear in d, and in x for power 2."""
    d, x = ctx.saved_tensors
    *groups, _ = ctx.options
    _, pullback = torch.func.vjp(lambda d, x: reference.group_goodness_gradient(d, x, *groups), d, x)
    return *pullback(grad), *[None] * 5


torch.library.register_autograd("fastff::normalize", _differentiate_normalize, setup_context=_save, lib=_lib)
torch.library.register_autograd("fastff::group_goodness", _differentiate, setup_context=_save, lib=_lib)
torch.library.register_autograd(
    "fastff::group_goodness_backward", _differentiate_backward, setup_context=_save_backward, lib=_lib
)


def _direct(op, run, differentiate):
    """Return a function that computes what `op` does without PyTorch's dispatcher, which costs 0.1 ms a call, where nothing looks on."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *options):
            ctx.save_for_backward(x)
            ctx.options = options
            return run(x, *options)

        backward = staticmethod(differentiate)

    def call(x, *options):
        if dispatched(x) or transformed():
            return op(x, *options)
        return Direct.apply(x, *options)

    return call


def _differentiate_directly(ctx, d):
    if torch.is_grad_enabled():  # the gradient is to be differentiated
        return _differentiate(ctx, d)
    return _backward(d, *ctx.saved_tensors, *ctx.options), *[None] * 5


goodness = _direct(torch.ops.fastff.group_goodness, _goodness, _differentiate_directly)


def _as_result_of(x, y):
    """Return y laid out as a result of x. One position has any layout, and as_strided a slow gradient."""
    return y if x.is_contiguous() and y.is_contiguous() else as_result_of(x, y)


_normalize_directly = _direct(torch.ops.fastff.normalize, _normalize, _differentiate_normalize)


def normalize(x, name, groups, eps, impl):
    """Normalize x [B, C, H, W]. PyTorch's own kernels are the fastest for means and variances of whole samples and of equal groups."""
    if impl == "auto" and x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() and concerns([ROWS[1]]):
        if name == "layer_norm":
            return _as_result_of(x, of_pytorch.layer_norm(x, eps))
        if name == "group_norm" and x.shape[1] % groups == 0:
            return _as_result_of(x, F.group_norm(x, groups, eps=eps))
    return _normalize_directly(x, name, groups, eps, impl)
