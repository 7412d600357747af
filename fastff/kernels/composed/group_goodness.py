"""Goodness of groups of channels in plain PyTorch: the definitions of fastff/reference.py, 16-bit tensors in float32."""

from typing import NamedTuple

import torch

from fastff import reference


class Goodness(NamedTuple):
    """What g is: power 1 or 2 of x, a mean or a sum, over `groups` groups of channels or at each of the positions."""

    groups: int
    power: int
    mean: bool
    positions: bool

    def count(self, x):
        """Columns of g."""
        return x.shape[2] * x.shape[3] if self.positions else self.groups


class Loss(NamedTuple):
    """name: one of reference.LOSSES. theta: the threshold, or alpha for differences; target .. label_smoothing for cross_entropy.

    The gradients' factor is scale * grad_scale."""

    name: str
    theta: float
    target: torch.Tensor | None
    tau: float
    margin: float
    label_smoothing: float
    scale: float
    grad_scale: torch.Tensor | None

    def count(self, batch):
        """Losses of a batch: of pairs or of samples."""
        return batch // 2 if self.name in reference.PAIRED else batch


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
