"""Runs a whole training step as one CUDA graph, which is captured once for each shape of the minibatch and then replayed with a single launch.

The first steps of a shape run as usual; then one is captured. Later minibatches are copied into the tensors that the graph reads. Everything that
Python decides in a step (which blocks are trained, hooks, numbers that are not tensors) stays as it was at the capture. Learning rates are tensors
and follow their schedule. This has never run on a GPU: `make gpu` compares it with ordinary steps.
"""

import torch

WARM_UP = 3  # ordinary steps before a capture, which create optimizer state, choose cuDNN algorithms and compile Triton kernels


class StepGraph:
    """Callable that runs step(images, target) -> tuple of tensors through graphs.

    Args:
        step: the function to capture.
        recorder: Cuda, or a substitute in tests. recorder.run(function) returns function(); recorder.record(function) captures it and
            returns (replay, results), where replay() computes the results again in the same tensors.
    """

    def __init__(self, step, recorder):
        self.step, self.recorder = step, recorder
        self.calls, self.graphs = {}, {}

    def __call__(self, images, target, *state):
        """Run one step. `state` is what the captured graph depends on beside the shape, such as the index of the trained block."""
        key = (tuple(images.shape), images.dtype, images.stride(), *state)
        self.calls[key] = self.calls.get(key, 0) + 1
        if self.calls[key] <= WARM_UP:
            return self.recorder.run(lambda: self.step(images, target))
        if key not in self.graphs:
            inputs = (images.clone(), target.clone())
            self.graphs[key] = inputs, *self.recorder.record(lambda: self.step(*inputs))
        inputs, replay, results = self.graphs[key]
        for static, given in zip(inputs, (images, target), strict=True):
            static.copy_(given, non_blocking=True)
        replay()
        return tuple(t.clone() for t in results)


class Cuda:
    """Runs and captures functions on a side stream, since torch.cuda.graph cannot capture on the default stream."""

    def __init__(self, device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def run(self, function):
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            results = function()
        current.wait_stream(self.stream)
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
    """Prepare optimizers for a capture: set capturable=True and turn their learning rates into tensors.

    Args:
        optimizers: the torch.optim.Optimizers of the step.
        device: torch.device of the network.
        amp: dtype of autocast, or None.

    Raises:
        ValueError: the network is not on a GPU, `amp` is float16, or an optimizer has no option `capturable`."""
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
