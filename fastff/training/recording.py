"""Steps of an engine that are recorded and replayed: on a CPU as a list of operators, on a GPU as a CUDA graph, which is a single launch.

Updates on a CPU are no part of a recording, which calls them (fastff/graph/operators.py). In a CUDA graph they are: learning rates are tensors and
follow their schedule, while hooks and other numbers of optimizers stay as they were. CUDA graphs have not run on a GPU yet: `make gpu` compares
them with ordinary steps.

By itself ("auto") a Session records where no reason speaks against it (`reason_against`), and prints that reason where one does.
"""

import contextlib
import functools

import torch

from fastff.arguments import first_line
from fastff.graph.operators import Operators
from fastff.graph.recording import CannotRecord, Recorded
from fastff.training.engine import StepResult


class Cuda:
    """Runs and records on a separate stream (torch.cuda.graph needs one that is not the default)."""

    # plans whose cuts move have more kinds of steps than are worth their memory
    name, most, warns, changes = "as CUDA graphs", 16, True, 0

    def __init__(self, device, optimizers):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()  # of all recordings: one at a time is replayed
        self.rates = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]

    def ready(self):
        for group, rate in self.rates:  # somebody may have set a number
            if group["lr"] is not rate:
                group["lr"] = rate.fill_(float(group["lr"]))
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
        here = torch.cuda.current_stream(self.device)
        try:
            # other threads, such as a loader's that pins memory, may call CUDA meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = function(*inputs)
        except RuntimeError as error:
            # where its end fails, too, torch.cuda.graph leaves its own stream the current one
            torch.cuda.set_stream(here)
            # and in PyTorch 2.11 the generator's state waits for that end, and refuses to draw
            generator = torch.cuda.default_generators[self.device.index]
            generator.graphsafe_set_state(generator.clone_state())
            raise CannotRecord(
                f"cuda_graph: a step of this network cannot be recorded, something in it waits for the device or moves data from the "
                f"host ({first_line(error.__context__ or error)}); train with cuda_graph=False"
            ) from error

        def replay(images, target):
            for recorded, given in zip(inputs, (images, target), strict=True):
                if given is not None:
                    recorded.copy_(given, non_blocking=True)
            graph.replay()
            return StepResult(result.losses.clone(), result.correct.clone(), result.samples)

        return replay, replay(images, target)


def unknown_python(sff):
    """Return the names of blocks whose Python may do something else in every step, as far as is known (fastff/graph/plain.py)."""
    pairs = zip(sff.blocks, sff.local_blocks, strict=True)
    return [block.name for block, local in pairs if local.graph is None or local.whole()]


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
            group["lr"] = torch.tensor(float(group["lr"]), dtype=torch.float32, device=engine.device)


def recorded(engine, options, amp):
    """Return the Recorded of an engine's steps, or the reason why its steps are not recorded. Raises ValueError if they were
    asked to be and cannot."""
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
    if wanted == "auto" and reason is None and (unknown := unknown_python(engine.sff)):
        reason = f"the Python of {', '.join(unknown[:3])} may do something else in each step; {name}=True records them all the same"
    if reason and wanted == "auto":
        return reason
    if reason:
        raise ValueError(f"{name}: {reason}")
    if name == "record_steps":
        roots = engine.sff, *engine.sff.local_blocks
        recorder = Operators(
            roots, engine.sff.num_classes, engine.constants, functools.partial(_calling_updates, engine)
        )
    else:
        prepare(engine)
        recorder = Cuda(engine.device, engine.optimizers)
    # a recording also depends on the segments that step t trains
    return Recorded(engine.sff, engine.run_step, recorder, engine.segments, wanted == "auto")


@contextlib.contextmanager
def _calling_updates(engine, recording):
    """Within it, the engine's updates are made without being recorded, and the recording calls them."""
    updates = engine.update

    def update(*these):
        recording.give_gradients(p for _, _, parameters in these for p in parameters)
        recording.call(updates, *these)

    engine.update = update
    try:
        yield
    finally:
        engine.update = updates
