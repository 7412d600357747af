"""torch.ops.fastff.group_goodness, .group_goodness_backward and .normalize: goodness without weights and normalizations, differentiable.

x [B, C, H, W] -> g [B, K] over K groups of neighbouring channels, or g [B, P] over the channels at each position (K = 1). Formulas:
fastff/reference.py. An implementation has goodness(x, groups), goodness_backward(d, x, groups) -> dL/dx, normalize(x, normalization), which is None
for "none", and step(step) -> StepResult, its losses not reduced, for fastff/ops/step.py.
"""

import math

import torch

from fastff import reference
from fastff.kernels import native, triton
from fastff.kernels import reference as reference_kernels
from fastff.kernels.layout import as_result_of, empty_like, is_channels_last, samples, widened
from fastff.kernels.native import group_goodness as native_group_goodness
from fastff.kernels.torch import group_goodness as torch_group_goodness
from fastff.kernels.torch import normalization as of_pytorch
from fastff.ops.table import Implementation, Lazy, always, choose, concerns, dispatched, register, transformed, unseen
from fastff.spec import Groups, Normalization

NATIVE = Implementation(
    "native", native.takes(), native_group_goodness, "float64 behind batch norm by PyTorch's operators"
)
ROWS = [
    Implementation("triton", triton.reason, Lazy("fastff.kernels.triton.group_goodness")),
    NATIVE,
    Implementation("torch", always, torch_group_goodness),
    Implementation("reference", always, reference_kernels),
]


IN_PASSES = (
    "l2",
    "rms",
    "l2_channels",
    "rms_channels",
)  # PyTorch's length and product take no longer than the kernel does
FEW_ELEMENTS = 1 << 16  # up to which PyTorch's layer norm over channels that lie apart is faster with its backward pass


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
    on_cpu = impl == "auto" and x.device.type == "cpu" and concerns([NATIVE])
    if on_cpu and name == "layer_norm" and x.element_size() == 2:  # PyTorch's is faster
        return as_result_of(x, of_pytorch.layer_norm(x, eps))
    if on_cpu and name in IN_PASSES and x.dtype == torch.float32 and eps > 0:
        return as_result_of(x, x / _divisor(x, name, eps)[0])
    normalization = Normalization(name, groups, eps)
    return as_result_of(x, choose("group_goodness", ROWS, impl, x).run.normalize(x, normalization))


def _divisor(x, name, eps):
    """Return by what x [B, C] or [B, C, H, W] is divided for length or mean square 1, for the elements that share it, and for l2 its length."""
    dims = (1,) if x.dim() == 2 or name.endswith("_channels") else (1, 2, 3)
    apart = dims == (1,) and x.dim() == 4 and not is_channels_last(x)  # where vector_norm takes ten times as long
    if name.startswith("rms") and apart:
        return x.square().mean(1, keepdim=True).add_(eps).sqrt_(), None
    length = x.square().sum(1, keepdim=True).sqrt_() if apart else torch.linalg.vector_norm(x, 2, dims, True)
    if name.startswith("l2"):
        return length + eps, length
    return length.square_().mul_(length.numel() / x.numel()).add_(eps).sqrt_(), None


class _InPasses(torch.autograd.Function):
    """x [B, C] or [B, C, H, W] normalized to length or mean square 1."""

    @staticmethod
    def forward(ctx, x, name, eps):
        divisor, length = _divisor(x, name, eps)
        ctx.save_for_backward(x, divisor, length)
        ctx.options = name, 1, eps
        return x / divisor

    @staticmethod
    def backward(ctx, grad):
        x, divisor, length = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated
            x4, grad4 = (t.view(*t.shape, *[1] * (4 - t.dim())) for t in (x, grad))
            return normalize_gradient(grad4, x4, *ctx.options).view(x.shape), None, None
        factor, dims = divisor.reciprocal(), [d for d in range(1, x.dim()) if divisor.shape[d] == 1]
        if ctx.options[0].startswith("l2"):
            factor.masked_fill_(length == 0, 0)  # what is all zero gets no gradient
            share = factor.square().div_(length.clamp_min(torch.finfo(x.dtype).tiny))
        else:
            share = factor.pow(3).mul_(divisor.numel() / x.numel())
        return torch.addcmul(grad * factor, x, share.mul_((grad * x).sum(dims, keepdim=True)), value=-1), None, None


def _save(ctx, inputs, output):
    x, *ctx.options = inputs
    ctx.save_for_backward(x)


def _differentiate(ctx, d):
    (x,) = ctx.saved_tensors
    return torch.ops.fastff.group_goodness_backward(d, x, *ctx.options), *[None] * 5


def layer_norm_gradient(grad, x, eps):
    """dL/dx by PyTorch's kernel, on samples as rows of a matrix: 7 times faster than the formula in elementwise operators. Differentiable."""
    flat, back = samples(x, is_channels_last(x))
    flat_grad, _ = samples(grad, is_channels_last(x))
    shape = flat.shape[1:]
    _, mean, rstd = torch.native_layer_norm(flat, shape, None, None, eps)
    mask = [True, False, False]
    return back(torch.ops.aten.native_layer_norm_backward(flat_grad, flat, shape, mean, rstd, None, None, mask)[0])


def normalize_gradient(grad, x, name, groups, eps):
    """dL/dx of y = fastff.reference.normalized(x, ...) from grad = dL/dy. Differentiable."""
    B, C, H, W = x.shape
    if name == "group_norm" and C % groups == 0 and not torch.is_grad_enabled():  # by PyTorch's own kernels
        x, grad = as_result_of(x, x), as_result_of(x, grad)
        _, mean, rstd = torch.native_group_norm(x, None, None, B, C, H * W, groups, eps)
        mask = [True, False, False]
        return torch.ops.aten.native_group_norm_backward(grad, x, mean, rstd, None, B, C, H * W, groups, mask)[0]
    if name == "group_norm":
        sizes = reference.group_sizes(C, groups)
        parts = zip(grad.split(sizes, 1), x.split(sizes, 1), strict=True)
        return torch.cat([layer_norm_gradient(g, part, eps) for g, part in parts], 1)
    if name == "layer_norm":
        return layer_norm_gradient(grad, x, eps)
    dims, how = ((1,) if name.endswith("_channels") else (1, 2, 3)), name.removesuffix("_channels")
    n = C if dims == (1,) else C * H * W
    if how == "l2":
        length = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
        length = length.masked_fill(length == 0, torch.inf)  # what is all zero gets no gradient
        factor = 1 / (length + eps)
        share = factor * factor / length
    elif how == "rms":
        factor = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
        share = factor**3 / n
    else:
        # var_mean takes ten times as long over channels that lie apart
        x, grad = (t - t.mean(dims, keepdim=True) for t in (x, grad))
        factor = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
        share = factor**3 / n
    return torch.addcmul(grad * factor, x, (grad * x).sum(dims, keepdim=True) * -share)


def _normalize_backward(grad, x, name, groups, eps, impl):
    if x.numel() == 0:
        return empty_like(x)
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


_CALL = "Tensor x, int groups, int power, bool mean, bool positions, str impl"
register(f"group_goodness({_CALL}) -> Tensor", _goodness, _goodness_fake, _differentiate, _save)
register(
    f"group_goodness_backward(Tensor d, {_CALL}) -> Tensor",
    _backward,
    lambda d, x, *options: empty_like(x),
    _differentiate_backward,
    _save_backward,
)
register(
    "normalize(Tensor x, str name, int groups, float eps, str impl) -> Tensor",
    _normalize,
    lambda x, *options: empty_like(x),
    _differentiate_normalize,
    _save,
)


def _direct(op, run, differentiate):
    """Return a function that computes what `op` does without PyTorch's dispatcher, which costs 0.1 ms a call, where nothing looks on."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *options):
            ctx.save_for_backward(x)
            ctx.options = options
            return run(x, *options)

        backward = staticmethod(unseen(differentiate))

    def call(x, *options):
        if dispatched(x) or transformed():
            return op(x, *options)
        return (Direct.apply if x.requires_grad and torch.is_grad_enabled() else run)(x, *options)

    return call


def _differentiate_directly(ctx, d):
    if torch.is_grad_enabled():  # the gradient is to be differentiated
        return _differentiate(ctx, d)
    return _backward(d, *ctx.saved_tensors, *ctx.options), *[None] * 5


goodness = _direct(torch.ops.fastff.group_goodness, _goodness, _differentiate_directly)


_normalize_directly = _direct(torch.ops.fastff.normalize, _normalize, _differentiate_normalize)


def quick(x, name, groups, eps, impl):
    """Return x [B, C] or [B, C, H, W] normalized where nothing stands between the arguments and the fastest operators, else None, as for wrong ones.

    PyTorch's are the fastest for equal groups, and for layer norm with a backward pass, for which they keep mean and variance. Nothing is checked
    before: that takes a third of the time of a small x."""
    if (
        impl != "auto"
        or not x.is_cpu
        or x.dtype is not torch.float32
        or type(eps) is not float
        or type(groups) is not int
    ):
        return None
    if (
        x.dim() not in (2, 4)
        or not 0 < groups <= x.shape[1]
        or not 0 < eps < math.inf
        or not x.numel()
        or not concerns([NATIVE])
    ):
        return None
    learns, y = x.requires_grad and torch.is_grad_enabled(), None
    if name == "group_norm" and x.shape[1] % groups == 0:
        y = torch.group_norm(x, groups, None, None, eps)
    elif name == "layer_norm" and learns:
        whole = x.is_contiguous()
        y = torch.layer_norm(x, x.shape[1:], None, None, eps) if whole else of_pytorch.layer_norm(x, eps)
    elif (
        name == "layer_norm_channels" and learns and x.dim() == 4 and (is_channels_last(x) or x.numel() < FEW_ELEMENTS)
    ):
        y = of_pytorch.layer_norm_channels(x, eps)
    elif dispatched(x) or transformed():
        return None
    elif name in IN_PASSES:
        y = _InPasses.apply(x, name, eps) if learns else x / _divisor(x, name, eps)[0]
    elif name in ("layer_norm", "layer_norm_channels") and not learns and NATIVE.can_run(x) is None:
        x4 = x if x.dim() == 4 else x[:, :, None, None]
        y = native_group_goodness.normalize(x4, Normalization(name, groups, eps)).view(x.shape)
    if (
        y is None or x.dim() == 2 or (x.is_contiguous() and y.is_contiguous())
    ):  # one position has any layout, and as_strided a slow gradient
        return y
    if x.is_contiguous():
        return y.contiguous()
    B, C, H, W = x.shape
    return y if y.stride() == x.stride() == (H * W * C, 1, W * C, C) else as_result_of(x, y)


def normalize(x, name, groups, eps, impl):
    """Normalize x [B, C, H, W], or [B, C]."""
    y = quick(x, name, groups, eps, impl)
    if y is not None:
        return y
    if x.dim() == 2:
        return _normalize_directly(x[:, :, None, None], name, groups, eps, impl)[:, :, 0, 0]
    return _normalize_directly(x, name, groups, eps, impl)
