"""Goodness of groups of channels by the compiled library, all four types on the CPU (csrc/cpu/group_goodness.cpp).

With an epilogue the arithmetic is in float32; float64 goes through PyTorch's epilogue."""

import torch

from fastff.kernels.torch.epilogue import completed
from fastff.spec import ACTIVATIONS, LOSSES, NORMALIZATIONS, PAIRED_LOSSES, Groups, Loss, Normalization, StepResult

GOODNESS, STEP, BACKWARD, NORMALIZE = range(4)
NO_LOSS, NO_NORMALIZATION = Loss(), Normalization()


def goodness(x, groups):
    """Return g [B, K] or [B, P]."""
    return _call(x, groups, GOODNESS)[0]


def goodness_backward(d, x, groups):
    """Return dL/dx from d = dL/dg."""
    return _call(x, groups, BACKWARD, d=d.to(torch.promote_types(x.dtype, torch.float32)), need_grad_x=True)[2]


def normalize(x, normalization):
    """Return x normalized, or None for "none"."""
    if normalization.name == "none":
        return None
    return _call(x, Groups(normalization.groups, 1), NORMALIZE, normalization=normalization)[3]


def step(local):
    """Return the StepResult of a Step, its losses not reduced."""
    x, groups, epilogue, loss, normalization = local.x, local.goodness, local.epilogue, local.loss, local.normalization
    other_groups = normalization.name == "group_norm" and normalization.groups != groups.count
    if other_groups or (epilogue is not None and x.dtype == torch.float64):
        return completed(local, step, normalize)
    if epilogue is None:
        found = _call(x, groups, STEP, loss, normalization=normalization, need_grad_x=local.need_grad_x)
        g, losses, grad_x, normalized = found
        return StepResult(losses, g, grad_x, normalized=normalized)
    weight, bias, residual, scale = (
        None if t is None else t.float() for t in (epilogue.weight, epilogue.bias, epilogue.residual, loss.grad_scale)
    )
    g, losses, grad_y, normalized, *rest = torch.ops.fastff.group_tail_native(
        x.float(), residual, weight, bias, epilogue.eps, ACTIVATIONS.index(epilogue.activation),
        epilogue.need_grad_residual and residual is not None, loss.target, scale, *groups, *_loss_numbers(loss, x.shape[0]),
        NORMALIZATIONS.index(normalization.name), normalization.eps,
    )  # fmt: skip
    return StepResult(losses, g, grad_y, None, None, None, None, normalized, *rest)


def _loss_numbers(loss, batch):
    theta = loss.alpha if loss.name in PAIRED_LOSSES else loss.theta
    return LOSSES.index(loss.name), theta, loss.tau, loss.margin, loss.label_smoothing, loss.scale(batch)


def _call(x, groups, mode, loss=NO_LOSS, d=None, normalization=NO_NORMALIZATION, need_grad_x=False):
    scale = None if loss.grad_scale is None else loss.grad_scale.float()
    return torch.ops.fastff.group_goodness_native(
        x, loss.target, d, scale, mode, *groups, *_loss_numbers(loss, x.shape[0]), NORMALIZATIONS.index(normalization.name), normalization.eps,
        need_grad_x,
    )  # fmt: skip
