"""A whole training step as one CUDA graph: recorded once for each shape of the minibatch, then replayed with a single launch.

The first steps of a shape run normally; then one is recorded. Later minibatches are copied into the tensors that the graph reads. What
Python decides in a step (which blocks are trained, hooks, numbers that are not tensors) stays as it was in the recording; learning rates are
tensors and follow their schedule. It has not run on a GPU yet: `make gpu` compares it with ordinary steps.
"""

import torch

from fastff.training.engine import StepResult

WARM_UP = 3  # ordinary steps before a recording: they create the optimiser state, let cuDNN choose its algorithms and Triton compile


class StepGraph:
    """Replacement for engine.run_step that replays graphs.

    A `recorder` (Cuda below, or a test's) has run(function), which returns its result, and record(function) -> (replay, its result)."""

    def __init__(self, engine, recorder):
        self.engine, self.recorder = engine, recorder
        self.calls, self.graphs = {}, {}

    def __call__(self, images, target, t):
        """Return the StepResult of a minibatch. A recording also depends on the segments that step t trains."""
        key = (tuple(images.shape), images.dtype, images.stride(), self.engine.segments(t))
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= WARM_UP:
            return self.recorder.run(lambda: self.engine.run_step(images, target, t))
        if key not in self.graphs:
            inputs = (images.clone(), None if target is None else target.clone())
            self.graphs[key] = inputs, *self.recorder.record(lambda: self.engine.run_step(*inputs, t))
        inputs, replay, result = self.graphs[key]
        for recorded, given in zip(inputs, (images, target), strict=True):
            if given is not None:
                recorded.copy_(given, non_blocking=True)
        replay()
        losses, correct, samples = result
        return StepResult(losses.clone(), correct.clone(), samples)


class Cuda:
    """Runs and records on a separate stream (torch.cuda.graph needs one that is not the default)."""

    def __init__(self, device):
        self.device, self.stream = device, torch.cuda.Stream(device)

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
            with torch.cuda.graph(graph, stream=self.stream):
                results = function()
        except RuntimeError as error:
            raise RuntimeError(
                f"cuda_graph: a step of this network cannot be recorded, something in it waits for the device or moves data from the "
                f"host ({str(error).splitlines()[0]}); train with cuda_graph=False"
            ) from error
        return graph.replay, results


def prepare(optimizers, device, amp):
    """Prepare optimisers for recording: set capturable, make their learning rates tensors. Raises ValueError if that is impossible."""
    if device.type != "cuda":
        raise ValueError(f"cuda_graph: expected a network on a CUDA device, got it on {device.type}")
    if amp == torch.float16:
        raise ValueError(
            "cuda_graph: expected amp None or 'bf16', since the scaling of 'fp16' decides on the host, got 'fp16'"
        )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "capturable" not in group:
                name = type(optimizer).__name__
                raise ValueError(
                    f"cuda_graph: expected an optimizer that can be recorded (torch's with capturable=True: AdamW, Adam, RMSprop, ...), got {name}"
                )
            group["capturable"] = True
            group["lr"] = torch.tensor(float(group["lr"]), device=device)
