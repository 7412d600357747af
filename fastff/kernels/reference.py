"""The definitions of fastff/reference.py as an implementation of every op: whole tensors at a time, nothing fused."""

import torch

from fastff import reference
from fastff.kernels.layout import as_result_of, widened
from fastff.spec import EpilogueGradients, Groups, StepResult


def goodness(x, head, plan=None):
    """Return g of a Projection, by the algorithm of the plan, or of Groups."""
    if isinstance(head, Groups):
        return reference.group_goodness(widened(x), *head)
    x, head = head.in_dtype(x)
    weight, bias, grid_weight, padding, *_ = head
    if plan.algorithm != "second_moment" or weight is None:
        return reference.goodness(x, weight, bias, grid_weight, padding, head.hidden)
    g = reference.goodness_second_moment(x, weight, bias, padding)
    return g if grid_weight is None else g + reference.goodness(x, grid_weight=grid_weight, hidden=head.hidden)


def goodness_backward(d, x, head, plan=None, need_grad_x=True):
    """Return dL/dx for Groups; for a Projection the gradients of x, weight, bias, grid_weight (None for absent ones) and of a hidden layer."""
    if isinstance(head, Groups):
        return reference.group_goodness_gradient(d, widened(x), *head).to(x.dtype)
    wide, head = head.in_dtype(x)
    weight, bias, grid_weight, *_ = head
    d = d.to(wide.dtype)
    grad_x, grad_weight, grad_bias, grad_grid, of_hidden = torch.zeros_like(wide), None, None, None, ()
    if weight is not None:
        second = plan.algorithm == "second_moment"
        gradients = reference.gradients_second_moment if second else reference.gradients_direct
        grad_x, grad_weight, grad_bias = gradients(d, wide, weight, bias, head.padding)
    if grid_weight is not None:
        spread, grad_grid, *of_hidden = reference.gradients_grid(d, wide, grid_weight, head.hidden)
        grad_x = grad_x + spread
    grad_bias = grad_bias if bias is not None else None
    return grad_x if need_grad_x else None, grad_weight, grad_bias, grad_grid, *of_hidden


def normalize(x, normalization):
    return None if normalization.name == "none" else reference.normalized(widened(x), *normalization)


def step(local, plan=None):
    y, head, epilogue = widened(local.x), local.goodness, local.epilogue
    x = local.x
    if epilogue is not None:
        weight, bias, residual = map(widened, (epilogue.weight, epilogue.bias, epilogue.residual))
        out, h, mean, var = reference.epilogue(y, weight, bias, epilogue.eps, residual, epilogue.activation)
        x = as_result_of(x, out)
    g = goodness(x, head, plan)
    losses = reference.losses(g, local.loss)
    d, grad_tau = reference.loss_gradient(g, local.loss, local.loss.scale(len(g)))
    grads = goodness_backward(d, x, head, plan)
    grad_x, *grads = (grads, None, None, None) if isinstance(head, Groups) else grads
    result = StepResult(losses, g, grad_x, *grads[:3], grad_tau, normalize(x, local.normalization))
    if grads[3:]:
        wide, head = head.in_dtype(x)
        means = reference.cell_means(wide, head.grid_weight)
        result = result.with_hidden(grads[3:], *reference.spatial(means, head.grid_weight, head.hidden)[1:])
    if epilogue is None:
        return result
    gradients = reference.epilogue_gradients(
        widened(as_result_of(x, grad_x)), y, h, mean, var, weight, epilogue.eps, epilogue.activation
    )
    return result.before_epilogue(EpilogueGradients(*gradients), mean, var)
