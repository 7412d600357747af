"""Times kernels on a GPU by replayed CUDA graphs, and counts launches. On a CPU, for a dry run, each of these has a plain stand-in."""

import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from fastff.bench import quantile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DRY = DEVICE.type == "cpu"
IMPL = "torch" if DRY else "auto"  # of whole steps, which would take the interpreter minutes
L2_COLD = 0 if DRY else 200e6  # bytes of inputs that pass through the L2 cache before the same ones are read again
MOST_SETS, MOST_CALLS, SECONDS, WARM_UP = (2, 2, 0.0, 0) if DRY else (128, 20, 5e-3, 2)


def synchronize():
    if not DRY:
        torch.cuda.synchronize()


def input_sets(make, size):
    """Return sets of inputs, make(seed) each, that are larger together than the L2 cache. `size` is the bytes of one."""
    return [make(seed) for seed in range(max(2, min(MOST_SETS, -(-int(L2_COLD) // max(1, size)))))]


def recorded(calls, keep, pool=None):
    """Return a function that makes these calls again, as a CUDA graph. With `keep` no two calls write their results to one place.

    Graphs of one `pool` share their memory: none of them may be replayed while another runs."""
    if DRY:
        return lambda: [call() for call in calls]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, pool=pool):
        for call in calls:
            result = call()
            if keep:
                kept.append(result)
    return graph.replay


def repeats(call):
    """Return how many calls take SECONDS, at most MOST_CALLS."""
    call()
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return max(1, min(MOST_CALLS, int(SECONDS / (time.perf_counter() - start))))


def replays(graphs, rounds):
    """Time {name: (replay, calls in it)} in turn. Returns {name: [seconds of a call in each round]}, measured by events on the device."""
    times = {name: [] for name in graphs}
    for round_ in range(WARM_UP + rounds):
        for name, (replay, calls) in graphs.items():
            seconds = _device_seconds(replay) / calls
            if round_ >= WARM_UP:
                times[name].append(seconds)
    return times


def _device_seconds(function):
    if DRY:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_seconds(function, rounds):
    """Return the median of the time that the host takes to issue a call, without waiting for the device."""
    times = []
    for _ in range(WARM_UP + rounds):
        synchronize()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    synchronize()
    return quantile(times[WARM_UP:], 0.5)


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
