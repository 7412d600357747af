"""The CUDA library, fastff._C_cuda: loaded once, on first use, where there is a CUDA device, with the reason kept where it cannot be.

setup.py builds it from csrc/cuda where it finds nvcc. Loading it gives torch.ops.fastff.step_native (csrc/cpu/step.cpp) kernels on CUDA devices."""

import ctypes
import functools
import importlib

import torch

from fastff.kernels import native

NOT_BUILT = "the CUDA library was not built: reinstall fastff with pip install --no-build-isolation where there is nvcc (CUDA 12.8 or later)"


@functools.cache
def library():
    """Return the CUDA library as a ctypes.CDLL. Raises RuntimeError with the reason if it is not available."""
    if native.reason():
        raise RuntimeError(native.reason())  # it has the schema of the operator
    try:
        return ctypes.CDLL(importlib.import_module("fastff._C_cuda").__file__)
    except ModuleNotFoundError:
        raise RuntimeError(NOT_BUILT) from None
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise RuntimeError(f"fastff._C_cuda failed to load with torch {torch.__version__}: {first}") from error


def reason(x):
    """Why no CUDA kernel can take x, or None."""
    if not x.is_cuda:
        return f"the CUDA kernel runs on CUDA devices, x is on {x.device.type}"
    if torch.version.hip:
        return "the CUDA kernel is for NVIDIA's devices"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the CUDA kernel is for compute capability 8.0 and later"
    try:
        library()
    except RuntimeError as error:
        return str(error)
    return None
