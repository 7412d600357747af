"""Optimisers: parameter groups, one optimiser for each block, updates, and learning-rate schedules as functions of progress."""

import functools
import inspect
import itertools
import math

import torch

from fastff.training.muon import Muon, splits, step_together

# The better learning rate of 2e-3 and 4e-3 for each kind of training (docs/learning.md).
LOCAL_LR, BACKPROP_LR = 4e-3, 2e-3


def parameter_groups(parameters):
    """Return two groups: weights (two or more dimensions), and norms, biases and temperatures without weight decay."""
    parameters = [p for p in dict.fromkeys(parameters) if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2]}]
    groups.append({"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def adamw(lr=LOCAL_LR, weight_decay=0.05):
    """Return a function that makes a fused AdamW from parameter groups."""
    return functools.partial(torch.optim.AdamW, lr=lr, weight_decay=weight_decay, fused=True)


def muon(lr=LOCAL_LR, weight_decay=0.05, momentum=0.95):
    """Return a function that makes a Muon optimiser (muon.py): orthogonalised updates of convolution weights, AdamW for the rest.

    A step takes longer than AdamW's (docs/choosing.md)."""

    def make(groups):
        return Muon(groups, lr=lr, weight_decay=weight_decay, momentum=momentum)

    make.groups = splits  # instead of parameter_groups
    return make


def build(make, parameters, heads=frozenset()):
    """Return the optimiser that make(groups) makes for these parameters, or None if none of them is trained. Raises TypeError.

    heads: ids of the parameters of goodness heads."""
    if not callable(make):  # an optimizer that is made already has the parameters of one block at most
        text = "expected a function that makes one for each block, such as lambda params: torch.optim.AdamW(params, lr=1e-3)"
        raise TypeError(f"optimizer: {text}, got {type(make).__name__}")
    groups = make.groups(parameters, heads) if hasattr(make, "groups") else parameter_groups(parameters)
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


def cosine(warmup=0.05):
    """Return the factor of the learning rate as a function of progress t in [0, 1]: linear warm-up, then half a cosine to zero."""
    return functools.partial(_cosine, warmup)


def _cosine(warmup, t):
    if t < warmup:
        return t / warmup
    return 0.5 * (1 + math.cos(math.pi * (t - warmup) / (1 - warmup)))


def constant(t):
    """Return 1: the learning rate does not change."""
    return 1.0


SCHEDULES = {"cosine": cosine(), "constant": constant}


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
        self.clip_grad_norm, self.steppers = clip_grad_norm, {}

    def __getstate__(self):
        return {"clip_grad_norm": self.clip_grad_norm, "steppers": {}}  # a copy collects its own lists

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
                if optimizer not in self.steppers:
                    self.steppers[optimizer] = Stepper(optimizer)
                self.steppers[optimizer]()
        if together:
            step_together([optimizer for optimizer, _ in together])
            for p in itertools.chain.from_iterable(parameters for _, parameters in together):
                p.grad = None


class Stepper:
    """optimizer.step() and zero_grad() for optimisers that are small and many: one for each block.

    A call takes 0.10 ms, and optimizer.step() 0.28, of the 1 to 10 ms of a block: torch's Adam and AdamW with fused=True look up their state, group
    tensors and check options every time. Here the same kernel, which is no public function of torch, is called with lists kept from the previous
    step. Everything but their plain use (hooks, a patched step, missing gradients, amsgrad, other optimisers) goes through optimizer.step()."""

    def __init__(self, optimizer):
        self.optimizer, self.groups = optimizer, []

    def __call__(self):
        if not (self._kept() and self._fast()):
            self.optimizer.step()
            self._keep()
        self.optimizer.zero_grad(set_to_none=True) if not self.groups else self._clear()

    def _clear(self):
        for _, params, *_ in self.groups:
            for p in params:
                p.grad = None

    def _keep(self):
        """Collect the lists if every parameter has its state and nothing is unusual."""
        o, self.groups = self.optimizer, []
        plain = type(o) in (torch.optim.Adam, torch.optim.AdamW) and "step" not in vars(o)
        for group in o.param_groups if plain else ():
            state = [o.state.get(p, {}) for p in group["params"]]
            if not group.get("fused") or any(group.get(k) for k in ("amsgrad", "differentiable", "maximize")):
                break
            if any("exp_avg" not in s for s in state) or len({(p.device, p.dtype) for p in group["params"]}) != 1:
                break
            decoupled = group.get("decoupled_weight_decay", type(o) is torch.optim.AdamW)
            kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
            lists = [[s[k] for s in state] for k in ("exp_avg", "exp_avg_sq", "step")]
            self.groups.append((group, group["params"], kernel, state, *lists))
        else:
            return
        self.groups = []

    def _kept(self):
        o = self.optimizer
        if not self.groups or unusual(o) or len(self.groups) != len(o.param_groups):
            return False
        pairs = zip(o.param_groups, self.groups, strict=True)
        return all(group is kept[0] and o.state[kept[1][0]] is kept[3][0] for group, kept in pairs)

    @torch.no_grad()
    def _fast(self):
        grads = [[p.grad for p in params] for _, params, *_ in self.groups]
        if any(g is None for gs in grads for g in gs):
            return False
        torch._foreach_add_([step for *_, steps in self.groups for step in steps], 1)
        for (group, params, kernel, _, averages, squares, steps), gs in zip(self.groups, grads, strict=True):
            beta1, beta2 = group["betas"]
            kernel(
                params, gs, averages, squares, [], steps, lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
                eps=group["eps"], amsgrad=False, maximize=False,
            )  # fmt: skip
        return True
