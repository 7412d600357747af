"""Checks of the arguments that the model constructors share."""

from collections.abc import Iterable
from numbers import Integral, Real


def positive_int(name: str, value: int) -> int:
    """Return `value`; raises ValueError naming the argument unless it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")
    return int(value)


def number_between(name: str, value: float, low: float, high: float, *, low_allowed: bool) -> float:
    """Return `value`; raises ValueError naming the argument unless it lies between `low` and `high` (exclusive)."""
    inside = isinstance(value, Real) and not isinstance(value, bool)
    inside = inside and (low <= value if low_allowed else low < value) and value < high
    if not inside:
        bounds = f"{'at least' if low_allowed else 'above'} {low:g} and below {high:g}"
        raise ValueError(f"{name}: expected a number {bounds}, got {value!r}")
    return float(value)


def one_of(name: str, value, allowed: Iterable) -> None:
    """Raises ValueError naming the argument unless `value` is among `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")
