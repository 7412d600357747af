"""Training: the block-local Trainer, Backprop on the same loop, data, checkpoints, memory measurement."""

from fastff.training.backprop import Backprop
from fastff.training.loop import Diverged, Interrupted
from fastff.training.trainer import Trainer

__all__ = ["Backprop", "Diverged", "Interrupted", "Trainer"]
