"""Times the host, and counts launches, beside the times of the device (fastff/bench.py). On a CPU, for a dry run, each has a plain stand-in."""

import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastff.bench import WARM_UP, quantile, synchronize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DRY = DEVICE.type == "cpu"
IMPL = "torch" if DRY else "auto"  # of whole steps, which would take the interpreter minutes


def host_seconds(function, rounds):
    """Return the median of the time that the host takes to issue a call, without waiting for the device."""
    times = []
    warmup = 0 if DRY else WARM_UP
    for _ in range(warmup + rounds):
        synchronize()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    synchronize()
    return quantile(times[warmup:], 0.5)


def launched(function):
    """Return (kernels, copies and fills that one call starts on the device, seconds that they take). The stand-in counts operators of PyTorch."""
    synchronize()
    with profile(activities=[ProfilerActivity.CPU if DRY else ProfilerActivity.CUDA]) as recording:
        function()
        synchronize()
    wanted = DeviceType.CPU if DRY else DeviceType.CUDA
    events = [
        event
        for event in recording.events()
        if event.device_type == wanted and not getattr(event, "is_user_annotation", False)
    ]
    return len(events), sum(event.time_range.elapsed_us() for event in events) / 1e6
