"""Measures the peak memory of a step: what it allocates in addition to what is allocated when it starts (parameters, optimizer state)."""

import contextlib
import os
import sys
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function


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
    (phase,) = phases(lambda mark: step(), device)
    return phase.peak / 2**20


class Phase(NamedTuple):
    """Memory in a part of a step, in bytes above what was allocated when the step began: the most, and what is left at the end."""

    peak: int
    left: int


def phases(step, device="cpu"):
    """Return the Phases of step(mark), a function that calls mark() where one phase ends and the next begins; measured as for peak_memory."""
    device = torch.device(device)
    if device.type == "cuda":
        return _cuda_phases(step, device)
    with _quiet_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step(_mark)
    events = recorded.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    ends = sorted(event.start_ns() for event in events if event.name() == _MARK)
    found, now, peak = [], 0, 0
    for time, nbytes in sorted(changes, key=lambda change: change[0]):  # simultaneous events keep their order
        while ends and time > ends[0]:
            found.append(Phase(peak, now))
            peak = now
            ends.pop(0)
        now += nbytes
        peak = max(peak, now)
    for _ in ends:
        found.append(Phase(peak, now))
        peak = now
    return [*found, Phase(peak, now)]


_MARK = "fastff: a phase ends"


def _mark():
    with record_function(_MARK):
        pass


def _cuda_phases(step, device):
    found = []

    def mark():
        torch.cuda.synchronize(device)
        peak, left = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        found.append(Phase(peak - before, left - before))
        torch.cuda.reset_peak_memory_stats(device)

    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step(mark)
    mark()
    return found


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
