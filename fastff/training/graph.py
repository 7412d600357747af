"""A whole training step as one CUDA graph: recorded once for each shape of the minibatch, then replayed with a single launch.

The first steps of a shape run as they are; then one is recorded. Later minibatches are copied into the tensors that the graph reads. What
Python decides in a step (which blocks are trained, hooks, numbers that are no tensors) stays as it was at the recording; learning rates are
tensors and follow their schedule. Never run on a GPU yet: `make gpu` compares it with ordinary steps.
"""

import torch

WARM_UP = 3  # ordinary steps before a recording: optimiser state, cuDNN's choices and Triton's compilations come into being in them


class StepGraph:
    """step(images, target) -> a tuple of tensors, through graphs. A `recorder` has run(function), its result as it is, and
    record(function) -> (replay, its results): Cuda below, or a test's."""

    def __init__(self, step, recorder):
        self.step, self.recorder = step, recorder
        self.calls, self.graphs = {}, {}

    def __call__(self, images, target, *state):
        """`state`: what else a recording depends on, such as the block in training."""
        key = (tuple(images.shape), images.dtype, images.stride(), *state)
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= WARM_UP:
            return self.recorder.run(lambda: self.step(images, target))
        if key not in self.graphs:
            inputs = (images.clone(), target.clone())
            self.graphs[key] = inputs, *self.recorder.record(lambda: self.step(*inputs))
        inputs, replay, results = self.graphs[key]
        for own, given in zip(inputs, (images, target), strict=True):
            own.copy_(given, non_blocking=True)
        replay()
        return tuple(t.clone() for t in results)


class Cuda:
    """Runs and records on a stream of its own (torch.cuda.graph asks for one other than the default)."""

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
    """Make optimisers fit for recording: capturable, their learning rates tensors. Raises ValueError where that cannot be."""
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
