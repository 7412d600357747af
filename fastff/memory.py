"""Measures the peak memory of a step: what it allocates in addition to what is allocated when it starts (parameters, optimizer state)."""

import contextlib
import gc
import itertools
import math
import os
import sys
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

MARK = "fastff block "  # begins the names of the profiler's ranges that tell where a step is


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
    allocated, marks = timeline(lambda: step(_mark))
    ends, found, peak, now = [time for time, _ in marks], [], 0, 0
    for time, value in [*allocated, (math.inf, allocated[-1][1])]:
        while ends and time > ends[0]:
            found.append(Phase(peak, now))
            peak = now
            ends.pop(0)
        now, peak = value, max(peak, value)
    return [*found, Phase(peak, now)]


def _mark(name=""):
    with record_function(f"{MARK}{name}"):
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
    with _without_collecting():
        step(mark)
        mark()
    return found


def timeline(step):
    """Run step() on a CPU under the profiler. Returns what it had allocated over time, and when things happened.

    Returns: ([(ns, bytes allocated since the start)], which begins with (0, 0), and [(ns, name)] of the `record_function` ranges whose
    names begin with MARK, in the order of time)."""
    with (
        _quiet_stderr(),
        _without_collecting(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        step()
    events = recorded.profiler.kineto_results.events()
    marks = sorted((event.start_ns(), event.name()) for event in events if event.name().startswith(MARK))
    allocations = [event for event in events if event.name() == "[memory]"]
    allocations.sort(key=lambda event: event.start_ns())  # stable: simultaneous events keep their order
    sums = itertools.accumulate(event.nbytes() for event in allocations)
    return [(0, 0), *((event.start_ns(), value) for event, value in zip(allocations, sums, strict=True))], marks


def by_block(trainer, images, target):
    """Return the memory of one training step over time, and which block it was at.

    Args:
        trainer: a Trainer after two warm-up steps, in training mode; or a Backprop, which has no blocks.
        images, target: a minibatch on its device.

    Returns: (curve, visits): curve is a list of (time, MiB above what was allocated before), visits of (time, index of the block whose
    forward pass starts there). The unit of time means nothing; on a GPU only the peak between two visits is known, and the curve has
    one step for each."""
    blocks, order = trainer.sff.local_blocks, []

    def marked(index, visit, mark):
        def run(*arguments, **options):
            mark(index)
            return visit(*arguments, **options)

        return run

    def step(mark):
        for index, block in enumerate(blocks):
            block.visit = marked(index, block.visit, mark)
        try:
            trainer.step(images, target)
        finally:
            for block in blocks:
                del block.visit

    if trainer.device.type == "cuda":
        found = _cuda_phases(lambda mark: step(lambda index: (order.append(index), mark())), trainer.device)
        peaks = [
            phase.peak / 2**20 for phase in (found[1:] if order else found)
        ]  # before the first visit nothing is allocated
        return [(time + end, value) for time, value in enumerate(peaks) for end in (0, 1)], list(enumerate(order))
    allocated, marks = timeline(lambda: step(_mark))
    visits = [(time, int(name.removeprefix(MARK))) for time, name in marks]
    start = min([time for time, _ in allocated[1:]] + [time for time, _ in visits])
    curve = [(max(0, time - start), value / 2**20) for time, value in allocated]
    return curve, [(time - start, index) for time, index in visits]


@contextlib.contextmanager
def _without_collecting():
    """Keep Python's garbage collector from freeing, in the middle of a step, tensors from before it: the step would seem to need so much less."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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
