"""Optimizers: parameter groups, an optimizer for each block, and learning-rate schedules as functions of progress."""

import math

import torch

# Default learning rates: for each kind of training the better one of 2e-3 and 4e-3 (docs/learning.md).
LOCAL_LR, BACKPROP_LR = 4e-3, 2e-3


def parameter_groups(parameters):
    """Return one or two parameter groups: parameters with two or more dimensions, and the others (norms, biases, temperatures) without weight decay.

    Repeated parameters and those that need no gradient are left out."""
    parameters = [p for p in dict.fromkeys(parameters) if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2]}]
    groups.append({"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def adamw(lr=LOCAL_LR, weight_decay=0.05):
    """Return the default optimizer, fused AdamW, as a function of parameter groups."""
    return lambda groups: torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def build(make, parameters):
    """Return the optimizer make(groups) of these parameters, or None if none of them needs a gradient.

    Raises:
        TypeError: `make` returns something else than a torch.optim.Optimizer."""
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
    """Return a schedule, the factor of the learning rate at progress t in [0, 1]: a linear rise for t < warmup, then half a cosine down to 0."""

    def factor(t):
        if t < warmup:
            return t / warmup
        return 0.5 * (1 + math.cos(math.pi * (t - warmup) / (1 - warmup)))

    return factor


def constant(t):
    """Schedule of a constant learning rate."""
    return 1.0


SCHEDULES = {"cosine": cosine(), "constant": constant}


def set_progress(optimizers, schedule, t):
    """Set the learning rate of every parameter group to its initial value times schedule(t)."""
    factor = schedule(t)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            lr = group["base_lr"] * factor
            if isinstance(group["lr"], torch.Tensor):  # a captured step reads it from this tensor (graph.py)
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


class Stepper:
    """Callable that does optimizer.step() and zero_grad() with less overhead. A training step calls it once for each block.

    At every call, torch's Adam and AdamW with fused=True look up state, group tensors and check options. That takes 0.1 to 0.2 ms, and a block
    takes 1 to 10 ms. This class calls the same fused kernel on lists of tensors that it keeps from the previous step. Whatever is not covered
    (hooks, a patched step, missing gradients, amsgrad, other optimizers) goes through optimizer.step()."""

    def __init__(self, optimizer):
        self.optimizer, self.groups = optimizer, []

    def __call__(self):
        if not (self._lists_are_valid() and self._call_kernels()):
            self.optimizer.step()
            self._collect_lists()
        if self.groups:
            self._clear_gradients()
        else:
            self.optimizer.zero_grad(set_to_none=True)

    def _clear_gradients(self):
        for _, params, *_ in self.groups:
            for p in params:
                p.grad = None

    def _collect_lists(self):
        """Store the lists for the kernel if every parameter has its state and only supported options are used."""
        o, self.groups = self.optimizer, []
        plain = type(o) in (torch.optim.Adam, torch.optim.AdamW) and "step" not in vars(o)
        for group in o.param_groups if plain else ():
            state = [o.state.get(p, {}) for p in group["params"]]
            if not group.get("fused") or any(
                group.get(k) for k in ("amsgrad", "capturable", "differentiable", "maximize")
            ):
                break
            if any("exp_avg" not in s for s in state) or len({(p.device, p.dtype) for p in group["params"]}) != 1:
                break
            kernel = (
                torch._fused_adamw_
                if group.get("decoupled_weight_decay", type(o) is torch.optim.AdamW)
                else torch._fused_adam_
            )
            lists = [[s[k] for s in state] for k in ("exp_avg", "exp_avg_sq", "step")]
            self.groups.append((group, group["params"], kernel, state, *lists))
        else:
            return
        self.groups = []

    def _lists_are_valid(self):
        o = self.optimizer
        hooks = o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks or "step" in vars(o)
        return (
            bool(self.groups)
            and not hooks
            and len(self.groups) == len(o.param_groups)
            and all(
                group is stored and o.state[params[0]] is state[0]
                for group, (stored, params, _, state, *_) in zip(o.param_groups, self.groups, strict=True)
            )
        )

    @torch.no_grad()
    def _call_kernels(self):
        """Update the parameters and return True, or change nothing and return False if a gradient is missing or a learning rate is a tensor."""
        grads = [[p.grad for p in params] for _, params, *_ in self.groups]
        if any(g is None for gs in grads for g in gs) or any(
            isinstance(group["lr"], torch.Tensor) for group, *_ in self.groups
        ):
            return False
        for (group, params, kernel, _, averages, squares, steps), gs in zip(self.groups, grads, strict=True):
            beta1, beta2 = group["betas"]
            torch._foreach_add_(steps, 1)
            kernel(
                params, gs, averages, squares, [], steps, lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
                eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip
        return True
