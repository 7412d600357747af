"""What PyTorch does inside accelerated code: each call of one of its functions is looked at with its arguments, and some are done otherwise.

No source code is read or changed. `Faster` is a mode of torch.overrides: Python runs as it is written, and what is done otherwise is always a single
call, whose result has the same values but for rounding. All that this depends on is known at that moment: nothing has to be proved about the code.
Which calls: layouts.py (convolutions, views, random numbers), goodness.py (means, sums), optimizers.py (their steps), and here backward.

Code outside sees no difference: tensors that are still there when accelerated code returns get the layout that they would have had.
"""

import threading
import weakref

import torch
from torch.autograd.graph import get_gradient_edge
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

from fastff.swap_in import goodness, layouts, optimizers

_thread = threading.local()  # .mode: the Faster that this thread is in


def current():
    """Return the Faster that this thread is in, or None."""
    return getattr(_thread, "mode", None)


class Faster(TorchFunctionMode):
    """The mode of one call of accelerated code. `record(pattern, result, weight)` is told what was done with each call that it knows.

    calls: whether to look at calls, or at optimizers alone: each costs about 2 microseconds, which only convolutions bring in again."""

    def __init__(self, record, calls=True):
        super().__init__()
        self.record, self.calls, self.step = record, calls, optimizers.Step(record)
        self.converted = False  # whether a tensor is in channels_last that would not be without this mode
        self.made, self.copies, self.chain, self.split = [], [], None, None

    def __enter__(self):
        _thread.mode = self
        self.hooks = [register_optimizer_step_pre_hook(_before_step), register_optimizer_step_post_hook(_after_step)]
        return super().__enter__() if self.calls else self

    def __exit__(self, *error):
        self.step.after()
        if self.calls:
            super().__exit__(*error)
        _thread.mode = self.chain = self.split = None
        for hook in self.hooks:
            hook.remove()
        if self.converted:
            layouts.restore(self.made, self.copies)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        handler = HANDLERS.get(function)
        if handler is None:
            result = function(*args, **kwargs) if kwargs else function(*args)
        elif kwargs:
            result = handler(self, function, args, kwargs)
        else:
            result = handler(self, function, args, {})
        if self.converted:
            for tensor in result if type(result) in (tuple, list) else (result,):
                if type(tensor) is torch.Tensor and not tensor.is_contiguous():
                    self.made.append(weakref.ref(tensor))
            for copy in self.copies:
                copy.update()
        return result

    def forget(self):
        """Let go of what only this object holds."""
        self.chain = self.split = None
        self.copies = [copy for copy in self.copies if copy.used()]


def _before_step(optimizer, args, kwargs):
    mode = current()
    if mode is not None and len(args) == 1 and not kwargs and optimizers.is_pytorchs(optimizer):
        mode.step.before(optimizer)


def _after_step(optimizer, args, kwargs):
    mode = current()
    if mode is not None:
        mode.step.after()


def _backward(mode, function, args, kwargs):
    """Run a backward pass in this mode, which PyTorch would leave for it: it calls Python code, such as hooks and what is checkpointed.

    It starts from the tensors' edges in the graph, which is the same, since PyTorch would ask the mode again what to do about tensors."""
    mode.forget()
    try:
        tensors = args[0] if isinstance(args[0], (tuple, list)) else args[:1]
        learn = all(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)
        if not (mode.converted and learn and len(args) == 1) or kwargs.get("inputs") is not None:
            return function(*args, **kwargs)
        edges, gradients = [get_gradient_edge(t) for t in tensors], kwargs.get("gradient", kwargs.get("grad_tensors"))
        TorchFunctionMode.__enter__(mode)
        try:
            torch.autograd.backward(edges, gradients, kwargs.get("retain_graph"), kwargs.get("create_graph", False))
        finally:
            TorchFunctionMode.__exit__(mode, None, None, None)
    finally:
        mode.forget()


HANDLERS = {function: handler for handler, called in (*layouts.HANDLERS, *goodness.HANDLERS) for function in called}
HANDLERS |= dict.fromkeys([torch.Tensor.backward, torch.autograd.backward], _backward)
