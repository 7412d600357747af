"""fastff: convolutional networks trained block by block with the Scalable Forward-Forward algorithm (arXiv 2501.03176)."""

from importlib import import_module

from fastff import functional, models, nn
from fastff.sff import SFF
from fastff.swap_in import accelerate, verify

__version__ = "0.2.0"
__all__ = [
    "SFF", "Backprop", "Distributed", "RankFailed", "Trainer", "accelerate", "functional", "models", "nn", "verify",
]  # fmt: skip
LATER = {"Trainer": "training", "Backprop": "training", "Distributed": "parallel", "RankFailed": "parallel"}


def __getattr__(name):
    """Trainer and its like on first use: what only looks at kernels need not load the training code."""
    if name in LATER:
        return getattr(import_module(f"fastff.{LATER[name]}"), name)
    raise AttributeError(f"module 'fastff' has no attribute {name!r}")
