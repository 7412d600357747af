"""A whole training step as one CUDA graph: recorded once for each shape of the minibatch, then replayed with a single launch.

The first steps of a shape run normally; then one is recorded. Later minibatches are copied into the tensors that the graph reads. What Python
decides in a step stays as it was in the recording, so there is one for each choice of blocks, modes of modules and parameters that learn; learning
rates are tensors and follow their schedule. Hooks and other numbers of optimizers stay as they were. It has not run on a GPU yet: `make gpu`
compares it with ordinary steps.

By itself ("auto") a Session records where no reason speaks against it (`reason_against`), and prints that reason where one does.
"""

import warnings

import torch

from fastff.training.engine import StepResult

WARM_UP = 3  # ordinary steps before a recording: they create the optimizer state, let cuDNN choose its algorithms and Triton compile
MOST = 16  # recordings that "auto" makes: plans whose cuts move have more kinds of steps than are worth their memory


class StepGraph:
    """Replacement for engine.run_step that replays graphs.

    A `recorder` (Cuda below, or a test's) has run(function), which returns its result, and record(function) -> (replay, its result). `gives_up`:
    whether a step that cannot be recorded runs as it is from then on, with a warning, instead of raising. Attribute reason: why it does, or None."""

    def __init__(self, engine, recorder, gives_up=False):
        self.engine, self.recorder, self.gives_up, self.reason = engine, recorder, gives_up, None
        self.calls, self.graphs = {}, {}
        self.rates = [(group, group["lr"]) for optimizer in engine.optimizers for group in optimizer.param_groups]
        self.modules, self.parameters = list(engine.sff.modules()), list(engine.sff.parameters())

    def __call__(self, images, target, t):
        """Return the StepResult of a minibatch. A recording also depends on the segments that step t trains."""
        learned = tuple(m.training for m in self.modules), tuple(p.requires_grad for p in self.parameters)
        key = (tuple(images.shape), images.dtype, images.stride(), self.engine.segments(t), learned)
        self.calls[key] = self.calls.get(key, 0) + 1
        full = self.gives_up and len(self.graphs) >= MOST and key not in self.graphs
        if self.calls[key] <= WARM_UP or full or self.reason:
            return self.recorder.run(lambda: self.engine.run_step(images, target, t))
        for group, rate in self.rates:  # somebody may have set a number
            if group["lr"] is not rate and isinstance(rate, torch.Tensor):
                group["lr"] = rate.fill_(float(group["lr"]))
        if key not in self.graphs and not self._record(key, images, target, t):
            return self(images, target, t)
        inputs, replay, result = self.graphs[key]
        for recorded, given in zip(inputs, (images, target), strict=True):
            if given is not None:
                recorded.copy_(given, non_blocking=True)
        replay()
        losses, correct, samples = result
        return StepResult(losses.clone(), correct.clone(), samples)

    def _record(self, key, images, target, t):
        """Record a step. Returns whether that went well."""
        inputs = (images.clone(), None if target is None else target.clone())
        try:
            self.graphs[key] = inputs, *self.recorder.record(lambda: self.engine.run_step(*inputs, t))
        except RuntimeError as error:
            if not self.gives_up:
                raise
            self.reason = str(error)
            warnings.warn(f"steps are not recorded as CUDA graphs: {error}", stacklevel=2)
            for optimizer in self.engine.optimizers:  # gradients of the step that was broken off
                optimizer.zero_grad(set_to_none=True)
            return False
        return True

    def __str__(self):
        if self.reason:
            return f"steps are not recorded as CUDA graphs: {self.reason}"
        return f"steps are recorded as CUDA graphs after {WARM_UP} of a shape ({len(self.graphs)} so far)"


class Cuda:
    """Runs and records on a separate stream (torch.cuda.graph needs one that is not the default)."""

    def __init__(self, device):
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()  # of all recordings: one at a time is replayed

    def run(self, function):
        here = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            results = function()
        here.wait_stream(self.stream)
        return results

    def record(self, function):
        graph = torch.cuda.CUDAGraph()
        try:
            # other threads, such as a loader's that pins memory, may call CUDA meanwhile
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                results = function()
        except RuntimeError as error:
            raise RuntimeError(
                f"cuda_graph: a step of this network cannot be recorded, something in it waits for the device or moves data from the "
                f"host ({str(error).splitlines()[0]}); train with cuda_graph=False"
            ) from error
        return graph.replay, results


def reason_against(engine, amp):
    """Return why the steps of an engine cannot be recorded, or None. amp: a dtype or None."""
    if engine.device.type != "cuda":
        return f"expected a network on a CUDA device, got it on {engine.device.type}"
    if engine.place.ranks.size > 1:
        return "expected False with distributed, whose ranks wait for each other, got True"
    if amp == torch.float16:
        return "expected amp None or 'bf16', since the scaling of 'fp16' decides on the host, got 'fp16'"
    for optimizer in engine.optimizers:
        if any("capturable" not in group for group in optimizer.param_groups):
            text = "expected an optimizer that can be recorded"
            return f"{text} (torch's with capturable=True: AdamW, Adam, RMSprop, ...), got {type(optimizer).__name__}"
    return None


def unknown_python(sff):
    """Return the names of blocks whose Python may do something else in every step, as far as is known (fastff/graph/plain.py)."""
    pairs = zip(sff.blocks, sff.local_blocks, strict=True)
    return [block.name for block, local in pairs if local.graph is None or local.whole()]


def prepare(engine):
    """Prepare an engine's optimizers for recording: set capturable, make their learning rates tensors."""
    for optimizer in engine.optimizers:
        for group in optimizer.param_groups:
            group["capturable"] = True
            group["lr"] = torch.tensor(float(group["lr"]), device=engine.device)


def recorded(engine, options, amp):
    """Return the StepGraph of an engine, or the reason why its steps are not recorded. Raises ValueError if they were asked to be and cannot."""
    if options.cuda_graph is False:
        return "cuda_graph=False"
    reason = reason_against(engine, amp)
    if options.cuda_graph == "auto" and reason is None and (names := unknown_python(engine.sff)):
        reason = f"the Python of {', '.join(names[:3])} may do something else in each step; cuda_graph=True records them all the same"
    if reason and options.cuda_graph == "auto":
        return reason
    if reason:
        raise ValueError(f"cuda_graph: {reason}")
    prepare(engine)
    return StepGraph(engine, Cuda(engine.device), options.cuda_graph == "auto")
