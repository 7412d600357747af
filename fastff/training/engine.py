"""Engines compute and apply training steps: LocalEngine (trainer.py) and BackpropEngine (backprop.py). Here is what they share.

The rest of the training code (session.py, fit.py, state.py, recording.py) uses this interface of an engine and nothing else:

    run_step(images, target, t) trains on a minibatch [B, ...], [B] on the device, in step t from 0; returns StepResult and waits for no device
    segments(t)                 what step t trains (fastff/plan.py)
    set_progress(schedule, p)   sets the learning rates for a step that ends at p, in 0..1 of fit
    labelled                    whether a minibatch has a target; otherwise it is None, and the images are positive ones, then negative ones
    train_mode()                puts what is trained into training mode, blocks that are not trained into evaluation mode
    counted(t)                  [L], 1 for the losses that this rank computes in step t, else 0
    scores(images)              {name: [B, K]}, whose accuracies `evaluate` returns
    classifies                  whether there are classes, for which `scores` has a column each
    sff, device                 the fastff.SFF that is trained, where it is
    module                      whose state_dict a checkpoint holds
    names, scalers              of the L losses: their names, and GradScaler or None
    optimizers                  all of them, in the order of the checkpoint
    place                       what this rank trains, and what it waits for (place.py)
    options, update             Options; optim.Updates, which every update of parameters goes through
    checkpointing               whether the forward pass runs again in the backward pass
    recording_pays              whether steps are recorded on a CPU without being asked to be
    constants()                 tensors that every step reads, beside parameters and buffers
    phases, phase               passes of `epochs` in fit (1, or one per trained block if schedule="greedy"); the present one, from 0
"""

import contextlib
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch

from fastff.arguments import plain, whole_number

AMP = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepResult(NamedTuple):
    """Result of a training step: losses [L], right answers [L] (both 0 for a block not trained, or not here), samples of this rank.

    Right answers are NaN where there are no labels."""

    losses: torch.Tensor
    correct: torch.Tensor
    samples: int


@dataclass(frozen=True)
class Options:
    """How a step is computed, whatever it learns from.

    Args:
        micro_batches: number of parts that a minibatch is cut into; their gradients add up.
        amp: None, "bf16" or "fp16" (with loss scaling): autocast of the forward passes.
        clip_grad_norm: largest norm of the gradients of an optimiser, or None.
        compile: whether to run forward passes through torch.compile.
        cuda_graph: whether to record the whole step as a CUDA graph (recording.py) after a few steps of a shape, and replay it; CUDA only, with an
            optimizer that can be captured. "auto": where that is possible; print(trainer) says whether, or why not.
        record_steps: the same on a CPU, where the operators of a step are recorded and called again without the Python around them
            (fastff/graph/operators.py); optimizers are called as ever.

    Raises ValueError."""

    micro_batches: int = 1
    amp: str | None = None
    clip_grad_norm: float | None = None
    compile: bool = False
    cuda_graph: bool | str = "auto"
    record_steps: bool | str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "micro_batches", whole_number("micro_batches", self.micro_batches))
        object.__setattr__(self, "clip_grad_norm", plain(self.clip_grad_norm))
        if self.amp not in AMP:
            raise ValueError(f"amp: expected None, 'bf16' or 'fp16', got {self.amp!r}")
        for name in ("cuda_graph", "record_steps"):
            if (value := getattr(self, name)) not in (True, False, "auto"):
                raise ValueError(f"{name}: expected True, False or 'auto', got {value!r}")
        clip = self.clip_grad_norm
        if clip is not None and not (isinstance(clip, Real) and clip > 0):
            raise ValueError(f"clip_grad_norm: expected a positive number or None, got {self.clip_grad_norm!r}")

    def autocast(self, device):
        """Return the context of a forward pass."""
        return contextlib.nullcontext() if self.amp is None else torch.autocast(device.type, AMP[self.amp])

    def scaler(self, device):
        """Return a GradScaler for "fp16", else None."""
        return torch.amp.GradScaler(device.type) if self.amp == "fp16" else None

    def compiled(self, function):
        """Return a function or module, compiled if `compile` asks for it."""
        return torch.compile(function, dynamic=False) if self.compile else function


def loss_dtype(images):
    """Return the dtype of the losses: float32, or float64 for float64 images."""
    return torch.float64 if images.dtype == torch.float64 else torch.float32


def train_mode(sff):
    """Put an SFF into training mode, unless it is: then modules that the user put into evaluation mode stay there."""
    if not (sff.training and sff.model.training):
        sff.train()
