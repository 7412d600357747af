"""A whole local step on a Projection in CUDA C++ (csrc/cuda/goodness.h), which reads each sample from device memory once.

A block of threads holds a sample in its shared memory, or a cluster of 2 to 8 blocks on devices of compute capability 9.0 and later. It has run on a
CPU only, thread by thread (tests/test_cuda.py), and never on a GPU."""

import functools

import torch

from fastff.kernels import cuda
from fastff.kernels.layout import is_channels_last
from fastff.kernels.native import step as native_step

MOST_CLASSES = 128  # csrc/cuda/step.h


@functools.lru_cache(maxsize=1024)
def blocks(device, B, P, C, K, bias):
    """Return how many blocks of threads hold a sample together on a CUDA device, or 0 if none can."""
    return cuda.library().fastff_goodness_blocks(device, B, P, C, K, bias)


def takes(step):
    """Return None if the kernel can take a Step whose x `cuda.reason` lets through, or the reason why not."""
    x, head, loss, norm = step.x, step.goodness, step.loss, step.normalization.name
    weight, (B, C, H, W) = head.weight, x.shape
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"the CUDA kernel is for bfloat16 and float16, x is {x.dtype}"
    if step.epilogue is not None:
        return "the CUDA kernel begins after batch norm and activation, the step has an epilogue"
    if weight is None or weight.shape[2:] != (1, 1) or head.padding != (0, 0) or head.grid_weight is not None:
        return "the CUDA kernel is for heads with a weight of kernel size 1 and without a grid"
    if head.dtype(x) != torch.float32:
        return "the CUDA kernel computes in float32, an argument is float64"
    if loss.name != "cross_entropy":
        return f"the CUDA kernel is for the loss cross_entropy, the step has {loss.name}"
    if norm not in ("none", "layer_norm"):
        return f"the CUDA kernel is for the normalizations none and layer_norm, the step has {norm}"
    if step.algorithm == "second_moment":
        return "the CUDA kernel has the direct algorithm only"
    if C % 8 or len(weight) > MOST_CLASSES:
        return f"the CUDA kernel is for channels in eights and at most {MOST_CLASSES} classes, here are {C} and {len(weight)}"
    if not is_channels_last(x) or x.data_ptr() % 16:
        return "the CUDA kernel reads x in channels_last memory that begins at a multiple of 16 bytes"
    if not blocks(x.device.index or 0, B, H * W, C, len(weight), head.bias is not None):
        return f"a sample [{C}, {H}, {W}] and {len(weight)} classes do not fit the shared memory and registers of this device"
    return None


def step(local, plan):
    """Return the StepResult of a Step, its losses not reduced."""
    return native_step.run(local)
