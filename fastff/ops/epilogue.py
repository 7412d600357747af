"""torch.ops.fastff.epilogue: batch norm, residual and activation, forward and backward, at a block's end or between its convolutions.

    epilogue(y, ...)          y [B, C, H, W] -> x = activation(batch_norm(y) + residual), mean [C], var [C]: the batch's statistics
    epilogue_backward(...)    from dL/dx -> dL/dy, dL/dresidual, dL/dweight, dL/dbias

A block's training step calls an implementation's `forward` and `backward` directly: these also compute the next block's input and its
backward pass, and add the gradients of another loss, in the same pass. Only y and the residual are kept for the backward pass; x is
computed again where it is needed. Formulas: fastff/reference.py.
"""

import torch

from fastff import flat, spec
from fastff.kernels import native, triton
from fastff.kernels.layout import empty_like
from fastff.kernels.native import epilogue as native_epilogue
from fastff.kernels.torch import epilogue as torch_epilogue
from fastff.ops.table import Implementation, Lazy, always, choose, kernel_for, register

ROWS = [
    Implementation(
        "triton", triton.reason, Lazy("fastff.kernels.triton.epilogue"), "normalization and added gradients by PyTorch",
        skip_reason=lambda y: "never timed on a GPU, so not seen to win",
    ),
    Implementation("native", native.takes(torch.float32, empty=False), native_epilogue, "other normalizations than layer norm by PyTorch"),
    Implementation("torch", always, torch_epilogue),
    Implementation("reference", always, torch_epilogue, "the same as torch"),
]  # fmt: skip


# At the end of a block without a loss PyTorch takes some 15 operators each way with the normalization, and Triton 4 to 6: there "auto" skips none.
AT_THE_END = [row._replace(skip_reason=always) for row in ROWS]


def implementation(y):
    """Return the implementation that "auto" chooses for y at the end of a block."""
    return choose("epilogue", AT_THE_END, "auto", y).run


def kernel(y):
    """Return the implementation that "auto" chooses for y if it is a kernel of fastff, else None: PyTorch's operators are as fast then."""
    row = kernel_for("epilogue", ROWS, y)
    return None if row is None else row.run


def update_running_statistics(running_mean, running_var, tracked, mean, var, momentum, count):
    """Move running statistics [C] by `momentum` towards the batch's mean and variance, of which `var` is the biased one of `count` values, and
    count the batch in `tracked`, a tensor of one int64, or None.

    As in PyTorch's batch norm, autograd does not see it: a former call of the same module in this graph keeps its buffers for its backward pass."""
    tensors = (running_mean, running_var, mean, var)
    plain = all(t.dtype is torch.float32 and t.is_contiguous() for t in tensors) and not torch.compiler.is_compiling()
    if plain and (triton.INTERPRETED or not mean.is_cpu) and triton.reason(mean) is None:
        run = Lazy("fastff.kernels.triton.epilogue").update_running_statistics
    elif plain and mean.is_cpu and (tracked is None or tracked.dtype is torch.int64) and native.reason() == "":
        run = native_epilogue.update_running_statistics
    else:
        run = torch_epilogue.update_running_statistics
    run(running_mean, running_var, tracked, mean, var, momentum, count)


def _forward(y, *arguments):
    *epilogue, impl = arguments
    x, _, mean, var = choose("epilogue", ROWS, impl, y).run.forward(y, spec.Epilogue(*epilogue))
    return x, mean, var


def _forward_fake(y, *arguments):
    dtype = torch.promote_types(y.dtype, torch.float32)
    return empty_like(y), *(y.new_empty(y.shape[1], dtype=dtype) for _ in range(2))


def _backward(grad_x, y, *arguments):
    *epilogue, mean, var, impl = arguments
    found = choose("epilogue", ROWS, impl, y).run.backward(y, spec.Epilogue(*epilogue), mean, var, grad_x)
    return found._replace(residual=y.new_empty(0)) if found.residual is None else found


def _backward_fake(grad_x, y, *arguments):
    *epilogue, mean, var, _ = arguments
    residual = empty_like(y) if spec.Epilogue(*epilogue).wants_residual else y.new_empty(0)
    return empty_like(y), residual, torch.empty_like(mean), torch.empty_like(var)


def _save(ctx, inputs, output):
    y, *epilogue, ctx.impl = inputs
    e = spec.Epilogue(*epilogue)
    ctx.options = e._replace(weight=None, bias=None, residual=None)
    ctx.save_for_backward(y, e.weight, e.bias, e.residual, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad_x, *_):
    y, weight, bias, residual, mean, var = ctx.saved_tensors
    e = ctx.options._replace(weight=weight, bias=bias, residual=residual)
    found = spec.EpilogueGradients(*torch.ops.fastff.epilogue_backward(grad_x, y, *e, mean, var, ctx.impl))
    affine = found.of_parameters(e)
    return found.y, *affine, None, found.residual if e.wants_residual else None, None, None, None


_CALL = f"Tensor y, {flat.schema(('epilogue',)).split(', ', 1)[1]}"
_GRADIENTS = "(Tensor grad_y, Tensor grad_residual, Tensor grad_weight, Tensor grad_bias)"
register(
    f"epilogue({_CALL}, str impl) -> (Tensor x, Tensor mean, Tensor var)",
    _forward,
    _forward_fake,
    _differentiate,
    _save,
)
register(
    f"epilogue_backward(Tensor grad_x, {_CALL}, Tensor mean, Tensor var, str impl) -> {_GRADIENTS}",
    _backward,
    _backward_fake,
)
