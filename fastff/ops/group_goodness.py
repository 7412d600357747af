"""torch.ops.fastff.group_goodness, .group_goodness_backward and .normalize: goodness without weights and normalizations, differentiable.

x [B, C, H, W] -> g [B, K] over K groups of neighbouring channels, or g [B, P] over the channels at each position (K = 1). Formulas:
fastff/reference.py. An implementation has goodness(x, groups), goodness_backward(d, x, groups), normalize(x, normalization) and step(step) for
fastff/ops/step.py.
"""

import torch

from fastff import reference
from fastff.kernels import native, triton
from fastff.kernels import reference as reference_kernels
from fastff.kernels.layout import as_result_of, empty_like, widened
from fastff.kernels.native import group_goodness as native_group_goodness
from fastff.kernels.torch import group_goodness as torch_group_goodness
from fastff.kernels.torch.normalization import layer_norm_channels
from fastff.ops.table import Implementation, Lazy, always, choose, implement
from fastff.spec import Groups, Normalization


def _native_can_run(x):
    if x.device.type != "cpu":
        return f"the compiled kernel runs on the CPU, x is on {x.device.type}"
    return native.reason() or None


ROWS = [
    Implementation("triton", triton.reason, Lazy("fastff.kernels.triton.group_goodness")),
    Implementation(
        "native", _native_can_run, native_group_goodness, "float64 behind batch norm by PyTorch's operators"
    ),
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


def _save_normalize(ctx, inputs, output):
    x, *ctx.options = inputs
    ctx.save_for_backward(x)


def _differentiate_normalize(ctx, grad):
    (x,) = ctx.saved_tensors
    *normalization, _ = ctx.options
    name, _, eps = normalization

    def normalized(x):
        if name == "layer_norm_channels":  # PyTorch's own backward pass is faster than that of the formula
            return layer_norm_channels(x, eps)
        return reference.normalized(widened(x), *normalization).to(x.dtype)

    _, pullback = torch.func.vjp(normalized, x)
    return pullback(grad)[0], None, None, None, None


def _save_backward(ctx, inputs, output):
    d, x, *ctx.options = inputs
    ctx.save_for_backward(d, x)


def _differentiate_backward(ctx, grad):
    """Differentiate power * d * x^(power - 1) / n, which is linear in d, and in x for power 2."""
    d, x = ctx.saved_tensors
    *groups, _ = ctx.options
    _, pullback = torch.func.vjp(lambda d, x: reference.group_goodness_gradient(d, x, *groups), d, x)
    return *pullback(grad), *[None] * 5


torch.library.register_autograd("fastff::normalize", _differentiate_normalize, setup_context=_save_normalize, lib=_lib)
torch.library.register_autograd("fastff::group_goodness", _differentiate, setup_context=_save, lib=_lib)
torch.library.register_autograd(
    "fastff::group_goodness_backward", _differentiate_backward, setup_context=_save_backward, lib=_lib
)
