"""Kernels in Triton, one file per op; imported when they first run, so that fastff does without Triton where there is none."""

import functools
import importlib.util
import os

import torch

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton itself sees it when it is imported


def reason(x):
    """Why no Triton kernel can take x, or None. With TRITON_INTERPRET=1 they run on the CPU, slowly: for tests."""
    if not INSTALLED:
        return "Triton is not installed"
    if x.device.type != ("cpu" if INTERPRETED else "cuda"):
        wanted = "is interpreted on the CPU (TRITON_INTERPRET=1)" if INTERPRETED else "runs on CUDA devices"
        return f"Triton {wanted}, x is on {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels are for float32, bfloat16 and float16, x is {x.dtype}"
    return device_reason(x.device) if x.is_cuda else None


@functools.cache
def device_reason(device):
    """Why no Triton kernel of ours runs on a GPU, or None."""
    if torch.version.hip:
        return "the Triton kernels are for NVIDIA's GPUs: those of AMD have less shared memory and no TF32, and nothing was checked for them"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels are for compute capability 8.0 and later"
    return None
