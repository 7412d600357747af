"""Checks of arguments that several public functions share. Each error names the argument, what was expected and what came."""

import contextlib
import contextvars
import math
from numbers import Integral, Real

import numpy as np
import torch

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def plain(value):
    """Return numbers of numpy, and tensors and arrays of one element, as Python's numbers; lists and tuples element by element."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return value.item() if np.prod(value.shape) == 1 else value
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value


def kind_of(value):
    """Return what an error says that came: the dtype of a tensor, the class of anything else."""
    return value.dtype if isinstance(value, torch.Tensor) else type(value).__name__


def described(value):
    """Return what an error says that came: the shape and dtype of a tensor, the class of anything else."""
    return f"{list(value.shape)} of {value.dtype}" if isinstance(value, torch.Tensor) else type(value).__name__


def first_line(error):
    """Return the first line of what an exception says, or its class if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def whole_number(name: str, value: int, least: int = 1, error: type[Exception] = ValueError) -> int:
    """Return `value` as an int. Raises `error` unless it is an integer of at least `least`; a bool is none."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise error(f"{name}: expected a whole number of at least {least}, got {value!r}")
    return int(value)


def number_between(name: str, value: float, low: float, high: float, *, low_allowed: bool) -> float:
    """Return `value` as a float. Raises ValueError unless it lies above `low` (or on it if `low_allowed`) and below `high`."""
    # the usual classes first: Real alone takes 1 us
    inside = isinstance(value, (float, int, Real)) and not isinstance(value, bool)
    inside = inside and (low <= value if low_allowed else low < value) and value < high
    if not inside:
        above = "" if low == -math.inf else f" {'of at least' if low_allowed else 'above'} {low:g}"
        bounds = f"a finite number{above}" if high == math.inf else f"a number{above} and below {high:g}"
        raise ValueError(f"{name}: expected {bounds}, got {value!r}")
    return float(value)


def canonical_x(x, channel_dim=1, called="x"):
    """Check x and view it as [B, C, H, W]; the first dimensions of positions are joined."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{called}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{called}: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if not 2 <= x.dim() <= 5:
        expected = "[B, C], [B, C, L], [B, C, H, W], [B, C, T, H, W] or tokens"
        raise ValueError(f"{called}: expected {expected}, got shape {list(x.shape)}")
    if channel_dim not in (1, -1, x.dim() - 1):
        raise ValueError(f"channel_dim: expected 1 or -1, got {channel_dim!r}")
    if x.dim() == 2:
        return x[:, :, None, None]
    x = x if channel_dim == 1 else x.movedim(-1, 1)
    return x[:, :, None, :] if x.dim() == 3 else x.flatten(2, -2)


def restore(y, x, channel_dim=1):
    """View y [B, C, H, W] as x was before `canonical_x`. None stays None."""
    if y is None or x.dim() == 4 and channel_dim == 1:
        return y
    if x.dim() == 2:
        return y[:, :, 0, 0]
    positions = x.shape[2:] if channel_dim == 1 else x.shape[1:-1]
    y = y[:, :, 0, :] if x.dim() == 3 else y.unflatten(2, positions[:-1])
    return y if channel_dim == 1 else y.movedim(1, -1)


def check_member(called, value, names):
    """Raise ValueError unless value is one of the names; a None among them is allowed, and not named."""
    if value not in names:
        raise ValueError(f"{called}: expected one of {', '.join(filter(None, names))}, got {value!r}")


def check_flags(**flags):
    """Raise TypeError unless each argument is True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_goodness(g):
    """Raise TypeError or ValueError unless g is goodness, a floating-point tensor of two dimensions."""
    if not isinstance(g, torch.Tensor) or g.dtype not in DTYPES:
        raise TypeError(f"g: expected a floating-point tensor, got {kind_of(g)}")
    if g.dim() != 2:
        raise ValueError(f"g: expected [B, K], got {list(g.shape)}")


def check_not_empty(x, called="x"):
    """Raise ValueError for x [B, C, H, W] without channels or positions."""
    if 0 in x.shape[1:]:
        raise ValueError(f"{called}: expected at least one channel and one position, got shape {list(x.shape)}")


def check_target(target, x, called="x"):
    """Raise TypeError or ValueError unless target has a class label for each sample of x, on its device."""
    if not isinstance(target, torch.Tensor) or target.dtype != torch.int64:
        raise TypeError(f"target: expected int64 class labels, got {kind_of(target)}")
    if target.shape != x.shape[:1]:
        raise ValueError(f"target: expected [{x.shape[0]}], one label per sample, got {list(target.shape)}")
    if x.shape[0] == 0:
        expected = "at least one sample, since the loss of none is undefined"
        raise ValueError(f"{called}: expected {expected}, got an empty batch")
    if target.device != x.device:
        raise ValueError(f"target: expected on {x.device} as {called} is, got {target.device}")


_checked = contextvars.ContextVar("_checked", default=False)


@contextlib.contextmanager
def labels_checked():
    """Within it, `check_labels` looks at nothing: the caller has."""
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def check_labels(target, num_classes):
    """Raise ValueError for labels out of range on a CPU. On a GPU the host would wait for them: there they make the loss NaN."""
    if target.device.type == "cpu" and target.numel() and not _checked.get():
        low, high = (int(v) for v in target.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(f"target: expected labels in 0..{num_classes - 1}, got {low if low < 0 else high}")
