"""A whole training step recorded once for each shape of the minibatch, then replayed without the Python of an ordinary one.

On a GPU it is a CUDA graph, a single launch (Cuda, below); on a CPU a list of operators (operators.py). The first steps of a shape run normally;
then one is recorded. What Python decides in a step stays as it was in the recording, so there is one for each choice of blocks, modes of modules and
parameters that learn. In a CUDA graph learning rates are tensors and follow their schedule, while hooks and other numbers of optimizers stay as they
were. CUDA graphs have not run on a GPU yet: `make gpu` compares them with ordinary steps.

By itself ("auto") a Session records where no reason speaks against it (`reason_against`), and prints that reason where one does.
"""

import os
import warnings

import torch

from fastff.training.engine import StepResult
from fastff.training.operators import Operators

WARM_UP = 3  # ordinary steps before a recording: they create the optimizer state, let cuDNN choose its algorithms and Triton compile
FRUITLESS = 16  # changes of the network in a row that leave no time for a replay, after which "auto" records no more


class CannotRecord(RuntimeError):
    """A step that was begun cannot be recorded."""


class RecordedStep:
    """Replacement for engine.run_step that replays recordings.

    A `recorder` (Cuda, Operators, or a test's) has

        run(function)                       runs an ordinary step and returns its result
        record(function, images, target)    runs function(images, target) -> StepResult and returns (replay, its result), where replay is such a
                                            function too, or the reason why there is none
        ready()                             whether this step may be recorded or replayed
        changes                             a count: recordings made at another do not hold
        name, most, warns                   how it records, as print(trainer) says it; how often "auto" lets it; whether to warn where it cannot

    `gives_up`: whether steps that cannot be recorded run as they are from then on instead of raising CannotRecord. Attribute
    reason: why they do, or None."""

    def __init__(self, engine, recorder, gives_up=False):
        self.engine, self.recorder, self.gives_up, self.reason = engine, recorder, gives_up, None
        self.calls, self.recordings, self.changes, self.fruitless = {}, {}, recorder.changes, 0
        self.rates = [(group, group["lr"]) for optimizer in engine.optimizers for group in optimizer.param_groups]
        self.modules, self.parameters = list(engine.sff.modules()), list(engine.sff.parameters())

    def __getstate__(self):
        return vars(self) | {"calls": {}, "recordings": {}}  # a copy records steps of its own

    def __call__(self, images, target, t):
        """Return the StepResult of a minibatch. A recording also depends on the segments that step t trains."""
        function = lambda images, target: self.engine.run_step(images, target, t)  # noqa: E731
        ordinary = lambda: self.recorder.run(lambda: function(images, target))  # noqa: E731
        if self.reason or not self.recorder.ready():
            return ordinary()
        if self.recorder.changes > self.changes:
            self.changes, self.fruitless = self.recorder.changes, self.fruitless + 1
            self.calls.clear()
            self.recordings.clear()
            if self.fruitless > FRUITLESS and self.gives_up:
                self._give_up("the network changes too often")
        learned = tuple(m.training for m in self.modules), tuple(p.requires_grad for p in self.parameters)
        outside = torch.get_num_threads(), os.environ.get("FASTFF_IMPL"), target is not None and target.stride()
        key = (tuple(images.shape), images.dtype, images.stride(), self.engine.segments(t), learned, outside)
        self.calls[key] = self.calls.get(key, 0) + 1
        full = self.gives_up and len(self.recordings) >= self.recorder.most and key not in self.recordings
        if self.calls[key] <= WARM_UP or full:
            return ordinary()
        for group, rate in self.rates:  # somebody may have set a number
            if group["lr"] is not rate and isinstance(rate, torch.Tensor):
                group["lr"] = rate.fill_(float(group["lr"]))
        if key in self.recordings:
            self.fruitless = 0
            return self.recordings[key](images, target)
        return self._record(key, function, images, target)

    def _record(self, key, function, images, target):
        """Record a step, and return its result."""
        try:
            replay, result = self.recorder.record(function, images, target)
        except CannotRecord as error:
            if not self.gives_up:
                raise
            self._give_up(str(error))
            for optimizer in self.engine.optimizers:  # gradients of the step that was broken off
                optimizer.zero_grad(set_to_none=True)
            return self.recorder.run(lambda: function(images, target))
        if isinstance(replay, str):
            if not self.gives_up:
                raise CannotRecord(
                    f"record_steps: a step of this network cannot be recorded, {replay}; train with record_steps=False"
                )
            self._give_up(replay)
        else:
            self.recordings[key] = replay
        return result

    def _give_up(self, reason):
        self.reason = reason
        if self.recorder.warns:
            warnings.warn(f"steps are not recorded {self.recorder.name}: {reason}", stacklevel=2)

    def __str__(self):
        if self.reason:
            return f"steps are not recorded {self.recorder.name}: {self.reason}"
        return f"steps are recorded {self.recorder.name} after {WARM_UP} of a shape ({len(self.recordings)} so far)"


class Cuda:
    """Runs and records on a separate stream (torch.cuda.graph needs one that is not the default)."""

    # plans whose cuts move have more kinds of steps than are worth their memory
    name, most, warns, changes = "as CUDA graphs", 16, True, 0

    def __init__(self, device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()  # of all recordings: one at a time is replayed

    def ready(self):
        return True

    def run(self, function):
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            results = function()
        here.wait_stream(self.stream)
        return results

    def record(self, function, images, target):
        graph, inputs = torch.cuda.CUDAGraph(), (images.clone(), None if target is None else target.clone())
        try:
            # other threads, such as a loader's that pins memory, may call CUDA meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = function(*inputs)
        except RuntimeError as error:
            raise CannotRecord(
                f"cuda_graph: a step of this network cannot be recorded, something in it waits for the device or moves data from the "
                f"host ({str(error).splitlines()[0]}); train with cuda_graph=False"
            ) from error

        def replay(images, target):
            for recorded, given in zip(inputs, (images, target), strict=True):
                if given is not None:
                    recorded.copy_(given, non_blocking=True)
            graph.replay()
            return StepResult(result.losses.clone(), result.correct.clone(), result.samples)

        return replay, replay(images, target)


def reason_against(engine, amp):
    """Return why the steps of an engine cannot be recorded, or None. amp: a dtype or None."""
    if engine.place.ranks.size > 1:
        return "expected False with distributed, whose ranks wait for each other, got True"
    if amp == torch.float16:
        return "expected amp None or 'bf16', since the scaling of 'fp16' decides on the host, got 'fp16'"
    if engine.device.type == "cpu":
        if engine.options.compile:
            return "expected False with compile=True, whose kernels are not PyTorch's operators, got True"
        if engine.checkpointing:
            return "expected False with checkpointing, which sets random states, got True"
        return None
    for optimizer in engine.optimizers:
        if any("capturable" not in group for group in optimizer.param_groups):
            text = "expected an optimizer that can be recorded"
            return f"{text} (torch's with capturable=True: AdamW, Adam, RMSprop, ...), got {type(optimizer).__name__}"
    return None


def prepare(engine):
    """Prepare an engine's optimizers for recording: set capturable, make their learning rates tensors."""
    for optimizer in engine.optimizers:
        for group in optimizer.param_groups:
            group["capturable"] = True
            group["lr"] = torch.tensor(float(group["lr"]), device=engine.device)


def recorded(engine, options, amp):
    """Return the RecordedStep of an engine, or the reason why its steps are not recorded. Raises ValueError if they were asked to be and cannot."""
    names = {"cpu": "record_steps", "cuda": "cuda_graph"}
    for kind, name in names.items():
        if getattr(options, name) is True and engine.device.type != kind:
            raise ValueError(f"{name}: expected a network on a {kind.upper()} device, got it on {engine.device.type}")
    if engine.device.type not in names:
        return f"expected a network on a CPU or a CUDA device, got it on {engine.device.type}"
    name = names[engine.device.type]
    wanted = getattr(options, name)
    if wanted is False:
        return f"{name}=False"
    if wanted == "auto" and name == "record_steps" and not engine.recording_pays:
        return "it would gain nothing; record_steps=True records them all the same"
    reason = reason_against(engine, amp)
    if wanted == "auto" and reason is None and (unknown := engine.unknown_python()):
        reason = f"the Python of {', '.join(unknown[:3])} may do something else in each step; {name}=True records them all the same"
    if reason and wanted == "auto":
        return reason
    if reason:
        raise ValueError(f"{name}: {reason}")
    if name == "record_steps":
        return RecordedStep(engine, Operators(engine), wanted == "auto")
    prepare(engine)
    return RecordedStep(engine, Cuda(engine.device), wanted == "auto")
