"""Training: the Trainer of locally trained blocks, Backprop for comparison, data sets, checkpoints and measurement of memory."""

from fastff.training.backprop import Backprop
from fastff.training.fit import Diverged, Interrupted
from fastff.training.trainer import Trainer

__all__ = ["Backprop", "Diverged", "Interrupted", "Trainer"]
