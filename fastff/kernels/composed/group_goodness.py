"""Goodness of groups of channels in plain PyTorch: the definitions of fastff/reference.py, 16-bit tensors in float32."""

import torch

from fastff import reference


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def goodness(x, how):
    """g [B, K] or [B, P]."""
    return reference.group_goodness(_wide(x), *how)


def goodness_backward(d, x, how):
    """dL/dx as x."""
    return reference.group_goodness_gradient(d, _wide(x), *how).to(x.dtype)


def goodness_step(x, how, loss, normalize, eps, need_x):
    """(g, losses, dL/dx or None, the normalised x or None)."""
    wide = _wide(x)
    g = reference.group_goodness(wide, *how)
    losses, d = losses_of(g, loss)
    grad_x = reference.group_goodness_gradient(d, wide, *how).to(x.dtype) if need_x else None
    normal = None if normalize == "none" else reference.normalized(wide, normalize, how.groups, eps).to(x.dtype)
    return g, losses, grad_x, normal


def normalize(x, how, groups, eps):
    """x normalised, as x."""
    return reference.normalized(_wide(x), how, groups, eps).to(x.dtype)


def losses_of(g, loss):
    """(losses, d = scale * d(sum of losses)/dg)."""
    if loss.name == "cross_entropy":
        numbers = (loss.tau, loss.margin, loss.label_smoothing)
        losses = reference.margin_cross_entropy(g, loss.target, *numbers)
        d, _ = reference.goodness_gradient(g, loss.target, *numbers, loss.scale)
    else:
        losses = reference.forward_forward_losses(g, loss.name, loss.theta, loss.theta)
        d = reference.forward_forward_gradient(g, loss.name, loss.theta, loss.theta, loss.scale)
    return losses, d if loss.grad_scale is None else d * loss.grad_scale
