"""Checks of arguments that several public functions share. Each error names the argument, what was expected and what came."""

import math
from collections.abc import Iterable
from numbers import Integral, Real

import numpy as np
import torch


def plain(value):
    """Return numbers of numpy, and tensors and arrays of one element, as Python's numbers; lists and tuples element by element."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.item() if np.prod(value.shape) == 1 else value
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def kind_of(value):
    """Return what an error says that came: the dtype of a tensor, the class of anything else."""
    return value.dtype if isinstance(value, torch.Tensor) else type(value).__name__


def whole_number(name: str, value: int, least: int = 1, error: type[Exception] = ValueError) -> int:
    """Return `value` as an int. Raises `error` unless it is an integer of at least `least`; a bool is none."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise error(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return int(value)


def number_between(name: str, value: float, low: float, high: float, *, low_allowed: bool) -> float:
    """Return `value` as a float. Raises ValueError unless it lies above `low` (or on it if `low_allowed`) and below `high`."""
    inside = isinstance(value, Real) and not isinstance(value, bool)
    inside = inside and (low <= value if low_allowed else low < value) and value < high
    if not inside:
        above = "" if low == -math.inf else f" {'of at least' if low_allowed else 'above'} {low:g}"
        bounds = f"a finite number{above}" if high == math.inf else f"a number{above} and below {high:g}"
        raise ValueError(f"{name}: expected {bounds}, got {value!r}")
    return float(value)


def one_of(name: str, value, allowed: Iterable) -> None:
    """Raises ValueError unless `value` is among `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
