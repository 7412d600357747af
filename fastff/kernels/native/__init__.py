"""The compiled library fastff._C: loaded once, on first use, with the reason kept where it cannot be.

Loading it registers the operators of csrc/ under torch.ops.fastff, and here the shape function of the first
(the others are called by ops that have their own):

    layer_norm_native(Tensor x, float eps) -> Tensor        csrc/cpu/layer_norm.cpp
    goodness_native(...)                                    csrc/cpu/goodness.cpp
    tail_native(...)                                        csrc/cpu/tail.cpp
    convolution_weight_gradient_native(...)                 csrc/cpu/convolution.cpp
"""

import importlib
import importlib.util
import os
import threading

import torch

NOT_BUILT = (
    "fastff._C was not built: reinstall fastff with pip install --no-build-isolation beside torch and a C++ compiler"
)

_lock = threading.Lock()
_reason: str | None = None  # None before the first attempt, then "" (loaded) or why not


def reason() -> str:
    """Why the compiled library is not available, in one line; empty if it is. The first call loads it."""
    global _reason
    if _reason is None:
        with _lock:
            if _reason is None:
                _reason = _load()
    return _reason


def _load() -> str:
    if os.environ.get("FASTFF_NATIVE") == "0":
        return "disabled by FASTFF_NATIVE=0"
    if importlib.util.find_spec("fastff._C") is None:
        return NOT_BUILT
    try:
        importlib.import_module("fastff._C")
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return f"fastff._C failed to load with torch {torch.__version__}: {lines[0]}"
    torch.library.register_fake("fastff::layer_norm_native", _layer_norm_native_fake)
    return ""


def _layer_norm_native_fake(x: torch.Tensor, eps: float) -> torch.Tensor:
    torch._check(
        x.dim() >= 2, lambda: f"layer_norm_native: x must be [B, ...] with at least 2 dimensions, got {x.dim()}"
    )
    if x.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    expected = 1
    for stride, size in sorted((x.stride(d), x.size(d)) for d in range(1, x.dim()) if x.size(d) != 1):
        if stride != expected:
            expected = 0
            break
        expected *= size
    # as in csrc: samples that fill one run of memory keep their strides, and are packed one after the other
    if expected == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.new_empty_strided(x.shape, (expected, *x.stride()[1:]))
