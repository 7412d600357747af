"""torch.ops.fastff.goodness and .goodness_backward: the goodness of a block's output under a head with weights, differentiable twice.

Canonical arguments (fastff/spec.py makes and checks them): x [B, C, H, W], weight [K, C, k, k] or None (no squares), bias [K] or
None, grid_weight [K, C, G, G] or None. Absent results are empty tensors. Formulas: fastff/reference.py.

An implementation has

    goodness(x, projection, plan)              -> g in the dtype of the arithmetic
    goodness_backward(d, x, projection, plan, need_grad_x)
                                               -> gradients of sum(d * g) for x, weight, bias and grid_weight: None for absent ones, and for x
                                                  unless it is needed
    step(step, plan)                           -> StepResult, its losses not reduced (fastff/ops/step.py)
    SECOND_MOMENT_COST                         a number that goes into the plan, or nothing
"""

import torch

from fastff import reference
from fastff.kernels import cuda, native, triton
from fastff.kernels import reference as reference_kernels
from fastff.kernels.cuda import goodness as cuda_goodness
from fastff.kernels.layout import as_result_of, empty_like
from fastff.kernels.native import goodness as native_goodness
from fastff.kernels.torch import goodness as torch_goodness
from fastff.kernels.triton import blocks
from fastff.ops.plan import Gpu, plan
from fastff.ops.table import Implementation, Lazy, always, check_impl, choose, register, without_autocast
from fastff.spec import Projection

TRITON = Lazy("fastff.kernels.triton.goodness")


def gpu_of(x, run):
    """Return what the plan has to know of a GPU and the kernels `run`, or None for x on a CPU, unless it stands in for one."""
    if run is TRITON:
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        return Gpu(x.element_size(), blocks.architecture(x.device), tf32)
    return Gpu(x.element_size(), None) if x.is_cuda else None


ROWS = [
    Implementation("triton", triton.reason, TRITON, "3 x 3 and 5 x 5 heads by cuDNN, large float32 products by cuBLAS"),
    Implementation(
        "native",
        native.takes(torch.float32, torch.bfloat16, torch.float16),
        native_goodness,
        "3 x 3 and 5 x 5 heads by oneDNN, large direct products by BLAS",
        native.slow,
    ),
    Implementation("torch", always, torch_goodness),
    Implementation("reference", always, reference_kernels),
]
# Of whole steps: an explicit choice, until it was measured on a GPU.
STEP_ROWS = [
    Implementation(
        "cuda",
        cuda.reason,
        cuda_goodness,
        "16-bit channels_last x, kernel size 1, no grid, no epilogue, cross_entropy",
        lambda x: "it was never measured on a GPU",
        cuda_goodness.takes,
    ),
    *ROWS,
]


def plan_for(x, weight, grid_weight, padding, algorithm="auto", impl="auto"):
    """Return the Plan for these arguments."""
    projection = Projection(weight, None, grid_weight, tuple(padding))
    return planned(choose("goodness", ROWS, impl, x).run, x, projection, algorithm)


def planned(run, x, projection, algorithm):
    """Return the Plan of the implementation `run`."""
    (B, C, H, W), weight, padding = x.shape, projection.weight, projection.padding
    if weight is None:
        return plan(B, C, H * W, 0, algorithm="direct", device_type=x.device.type)
    kernel = tuple(weight.shape[2:])
    P = (H + 2 * padding[0] - kernel[0] + 1) * (W + 2 * padding[1] - kernel[1] + 1)
    cost = getattr(run, "SECOND_MOMENT_COST", 1.0)
    return plan(B, C, P, weight.shape[0], kernel, algorithm, x.device.type, cost, gpu_of(x, run))


def differentiable(x, projection, impl, algorithm):
    """Return g [B, K] of a Projection, and mean and var [M] of its hidden layer's batch norm, or None. A hidden layer is on PyTorch's operators."""
    check_impl(impl)
    weight, bias, grid_weight, padding, *_ = projection
    if projection.hidden is None:
        return torch.ops.fastff.goodness(x, weight, bias, grid_weight, padding, impl, algorithm), None, None
    if impl != "auto":
        choose("goodness", ROWS, impl, x)  # raises where what was asked for cannot run
    with without_autocast(x):
        wide, head = projection.in_dtype(x)
        term, mean, var = reference.spatial(reference.cell_means(wide, head.grid_weight), head.grid_weight, head.hidden)
        if weight is not None:
            # the gradients of both terms are added before they are rounded to x's dtype
            x = wide if x.requires_grad else x
            term = term + torch.ops.fastff.goodness(x, weight, bias, None, padding, impl, algorithm)
    return term, mean, var


def _goodness(x, weight, bias, grid_weight, padding, impl, algorithm):
    run, projection = choose("goodness", ROWS, impl, x).run, Projection(weight, bias, grid_weight, tuple(padding))
    with without_autocast(x):
        g = run.goodness(x, projection, planned(run, x, projection, algorithm))
    return g.to(projection.dtype(x)).contiguous()


def _goodness_fake(x, weight, bias, grid_weight, padding, impl, algorithm):
    projection = Projection(weight, bias, grid_weight)
    return x.new_empty((x.shape[0], projection.classes), dtype=projection.dtype(x))


def _goodness_backward(d, x, weight, bias, grid_weight, padding, impl, algorithm, need_grad_x):
    run, projection = choose("goodness", ROWS, impl, x).run, Projection(weight, bias, grid_weight, tuple(padding))
    plan = planned(run, x, projection, algorithm)
    with without_autocast(x):
        grad_x, *grads = run.goodness_backward(d.contiguous(), x, projection, plan, need_grad_x)
    return as_result_of(x, grad_x) if need_grad_x else x.new_empty(0), *(
        x.new_empty(0) if p is None else grad.to(p.dtype).contiguous()
        for grad, p in zip(grads, (weight, bias, grid_weight), strict=True)
    )


def _goodness_backward_fake(d, x, weight, bias, grid_weight, padding, impl, algorithm, need_grad_x):
    return empty_like(x) if need_grad_x else x.new_empty(0), *(
        x.new_empty(0) if p is None else torch.empty_like(p, memory_format=torch.contiguous_format)
        for p in (weight, bias, grid_weight)
    )


def _save(ctx, inputs, output):
    *tensors, ctx.padding, ctx.impl, ctx.algorithm = inputs[:7]
    ctx.save_for_backward(*tensors)


def _backward(ctx, d):
    x, weight, bias, grid_weight = ctx.saved_tensors
    grads = torch.ops.fastff.goodness_backward(
        d, x, weight, bias, grid_weight, ctx.padding, ctx.impl, ctx.algorithm, ctx.needs_input_grad[0]
    )
    needed = zip(grads, ctx.needs_input_grad, strict=False)
    return *(grad if need else None for grad, need in needed), None, None, None


def _save_backward(ctx, inputs, output):
    d, x, weight, bias, grid_weight, padding, *_ = inputs
    ctx.padding = tuple(padding)
    ctx.save_for_backward(d, x, weight, bias, grid_weight)


def _double_backward(ctx, *cotangents):
    """Differentiate the gradients of the definition in reference.py."""
    d, *given = ctx.saved_tensors
    names = [name for name, t in zip(("x", "weight", "bias", "grid_weight"), given, strict=True) if t is not None]

    def gradients(d, *tensors):
        _, pullback = torch.func.vjp(
            lambda *tensors: reference.goodness(**dict(zip(names, tensors, strict=True)), padding=ctx.padding), *tensors
        )
        return pullback(d)

    out, pullback = torch.func.vjp(gradients, d, *(t for t in given if t is not None))
    seeds = (c for c, t in zip(cotangents, given, strict=True) if t is not None)
    seeds = tuple(
        torch.zeros_like(o) if c is None or c.shape != o.shape else c for o, c in zip(out, seeds, strict=True)
    )
    d, *found = pullback(seeds)
    found = iter(found)
    return d, *(None if t is None else next(found) for t in given), None, None, None, None


_CALL = "Tensor x, Tensor? weight, Tensor? bias, Tensor? grid_weight, SymInt[2] padding, str impl, str algorithm"
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor)"
register(f"goodness({_CALL}) -> Tensor", _goodness, _goodness_fake, _backward, _save)
register(
    f"goodness_backward(Tensor d, {_CALL}, bool need_grad_x) -> {_GRADIENTS}",
    _goodness_backward,
    _goodness_backward_fake,
    _double_backward,
    _save_backward,
)
