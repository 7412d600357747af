"""Training: the block-local Trainer, Backprop with the same loop, data, checkpoints, memory measurement."""

from fastff.training.backprop import Backprop
from fastff.training.fit import Diverged, Interrupted
from fastff.training.trainer import Trainer

__all__ = ["Backprop", "Diverged", "Interrupted", "Trainer"]
