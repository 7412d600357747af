"""The compiled library: loaded once, on first use, with the reason kept where it cannot be.

It is built for several instruction sets, fastff._C_baseline, _C_avx2, _C_avx512; the widest that this processor has is loaded, or the one that
the environment variable FASTFF_CPU names.

Loading it registers the operators of csrc/cpu, whose names end in _native, under torch.ops.fastff.
"""

import importlib
import importlib.util
import os
import platform
import threading

import torch

LEVELS = ("baseline", "avx2", "avx512")  # instruction sets, as in setup.py
NOT_BUILT = "the compiled library was not built: reinstall fastff with pip install --no-build-isolation beside torch and a C++ compiler"

_lock = threading.Lock()
_reason: str | None = None  # None before the first attempt, then "" (loaded) or why not
_without_vectors = _avx512 = False  # once loaded: x86 without AVX2; with AVX-512


def reason() -> str:
    """Why the compiled library is not available, in one line; empty if it is. The first call loads it."""
    global _reason
    if _reason is None:
        with _lock:
            if _reason is None:
                _reason = _load()
    return _reason


def level() -> str:
    """The instruction set of the library for this processor: FASTFF_CPU, or the widest. Raises ValueError for one that it does not have."""
    capability = torch.backends.cpu.get_cpu_capability()
    here = LEVELS[: {"AVX512": 3, "AVX2": 2}.get(capability, 1)]
    wanted = os.environ.get("FASTFF_CPU") or here[-1]
    if wanted not in here:
        raise ValueError(f"FASTFF_CPU: expected one of {', '.join(here)} on this processor, got {wanted!r}")
    return wanted


def takes(*dtypes, empty=True):
    """Return a predicate of tables of ops: why the kernels, which are for these dtypes (all four without any), cannot run for x, or None."""
    names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)

    def can_run(x) -> str | None:
        if not x.is_cpu:
            return f"the compiled kernel runs on the CPU, x is on {x.device.type}"
        if dtypes and x.dtype not in dtypes:
            return f"the compiled kernel is for {names}, x is {x.dtype}"
        if not empty and x.numel() == 0:
            return "x is empty"
        return reason() or None

    return can_run


def has_avx512() -> bool:
    """Whether the library that is loaded is the one for AVX-512."""
    return reason() == "" and _avx512


def slow(x) -> str | None:
    """Why "auto" passes the kernels with products over: their register blocks are made for vectors of 8 (or 32 registers, as ARM has)."""
    return "slower than PyTorch without AVX2" if reason() == "" and _without_vectors else None


def _load() -> str:
    global _without_vectors, _avx512
    if os.environ.get("FASTFF_NATIVE") == "0":
        return "disabled by FASTFF_NATIVE=0"
    try:
        name = level()
    except ValueError as error:
        return str(error)
    if importlib.util.find_spec(f"fastff._C_{name}") is None:
        return NOT_BUILT
    try:
        importlib.import_module(f"fastff._C_{name}")
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return f"fastff._C_{name} failed to load with torch {torch.__version__}: {lines[0]}"
    _avx512 = name == "avx512"
    _without_vectors = name == "baseline" and platform.machine() in ("x86_64", "AMD64")
    return ""
