"""torch.ops.fastff.epilogue: batch norm, residual and activation, forward and backward, at a block's end or between its convolutions.

    epilogue(y, ...)          y [B, C, H, W] -> x = activation(batch_norm(y) + residual), mean [C], var [C]: the batch's statistics
    epilogue_backward(...)    from dL/dx -> dL/dy, dL/dresidual, dL/dweight, dL/dbias

`forward` and `backward` are what a block's training step calls: they also compute the next block's input and its backward pass, and add the
gradients of another loss, in the same pass. Only y and the residual are kept for the backward pass; x is computed again where it is needed.
Rows: the compiled kernel, PyTorch's operators. Formulas: fastff/reference.py.
"""

from typing import NamedTuple

import torch

from fastff import reference, spec
from fastff.kernels import native
from fastff.kernels.layout import empty_like, widened
from fastff.ops.table import Implementation, always, choose, concerns, implement


class Gradients(NamedTuple):
    """dL/dy, dL/dresidual (None unless asked for), dL/dweight and dL/dbias [C] of batch norm (whether or not it has them)."""

    y: torch.Tensor
    residual: torch.Tensor | None
    weight: torch.Tensor
    bias: torch.Tensor


class Added(NamedTuple):
    """Gradients of another loss at the same place, which `backward` adds: dL/dh (as y; that of the residual), dL/dweight, dL/dbias [C]."""

    h: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


class Torch:
    """PyTorch's operators, with the formulas of fastff/reference.py in float32 (float64 for float64)."""

    @staticmethod
    def forward(y, epilogue, normalization=None, need_x=True, statistics=None):
        x, _, mean, var = reference.epilogue(*_inputs(y, epilogue), statistics=statistics)
        x = empty_like(y).copy_(x)
        normalized = None if normalization is None else empty_like(y).copy_(_normalize(x, normalization))
        return x if need_x else None, normalized, mean, var

    @staticmethod
    def backward(
        y, epilogue, mean, var, grad_x=None, grad_normalized=None, normalization=None, added=None, overwrite=False
    ):
        inputs = _inputs(y, epilogue)
        x, h, *_ = reference.epilogue(*inputs, statistics=(mean, var))
        total = 0 if grad_x is None else widened(grad_x)
        if grad_normalized is not None:
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                out = _normalize(leaf, normalization)
            total = total + torch.autograd.grad(out, leaf, widened(grad_normalized))[0]
        others = None if added is None else tuple(map(widened, added))
        grad_y, grad_h, grad_weight, grad_bias = reference.epilogue_gradients(
            total, inputs[0], h, mean, var, inputs[1], epilogue.eps, epilogue.activation, others
        )
        grad_residual = empty_like(y).copy_(grad_h) if _needs_residual(epilogue) else None
        return Gradients(empty_like(y).copy_(grad_y), grad_residual, grad_weight, grad_bias)


def _inputs(y, e):
    return (widened(y), widened(e.weight), widened(e.bias), e.eps, widened(e.residual), e.activation)


def _normalize(x, normalization):
    return reference.normalized(x, normalization.name, normalization.groups, normalization.eps)


def _needs_residual(epilogue):
    return epilogue.residual is not None and epilogue.need_grad_residual


class Native:
    """The compiled library (csrc/cpu/epilogue_ops.cpp), for layer norm over a sample or no normalization."""

    @staticmethod
    def forward(y, epilogue, normalization=None, need_x=True, statistics=None):
        if normalization is not None and normalization.name != "layer_norm":
            return Torch.forward(y, epilogue, normalization, need_x, statistics)
        eps = 0.0 if normalization is None else normalization.eps
        x, normalized, *found = torch.ops.fastff.epilogue_forward_native(
            y, *_native_epilogue(epilogue), *(statistics or (None, None)), need_x, normalization is not None, eps
        )
        return x if need_x else None, None if normalization is None else normalized, *(statistics or found)

    @staticmethod
    def backward(
        y, epilogue, mean, var, grad_x=None, grad_normalized=None, normalization=None, added=None, overwrite=False
    ):
        if grad_normalized is not None and normalization.name != "layer_norm":
            return Torch.backward(y, epilogue, mean, var, grad_x, grad_normalized, normalization, added)
        eps = 0.0 if normalization is None else normalization.eps
        others = (None, None, None) if added is None else tuple(t.float() for t in added)
        grad_y, grad_h, grad_weight, grad_bias = torch.ops.fastff.epilogue_backward_native(
            y, *_native_epilogue(epilogue), mean, var, grad_x, grad_normalized, eps, *others, overwrite
        )
        return Gradients(grad_y, grad_h if _needs_residual(epilogue) else None, grad_weight, grad_bias)


def _native_epilogue(e):
    """The fields of an Epilogue as the compiled library takes them."""
    weight, bias, residual = (None if t is None else t.float() for t in (e.weight, e.bias, e.residual))
    return weight, bias, e.eps, residual, e.need_grad_residual, spec.ACTIVATIONS.index(e.activation)


def _native_can_run(y):
    if y.device.type != "cpu":
        return f"the compiled kernel runs on the CPU, y is on {y.device.type}"
    if y.dtype != torch.float32:
        return f"the compiled kernel is for float32, y is {y.dtype}"
    if y.numel() == 0:
        return "y is empty"
    return native.reason() or None


ROWS = [
    Implementation("native", _native_can_run, Native, "normalizations other than layer norm over a sample by PyTorch"),
    Implementation("torch", always, Torch),
    Implementation("reference", always, Torch, "the same as torch"),
]


def kernel(y):
    """The kernel of fastff that runs for this y, or None where PyTorch's operators do."""
    row = choose("epilogue", ROWS, "auto", y) if concerns(ROWS) else None
    return row.run if row is not None and row.name == "native" else None


@torch.no_grad()
def update_running_statistics(running_mean, running_var, mean, var, momentum, count):
    """Move running statistics [C] by `momentum` towards the batch's mean and variance, of which `var` is the biased one of `count` values."""
    tensors = (running_mean, running_var, mean, var)
    if not native.reason() and all(
        t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors
    ):
        torch.ops.fastff.update_running_statistics_native(*tensors, momentum, count)
    else:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)


@torch.no_grad()
def forward(y, epilogue, normalization=None, need_x=True, statistics=None):
    """(x or None, normalized or None, mean, var) of y [B, C, H, W]; `statistics` (mean, var) where they are known already."""
    return choose("epilogue", ROWS, "auto", y).run.forward(y, epilogue, normalization, need_x, statistics)


@torch.no_grad()
def backward(
    y, epilogue, mean, var, grad_x=None, grad_normalized=None, normalization=None, added=None, overwrite=False
):
    """The Gradients of `forward` from dL/dx or dL/dnormalized (or both), with those of another loss (`Added`) on top.

    overwrite: whether the results may take the memory of grad_x and of `added`."""
    run = choose("epilogue", ROWS, "auto", y).run
    return run.backward(y, epilogue, mean, var, grad_x, grad_normalized, normalization, added, overwrite)


_lib = torch.library.Library("fastff", "FRAGMENT")
_EPILOGUE = spec.schema(("epilogue",)).split(", ", 1)[1]
_lib.define(f"epilogue(Tensor y, {_EPILOGUE}, str impl) -> (Tensor x, Tensor mean, Tensor var)")
_lib.define(
    f"epilogue_backward(Tensor grad_x, Tensor y, {_EPILOGUE}, Tensor mean, Tensor var, str impl) "
    "-> (Tensor grad_y, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)"
)


def _forward(y, *arguments):
    *epilogue, impl = arguments
    x, _, mean, var = choose("epilogue", ROWS, impl, y).run.forward(y, spec.Epilogue(*epilogue))
    return x, mean, var


def _forward_fake(y, *arguments):
    statistic = torch.promote_types(y.dtype, torch.float32)
    return empty_like(y), *(y.new_empty(y.shape[1], dtype=statistic) for _ in range(2))


def _backward(grad_x, y, *arguments):
    *epilogue, mean, var, impl = arguments
    found = choose("epilogue", ROWS, impl, y).run.backward(y, spec.Epilogue(*epilogue), mean, var, grad_x)
    return found._replace(residual=y.new_empty(0)) if found.residual is None else found


def _backward_fake(grad_x, y, *arguments):
    *epilogue, mean, var, _ = arguments
    residual = empty_like(y) if _needs_residual(spec.Epilogue(*epilogue)) else y.new_empty(0)
    return empty_like(y), residual, torch.empty_like(mean), torch.empty_like(var)


implement(_lib, "epilogue", _forward, _forward_fake)
implement(_lib, "epilogue_backward", _backward, _backward_fake)


def _save(ctx, inputs, output):
    y, *epilogue, ctx.impl = inputs
    e = spec.Epilogue(*epilogue)
    ctx.options = e._replace(weight=None, bias=None, residual=None)
    ctx.save_for_backward(y, e.weight, e.bias, e.residual, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad_x, *_):
    y, weight, bias, residual, mean, var = ctx.saved_tensors
    e = ctx.options._replace(weight=weight, bias=bias, residual=residual)
    grad_y, grad_residual, grad_weight, grad_bias = torch.ops.fastff.epilogue_backward(
        grad_x, y, *e, mean, var, ctx.impl
    )
    return (
        grad_y, None if weight is None else grad_weight.to(weight.dtype), None if bias is None else grad_bias.to(bias.dtype), None,
        grad_residual if _needs_residual(e) else None, None, None, None,
    )  # fmt: skip


torch.library.register_autograd("fastff::epilogue", _differentiate, setup_context=_save, lib=_lib)
