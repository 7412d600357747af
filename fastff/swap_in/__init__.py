"""Tools for existing code: `accelerate` replaces the parts of a module that fastff has a kernel for, `verify` compares two modules."""

from fastff.swap_in.accelerate import Report, accelerate
from fastff.swap_in.verify import Verification, verify

__all__ = ["Report", "Verification", "accelerate", "verify"]
