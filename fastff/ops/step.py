"""torch.ops.fastff.step: a whole local training step (fastff/spec.py), with all its gradients, outside autograd.

    step(Tensor x, the fields of Epilogue, Projection, Groups, Loss and Normalization, bool need_grad_x, str algorithm, str impl)
      -> the tensors of StepResult; those that are absent have no elements

Public functions and heads call `run`, which takes a Step and calls an implementation directly where nothing looks on: dispatching an op
that is registered from Python costs about 0.1 ms. Formulas: fastff/reference.py.
"""

import torch

from fastff import arguments, flat, reference
from fastff.kernels.layout import as_result_of, empty_like
from fastff.ops import goodness, group_goodness
from fastff.ops.table import LIBRARY, check_impl, choose, dispatched, register, without_autocast
from fastff.spec import HEAD_GRADIENTS, HEAD_PARAMETERS, Projection, Step, StepResult


@torch.no_grad()
def run(step, impl="auto"):
    """Return the StepResult of a Step: the loss reduced, every gradient of its input's dtype, results as x laid out as x, None for absent ones."""
    check_impl(impl)
    if not dispatched(step.x, *(step.epilogue or ()), *step.goodness, *step.loss):
        return _run(step, impl)
    tensors = torch.ops.fastff.step(step.x, *flat.flatten(step), step.need_grad_x, step.algorithm, impl)
    return StepResult(*(t if t.numel() else None for t in tensors))


def _as_x(step):
    """Return which of the results that are as x are asked for, {name: bool}."""
    residual = step.epilogue is not None and step.epilogue.wants_residual
    return {"grad_x": step.need_grad_x, "normalized": step.normalization.name != "none", "grad_residual": residual}


def _parameters(step):
    """Return {name of a gradient: its parameter, or None}."""
    head, found = step.goodness, {}
    if isinstance(head, Projection):
        found = {gradient: getattr(head, name) for gradient, name in zip(HEAD_GRADIENTS, HEAD_PARAMETERS, strict=True)}
    if step.epilogue is not None:
        found |= {"grad_bn_weight": step.epilogue.weight, "grad_bn_bias": step.epilogue.bias}
    return found


def _run(step, impl):
    x, loss, projected = step.x, _packed(step.loss), isinstance(step.goodness, Projection)
    epilogue = step.epilogue and _packed(step.epilogue)
    head = _packed(step.goodness) if projected else step.goodness
    if loss.target is not None:
        arguments.check_labels(loss.target, head.classes if projected else head.count)
    step = Step(x, epilogue, head, loss, *step[4:])
    with without_autocast(x):
        if projected:
            row = choose("goodness_step", goodness.STEP_ROWS, impl, x, step).run
            result = row.step(step, goodness.planned(row, x, head, step.algorithm))
        else:
            result = choose("group_goodness", group_goodness.ROWS, impl, x).run.step(step)
    reduced = result.loss if result.loss.dim() == 0 else reference.reduced(result.loss, loss.reduction)
    found = {"loss": reduced, "goodness": result.goodness.contiguous()}
    for name, asked in _as_x(step).items():
        found[name] = as_result_of(x, getattr(result, name)) if asked else None
    for name, parameter in _parameters(step).items():
        grad = None if parameter is None else getattr(result, name)
        exact = grad is None or (grad.dtype == parameter.dtype and grad.is_contiguous())
        found[name] = grad if exact else grad.to(parameter.dtype).contiguous()
    return result._replace(**found)


def _packed(part):
    """Return a description whose parameters and labels are contiguous: kernels read them one number after another."""
    strided = {
        name: t.contiguous()
        for name, t in zip(part._fields, part, strict=True)
        if isinstance(t, torch.Tensor) and not t.is_contiguous() and name != "residual"
    }
    return part._replace(**strided) if strided else part


def _fake(step):
    """Return a StepResult of uninitialised tensors with the shapes, dtypes and strides of the results."""
    x, C = step.x, step.x.shape[1]
    projected = isinstance(step.goodness, Projection)
    columns = step.goodness.classes if projected else step.goodness.columns(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    dtype = step.goodness.dtype(x) if projected else wide
    losses = (step.loss.count(len(x)),) if step.loss.reduction == "none" else ()
    as_x = {name: empty_like(x) if asked else None for name, asked in _as_x(step).items()}
    M = len(step.goodness.hidden_weight) if projected and step.goodness.hidden is not None else None
    gradients = {
        name: None if p is None else torch.empty_like(p, memory_format=torch.contiguous_format)
        for name, p in _parameters(step).items()
    }
    return StepResult(
        x.new_empty(losses, dtype=dtype),
        x.new_empty((x.shape[0], columns), dtype=dtype),
        grad_tau=None if step.loss.learned_tau is None else x.new_empty((), dtype=dtype),
        mean=None if step.epilogue is None else x.new_empty(C, dtype=wide),
        var=None if step.epilogue is None else x.new_empty(C, dtype=wide),
        hidden_mean=None if M is None else x.new_empty(M, dtype=dtype),
        hidden_var=None if M is None else x.new_empty(M, dtype=dtype),
        **as_x,
        **gradients,
    )


def _op(compute):
    @torch.no_grad()
    def op(x, *values):
        *parts, need_grad_x, algorithm, impl = values
        result = compute(flat.unflatten(x, parts, need_grad_x, algorithm), impl)
        return tuple(x.new_empty(0) if t is None else t for t in result)

    return op


_results = ", ".join(f"Tensor {name}" for name in StepResult._fields)
_schema = f"step(Tensor x, {flat.schema()}, bool need_grad_x, str algorithm, str impl) -> ({_results})"
register(_schema, _op(_run), _op(lambda step, impl: _fake(step)))
# Its results are gradients already: nothing is recorded for autograd, whatever the inputs require.
LIBRARY.impl("step", torch.library.fallthrough_kernel, "Autograd")
