"""Peak memory of a step: what it allocates above what was there when it started (parameters, optimiser state)."""

import contextlib
import os
import sys

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(step, device="cpu"):
    """MiB allocated above the starting point at the peak of one call of step().

    On a GPU from the caching allocator's counters; on the CPU from PyTorch's allocations as the profiler records them
    (every allocation and release, so nothing falls between samples). Scratch memory that oneDNN takes from the system
    by itself is not in it, and that older memory is freed inside step() goes unseen there. What step() leaves allocated
    counts. Call it after two warm-up steps: the optimiser's state exists then and gradients do not, so that the
    starting point is parameters, their optimiser state and the minibatch.
    """
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
    for event in sorted(events, key=lambda event: event.start_ns()):  # stable: events of one moment keep their order
        now += event.nbytes()
        peak = max(peak, now)
    return peak / 2**20


@contextlib.contextmanager
def _quiet_stderr():
    """The profiler's C++ part writes notes about itself to file descriptor 2, where a live display may stand."""
    try:
        sys.stderr.flush()
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except (OSError, AttributeError):  # a process without stderr
        yield
        return
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
