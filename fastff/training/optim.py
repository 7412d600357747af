"""Optimisers: parameter groups, one optimiser for each block, updates, and learning-rate schedules as functions of progress."""

import functools
import inspect
import itertools
import math

import torch

from fastff.training.muon import Muon, fused_adam, parameter_groups, step_together

# The better learning rate of 2e-3 and 4e-3 for each kind of training (docs/learning.md).
LOCAL_LR, BACKPROP_LR = 4e-3, 2e-3


def adamw(lr=LOCAL_LR, weight_decay=0.05):
    """Return a function that makes a fused AdamW from parameter groups."""
    return functools.partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay, fused=True)


def muon(lr=LOCAL_LR, weight_decay=0.05, momentum=0.95):
    """Return a function that makes a Muon optimiser (muon.py): orthogonalised updates of convolution weights, AdamW for the rest.

    A step takes longer than AdamW's (docs/choosing.md)."""

    return functools.partial(Muon, lr=lr, weight_decay=weight_decay, momentum=momentum)


def build(make, parameters, heads=frozenset()):
    """Return the optimiser that make(groups) makes for these parameters, or None if none of them is trained. Raises TypeError.

    heads: ids of the parameters of goodness heads."""
    if not callable(make):  # an optimizer that is made already has the parameters of one block at most
        text = "expected a function that makes one for each block, such as lambda params: torch.optim.AdamW(params, lr=1e-3)"
        raise TypeError(f"optimizer: {text}, got {type(make).__name__}")
    groups = parameter_groups(parameters, heads if getattr(make, "func", None) is Muon else None)
    if not groups:
        return None
    optimizer = make(groups)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: expected a function of parameter groups that makes a torch.optim.Optimizer, got {type(optimizer).__name__}"
        )
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        text = "expected one whose step needs no closure, since a block's gradients are computed once a step"
        raise TypeError(f"optimizer: {text}, got {type(optimizer).__name__}")
    for group in optimizer.param_groups:
        group["base_lr"] = float(group["lr"])  # of a tensor not the same one, which the schedule fills
    return optimizer


def cosine(t, warmup=0.05):
    """Return the factor of the learning rate at progress t in [0, 1]: linear warm-up, then half a cosine to zero."""
    if t < warmup:
        return t / warmup
    return 0.5 * (1 + math.cos(math.pi * (t - warmup) / (1 - warmup)))


def constant(t):
    """Return 1: the learning rate does not change."""
    return 1.0


SCHEDULES = {"cosine": cosine, "constant": constant}


def set_progress(optimizers, schedule, t):
    """Set every learning rate to its base times schedule(t)."""
    factor = schedule(t)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            lr = group["base_lr"] * factor
            if isinstance(group["lr"], torch.Tensor):  # read by a recorded step (recording.py)
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


def unusual(optimizer):
    """Whether somebody waits for this optimiser's steps, or replaced its method."""
    return bool(
        optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks or "step" in vars(optimizer)
    )


class Updates:
    """Updates by several optimisers: gradients unscaled and clipped, optimizer.step(), gradients freed."""

    def __init__(self, clip_grad_norm=None):
        self.clip_grad_norm = clip_grad_norm

    def __call__(self, *updates):
        """Take a step of each (optimizer, scaler, parameters). scaler: a GradScaler or None; parameters: those of the optimizer."""
        together = []
        for optimizer, scaler, parameters in updates:
            if scaler is not None:
                scaler.unscale_(optimizer)
            if self.clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm)
            if scaler is not None:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)
            elif type(optimizer) is Muon and not unusual(optimizer):
                together.append((optimizer, parameters))
            else:
                step(optimizer)
        if together:
            step_together([optimizer for optimizer, _ in together])
            for p in itertools.chain.from_iterable(parameters for _, parameters in together):
                p.grad = None


def step(optimizer):
    """optimizer.step() and zero_grad() for optimisers that are small and many: one for each block.

    optimizer.step() takes 59 to 84 us of a block's 1 to 10 ms, and this 31 to 54: torch's Adam and AdamW with fused=True group tensors and check
    options every time. Here the same kernel, which is no public function of torch, is called at once. All but their plain use goes through
    optimizer.step()."""
    if (calls := fused_calls(optimizer)) is None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return
    torch._foreach_add_([state["step"] for *_, states in calls for state in states], 1)  # in one launch
    for group, grads, states in calls:
        decoupled = group.get("decoupled_weight_decay", type(optimizer) is torch.optim.AdamW)
        kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
        lists = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        fused_adam(
            kernel, group["params"], grads, *lists, *(group[key] for key in ("lr", "betas", "weight_decay", "eps"))
        )
        for p in group["params"]:
            p.grad = None


def fused_calls(optimizer):
    """Return [(parameter group, its gradients, its states)] for calls of torch's fused kernel that make the optimiser's step.

    None where they would not: for other optimisers and options, hooks, a patched step, missing gradients or states, several dtypes."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or unusual(optimizer):
        return None
    calls = []
    for group in optimizer.param_groups:
        params = group["params"]
        grads, states = [p.grad for p in params], [optimizer.state.get(p) for p in params]
        if not group["fused"] or group["amsgrad"] or group["maximize"] or group["differentiable"]:
            return None
        if any(grad is None for grad in grads) or not all(states) or len({(p.device, p.dtype) for p in params}) != 1:
            return None
        calls.append((group, grads, states))
    return calls
