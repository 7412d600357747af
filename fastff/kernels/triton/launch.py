"""What every launch of a Triton kernel needs: the device, and arguments bundled into named tuples.

Triton (3.4 and later) takes named tuples as kernel arguments and hands them on to device functions: a field is a pointer, a number, None, or a
constant (`constants`), and each is specialised as an argument of its own would be. Subclasses of named tuples lose their names in it, and a
constant that a device function returns is no longer one.
"""

import torch
import triton.language as tl

# Tiles that a program adds up one after another, at most: the error of a sum does not grow with the number of positions or samples.
MOST = 256


def multiprocessors(device):
    """Number of multiprocessors of a GPU (4 for the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def float32_precision():
    """Input precision of products of float32 matrices: TF32 where PyTorch's own on a GPU are in it, however that was asked for.

    (`allow_tf32` cannot be read any more once TF32 was set by `fp32_precision`.)"""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def shares(count, programs, times=1):
    """(share, programs): `count` things divided among programs, each of which takes `share` of them, at most MOST times `times`."""
    share = min(-(-count // max(1, min(programs, count))), times * MOST)
    return share, -(-count // share)


def on_device(x):
    """Context in which kernels start on the device of x."""
    return torch.cuda.device_of(x) if x.is_cuda else torch.no_grad()


def constants(config):
    """The named tuple with its fields as compile-time constants of a kernel."""
    return type(config)(*(None if value is None else tl.constexpr(value) for value in config))
