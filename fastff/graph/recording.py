"""Functions of a minibatch that are recorded once for each of its shapes, then replayed without the Python of an ordinary call.

The first calls of a shape run normally; then one is recorded. What Python decides stays as it was in the recording, so there is one for each choice
of segments, modes of modules and parameters that learn. How a call is recorded is the recorder's: operators.py here, CUDA graphs in
fastff/training/recording.py.
"""

import os
import warnings

import torch

WARM_UP = 3  # ordinary calls before a recording: they create the optimizer state, let cuDNN choose its algorithms and Triton compile
# Changes of the modules in a row that leave no time for a replay, after which nothing more is recorded unasked.
FRUITLESS = 16


class CannotRecord(RuntimeError):
    """A call that was begun cannot be recorded."""


class Recorded:
    """Replacement for function(images, target, *how), which returns a tuple, that replays recordings.

    Args:
        module: what the function trains.
        function: images and target are tensors, target may be None.
        recorder: has

            run(function)                       makes an ordinary call and returns its result
            record(function, images, target)    calls function(images, target) and returns (replay, its result), where replay is such a function
                                                too, or the reason why there is none; raises CannotRecord where the call could not be finished
            ready()                             whether this call may be recorded or replayed
            changes                             a count: recordings made at another do not hold
            name, most, warns                   how it records; how many recordings it may make unasked; whether to warn where it cannot

        kind: kind(*how) is what a recording depends on, besides the minibatch's shape.
        gives_up: whether a function that cannot be recorded is called as it is from then on instead of raising CannotRecord.

    Attributes: reason (why nothing is recorded any more, or None), recordings."""

    def __init__(self, module, function, recorder, kind=lambda *how: how, gives_up=True):
        self.function, self.recorder, self.kind, self.gives_up, self.reason = function, recorder, kind, gives_up, None
        self.module, self.changes, self.fruitless = module, recorder.changes, 0
        self._begin_anew()

    def __getstate__(self):
        return vars(self) | {"calls": {}, "recordings": {}}  # a copy records calls of its own

    def _begin_anew(self):
        self.calls, self.recordings = {}, {}
        self.modules, self.parameters = list(self.module.modules()), list(self.module.parameters())

    def __call__(self, images, target, *how):
        function = lambda images, target: self.function(images, target, *how)  # noqa: E731
        ordinary = lambda: self.recorder.run(lambda: function(images, target))  # noqa: E731
        if self.reason or not self.recorder.ready():
            return ordinary()
        if self.recorder.changes > self.changes:
            self.changes, self.fruitless = self.recorder.changes, self.fruitless + 1
            self._begin_anew()
            if self.fruitless > FRUITLESS and self.gives_up:
                self._give_up("the network changes too often")
        learned = tuple(m.training for m in self.modules), tuple(p.requires_grad for p in self.parameters)
        outside = torch.get_num_threads(), os.environ.get("FASTFF_IMPL")
        key = _form(images), target is not None and _form(target), self.kind(*how), learned, outside
        if key in self.recordings:
            self.fruitless = 0
            return self.recordings[key](images, target)
        self.calls[key] = self.calls.get(key, 0) + 1
        full = self.gives_up and len(self.recordings) >= self.recorder.most
        if self.calls[key] <= WARM_UP or full:
            return ordinary()
        return self._record(key, function, images, target)

    def _record(self, key, function, images, target):
        """Record a call, and return its result."""
        try:
            found, result = self.recorder.record(function, images, target)
        except CannotRecord as error:
            if not self.gives_up:
                raise
            self._give_up(str(error))
            for p in self.parameters:  # gradients of the call that was broken off
                p.grad = None
            return self.recorder.run(lambda: function(images, target))
        if isinstance(found, str):
            if not self.gives_up:
                text = f"a step of this network cannot be recorded, {found}"
                raise CannotRecord(f"record_steps: {text}; train with record_steps=False")
            self._give_up(found)
        else:
            self.recordings[key] = found
        return result

    def _give_up(self, reason):
        self.reason = reason
        if self.recorder.warns:
            warnings.warn(f"steps are not recorded {self.recorder.name}: {reason}", stacklevel=2)

    def __str__(self):
        if self.reason:
            return f"steps are not recorded {self.recorder.name}: {self.reason}"
        return f"steps are recorded {self.recorder.name} after {WARM_UP} of a shape ({len(self.recordings)} so far)"


def _form(tensor):
    return tuple(tensor.shape), tensor.dtype, tensor.stride(), tensor.device
