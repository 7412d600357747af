"""PyTorch's operators for heads that the kernels do not take, called with the tuples of fastff/spec.py."""

import torch

from fastff import spec
from fastff.kernels.composed import goodness as composed


def _dtype(projection):
    wide = any(isinstance(t, torch.Tensor) and t.dtype == torch.float64 for t in projection)
    return torch.float64 if wide else torch.float32


def goodness(x, projection, plan):
    return composed.goodness(x, *projection, plan, _dtype(projection))


def goodness_backward(d, x, projection, plan, need_grad_x):
    return composed.goodness_backward(d, x, *projection, plan, _dtype(projection), need_grad_x)


def step(step, plan):
    loss = step.loss
    given = composed.Loss(
        loss.target, loss.tau, loss.learned_tau, loss.margin, loss.label_smoothing, loss.scale(len(step.x)), loss.grad_scale
    )
    losses, g, *rest, _ = composed.goodness_step(
        step.x, *step.goodness, plan, _dtype(step.goodness), given, step.need_grad_x, "none", 0.0
    )
    return spec.StepResult(losses, g, *rest)
