"""Goodness of groups of channels by the compiled library, all four types on the CPU (csrc/cpu/group_goodness.cpp)."""

import torch

from fastff.kernels.composed.group_goodness import Goodness
from fastff.reference import LOSSES, NORMALIZATIONS  # in the order of the C++

GOODNESS, STEP, BACKWARD, NORMALIZE = range(4)


def _call(
    x,
    how,
    mode,
    target=None,
    d=None,
    grad_scale=None,
    loss=0,
    numbers=(0.0, 1.0, 0.0, 0.0, 1.0),
    norm=0,
    eps=0.0,
    need_x=False,
):
    return torch.ops.fastff.group_goodness_native(
        x, target, d, grad_scale, mode, *how, loss, *numbers, norm, eps, need_x
    )


def goodness(x, how):
    """g [B, K] or [B, P]."""
    return _call(x, how, GOODNESS)[0]


def goodness_backward(d, x, how):
    """dL/dx as x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return _call(x, how, BACKWARD, d=d.to(wide), need_x=True)[2]


def goodness_step(x, how, loss, normalize, eps, need_x):
    """(g, losses, dL/dx or None, the normalised x or None)."""
    numbers = (loss.theta, loss.tau, loss.margin, loss.label_smoothing, loss.scale)
    scale = None if loss.grad_scale is None else loss.grad_scale.float()
    return _call(
        x,
        how,
        STEP,
        loss.target,
        None,
        scale,
        LOSSES.index(loss.name),
        numbers,
        NORMALIZATIONS.index(normalize),
        eps,
        need_x,
    )


def normalize(x, how, groups, eps):
    """x normalised, as x."""
    return _call(x, Goodness(groups, 1, True, False), NORMALIZE, norm=NORMALIZATIONS.index(how), eps=eps)[3]
