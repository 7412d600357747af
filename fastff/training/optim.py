"""Optimisers: parameter groups, one optimiser a block, learning-rate schedules as functions of progress."""

import math

import torch

# Each is the better of 2e-3 and 4e-3 for its kind (docs/learning.md).
LOCAL_LR, BACKPROP_LR = 4e-3, 2e-3


def parameter_groups(parameters):
    """Two groups: weights (two or more dimensions), and norms, biases and temperatures without weight decay."""
    parameters = [p for p in dict.fromkeys(parameters) if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2]}]
    groups.append({"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def adamw(lr=LOCAL_LR, weight_decay=0.05):
    """The default optimiser: AdamW, fused."""
    return lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def build(make, parameters):
    """make(groups) -> an optimiser on these parameters, or None where none of them is trained."""
    groups = parameter_groups(parameters)
    if not groups:
        return None
    optimizer = make(groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: expected a function of parameter groups that makes a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer


def cosine(warmup=0.05):
    """Factor of the learning rate at progress t in [0, 1]: linear warm-up, then half a cosine to zero."""

    def factor(t):
        if t < warmup:
            return t / warmup
        return 0.5 * (1 + math.cos(math.pi * (t - warmup) / (1 - warmup)))

    return factor


def constant(t):
    """A learning rate that stays."""
    return 1.0


SCHEDULES = {"cosine": cosine(), "constant": constant}


def set_progress(optimizers, schedule, t):
    """Set every learning rate to its base times schedule(t)."""
    factor = schedule(t)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            lr = group["base_lr"] * factor
            if isinstance(group["lr"], torch.Tensor):  # read by a recorded step (graph.py)
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
