"""Steps of PyTorch's own optimizers in accelerated code: with fused=True where that is the same, and not looked at call by call.

Of an optimizer with few parameters, as each layer has one, most of the time is in what PyTorch does around its step: the profiler's record, hooks,
torch.compile's marks. `quick` leaves that out for optimizers that accelerate finds, which is 1.5 to 4 % of a step of the programs of
benchmarks/strangers.py; functions have theirs found by PyTorch's hooks."""

import inspect

import torch
from torch.optim import optimizer as every

from fastff.ops import table
from fastff.swap_in.layouts import in_channels_last
from fastff.swap_in.limits import TENSORS

FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
# PyTorch does not document these: hooks of every optimizer. Without them, the whole step is made.
EVERYWHERE = [getattr(every, f"_global_optimizer_{when}_hooks", None) for when in ("pre", "post")]


class Step:
    """What an optimizer's step in accelerated code needs before and after it."""

    def __init__(self, record):
        self.record, self.fused, self.unseen = record, [], None

    def before(self, optimizer):
        self.unseen = table.UNSEEN()
        self.unseen.__enter__()
        kind = getattr(type(optimizer), "_fastff_original", type(optimizer))
        for group in optimizer.param_groups if kind in FUSED else ():
            plain = group.get("fused") is None and group.get("foreach") is None and isinstance(group["lr"], float)
            if plain and not group.get("capturable") and not group["differentiable"] and _alike(optimizer, group):
                group["fused"] = True
                self.fused.append(group)
                self.record(f"{kind.__name__}.step", "replaced", None)

    def after(self, *_):
        """End what `before` began. A step that raises an error does not call it."""
        while self.fused:
            self.fused.pop()["fused"] = None
        if self.unseen is not None:
            self.unseen.__exit__(None, None, None)
            self.unseen = None


def is_pytorchs(optimizer):
    """Whether an optimizer is one of PyTorch's own without hooks: in others, and in closures, users may do anything."""
    hooks = (getattr(optimizer, f"_optimizer_step_{when}_hooks", None) for when in ("pre", "post"))
    return type(optimizer).__module__.startswith("torch.optim.") and not any(hooks)


def _only_ours():
    """Whether no hook of every optimizer is the user's: one before and one after a step are those of the mode."""
    return all(hooks is not None and len(hooks) == 1 for hooks in EVERYWHERE)


def quick(original, current):
    """Return the methods step and zero_grad for an optimizer of the class `original`; current() is the mode, or None outside accelerated code."""
    own, whole_step = inspect.unwrap(original.step), original.step

    def step(self, closure=None):
        if type(self).step is not step:  # PyTorch has put around this one what its own has around it: the hooks
            return getattr(whole_step, "__wrapped__", whole_step)(self, closure)
        mode = current()
        whole = mode is None or closure is not None or not is_pytorchs(self) or not _only_ours()
        if whole or self.defaults.get("differentiable"):
            return whole_step(self, closure)
        mode.step.before(self)
        try:
            with torch.no_grad():
                return own(self)
        finally:
            mode.step.after()

    def zero_grad(self, set_to_none=True):
        if current() is None or not set_to_none:
            original.zero_grad(self, set_to_none)
        else:
            with table.UNSEEN():
                for parameter in (p for group in self.param_groups for p in group["params"]):
                    parameter.grad = None

    # PyTorch does not document it: without it, PyTorch puts around it what is left out here when a state is loaded.
    step.hooked = True
    return {"step": step, "zero_grad": zero_grad}


def _order(t):
    """Return the strides of the dimensions in which a tensor has several elements: others, as those of 1 x 1 filters, say nothing."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


def _alike(optimizer, group):
    """Whether all that belongs to a parameter lies in memory as it does, since the fused kernels go through memory in its order, and all
    parameters or none have a state."""
    states = set()
    for p in group["params"]:
        grad = p.grad
        if grad is None:
            continue
        state = [t for t in optimizer.state.get(p, {}).values() if isinstance(t, torch.Tensor) and t.dim()]
        states.add(len(state))
        if type(p) not in TENSORS or p.device.type != "cpu" or p.dtype not in (torch.float32, torch.float64):
            return False
        if not (p.is_contiguous() or in_channels_last(p)) or grad.is_sparse:
            return False
        if any(t.dtype != p.dtype or (t.stride() != p.stride() and _order(t) != _order(p)) for t in (grad, *state)):
            return False
    return len(states) == 1
