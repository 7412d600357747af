"""Measures the peak memory of a step: what it allocates in addition to what is allocated when it starts (parameters, optimizer state)."""

import contextlib
import os
import sys

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(step, device="cpu"):
    """Return the peak of the memory that one call of step() allocates, in MiB above what was allocated before.

    On a GPU, the number comes from the counters of the caching allocator. On a CPU, it comes from the profiler, which
    records every allocation and release of PyTorch. This leaves out the scratch memory that oneDNN allocates by itself,
    and memory from before the call that step() frees. Memory that step() leaves allocated counts.

    Call this after two warm-up steps. Then the optimizer's state exists and gradients do not, so that parameters,
    optimizer state and the minibatch are what is allocated before.

    Args:
        step: function without arguments.
        device: the device whose memory is measured."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(
        events, key=lambda event: event.start_ns()
    ):  # the sort is stable: simultaneous events keep their order
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**20


@contextlib.contextmanager
def _quiet_stderr():
    """Redirect file descriptor 2 to nothing: the profiler's C++ code writes messages to it, which would disturb a live display."""
    try:
        sys.stderr.flush()
        saved, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except (OSError, AttributeError):  # a process without stderr
        yield
        return
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(devnull)
