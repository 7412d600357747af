"""Training: the Trainer of locally trained blocks, Backprop for comparison, data sets, and checkpoints."""

from fastff.training.backprop import Backprop
from fastff.training.fit import Diverged, Interrupted
from fastff.training.trainer import Trainer

__all__ = ["Backprop", "Diverged", "Interrupted", "Trainer"]
