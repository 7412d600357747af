"""Engines compute and apply training steps: LocalEngine (trainer.py) and BackpropEngine (backprop.py). Here is what they share.

The rest of the training code (session.py, fit.py, state.py, graph.py) uses this interface of an engine and nothing else:

    run_step(images, target)    trains on a minibatch [B, ...], [B] on the device; returns StepResult and waits for no device
    train_mode()                puts what is trained into training mode, the rest into evaluation mode
    scores(images)              {name: [B, K]}, whose accuracies `evaluate` returns
    sff, device                 the fastff.SFF that is trained, where it is
    module                      whose state_dict a checkpoint holds
    names, scalers              of the L losses: their names, and GradScaler or None
    optimizers                  all of them, in the order of the checkpoint
    place                       what this rank trains, and what it waits for (place.py)
    phases, phase               passes of `epochs` in fit (1, or one per trained block if schedule="greedy"); the present one, from 0
"""

import contextlib
from dataclasses import dataclass
from typing import NamedTuple

import torch

AMP = {None: None, "bf16": torch.bfloat16, "fp16": torch.float16}


class StepResult(NamedTuple):
    """Result of a training step: losses [L], right answers [L] (both 0 for a block not trained, or not here), samples of this rank."""

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
        cuda_graph: record the whole step as a CUDA graph (graph.py) and replay it; CUDA only, with an optimiser that can be captured.

    Raises ValueError."""

    micro_batches: int = 1
    amp: str | None = None
    clip_grad_norm: float | None = None
    compile: bool = False
    cuda_graph: bool = False

    def __post_init__(self):
        if not isinstance(self.micro_batches, int) or self.micro_batches < 1:
            raise ValueError(f"micro_batches: expected a whole number of at least 1, got {self.micro_batches!r}")
        if self.amp not in AMP:
            raise ValueError(f"amp: expected None, 'bf16' or 'fp16', got {self.amp!r}")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
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


def check_batch(sff, images, target, amp=False):
    """Raise TypeError or ValueError unless images [B, *sff.input_shape] and target [B] make a minibatch. amp: whether autocast is on in any case."""
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        raise TypeError(f"images: expected a floating-point tensor, got {_kind(images)}")
    dtype, autocast = next(sff.parameters()).dtype, amp or torch.is_autocast_enabled(images.device.type)
    if images.dtype != dtype and not (
        autocast and torch.float64 not in (images.dtype, dtype)
    ):  # which it leaves as it is
        raise TypeError(f"images: expected {dtype} as the model's parameters are, got {images.dtype}")
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target: expected int64 labels, got {_kind(target)}")
    sff.check_images(images)
    if len(images) == 0:
        raise ValueError("images: expected at least one image, got an empty batch")
    if target.shape != (len(images),):
        raise ValueError(f"target: expected one label for each of {len(images)} images, got {list(target.shape)}")


def _kind(value):
    return value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
