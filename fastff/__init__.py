"""fastff: convolutional networks trained block by block with the Scalable Forward-Forward algorithm (arXiv 2501.03176)."""

from importlib import import_module

from fastff import functional, models, nn
from fastff.sff import SFF
from fastff.swap_in import accelerate, verify

__version__ = "0.1.0"
__all__ = ["SFF", "Backprop", "Trainer", "accelerate", "functional", "models", "nn", "verify"]


def __getattr__(name):
    """Trainer and Backprop on first use: what only looks at kernels need not load the training code."""
    if name in ("Trainer", "Backprop"):
        return getattr(import_module("fastff.training"), name)
    raise AttributeError(f"module 'fastff' has no attribute {name!r}")
