"""Microbenchmarks of the kernels (`fastff bench`): each op against eager PyTorch. Results are checked first, and timings are interleaved.

On a GPU, calls with inputs that are larger together than the L2 cache are recorded as a CUDA graph, whose replays are timed by events: the time of a
single call would be that of the host which issues it. The repository's folder benchmarks/ measures more, by the same functions, whole networks
too. This module answers whether fastff is faster on this machine.
"""

import functools
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

import fastff.functional as ff
from fastff.ops import TABLES
from fastff.ops.table import choose

CPU_SHAPES = [(32, 64, 32, 100), (32, 128, 16, 10), (32, 256, 8, 100), (8, 64, 28, 1000)]  # (B, C, H, K)
GPU_SHAPES = [(512, 64, 32, 100), (512, 128, 16, 10), (512, 256, 8, 100), (256, 64, 56, 1000)]


def interleave(functions, rounds, warmup=2):
    """Time functions in turn: in every round each of them is called once. A ratio of two times of one round is little affected by slow changes
    of the machine's speed.

    Args:
        functions: {name: function without arguments}.
        rounds: number of timed rounds.
        warmup: number of rounds before these.

    Returns: {name: [seconds of each round]}."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = {name: [] for name in functions}
    for round_ in range(warmup + rounds):
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            if round_ >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


L2_COLD = 200e6  # bytes of inputs that pass through the L2 cache before the same ones are read again
MOST_SETS, MOST_CALLS, SECONDS, WARM_UP = 128, 20, 5e-3, 2


@functools.cache
def on_gpu():
    """Return whether there is a GPU. Without one, the functions below have plain stand-ins: calls in place of graphs, and the host's clock."""
    return torch.cuda.is_available()


def synchronize():
    """Wait for the GPU, if there is one."""
    if on_gpu():
        torch.cuda.synchronize()


def input_sets(make, size):
    """Return sets of inputs, make(seed) each, that are larger together than the L2 cache (without a GPU two). `size` is the bytes of one."""
    most = min(MOST_SETS, -(-int(L2_COLD) // max(1, size))) if on_gpu() else 2
    return [make(seed) for seed in range(max(2, most))]


def recorded(calls, keep, pool=None):
    """Return a function that makes these calls again, as a CUDA graph. With `keep` no two calls write their results to one place.

    Graphs of one `pool` share their memory: none of them may be replayed while another runs."""
    if not on_gpu():
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
    """Return how many calls take SECONDS, at most MOST_CALLS (without a GPU two)."""
    if not on_gpu():
        return 2
    call()
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return max(1, min(MOST_CALLS, int(SECONDS / (time.perf_counter() - start))))


def replays(graphs, rounds):
    """Time {name: (replay, calls in it)} in turn. Returns {name: [seconds of a call in each round]}, measured by events on the device."""
    times, warmup = {name: [] for name in graphs}, WARM_UP if on_gpu() else 0
    for round_ in range(warmup + rounds):
        for name, (replay, calls) in graphs.items():
            seconds = _elapsed(replay) / calls
            if round_ >= warmup:
                times[name].append(seconds)
    return times


def device_seconds(function, rounds=7):
    """Return the median of the time that a call takes on the device."""
    calls = repeats(function)
    return quantile(replays({"": (recorded([function] * calls, False), calls)}, rounds)[""], 0.5)


def _elapsed(function):
    if not on_gpu():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def quantile(values, q):
    """Return the value at fraction `q` of the sorted values."""
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


def ratios(times, name, base):
    """Return (median, 20 % quantile, 80 % quantile) of time(name) / time(base) over the rounds of `interleave`."""
    pairs = [a / b for a, b in zip(times[name], times[base], strict=True)]
    return quantile(pairs, 0.5), quantile(pairs, 0.2), quantile(pairs, 0.8)


class Row(NamedTuple):
    """Result for one op at one shape.

    Fields:
        op, shape: what was measured; the shape is "(B, C, H, K)".
        implementation: name of the row in the op's table that ran.
        speedup, low, high: time of eager PyTorch over that of fastff, the median and the 20 % and 80 % quantiles. Of the two ways to normalize
            a channels_last tensor in PyTorch (`cases`) the faster one counts.
        milliseconds: median time of fastff, on a GPU that of the device."""

    op: str
    shape: str
    implementation: str
    speedup: float
    low: float
    high: float
    milliseconds: float


def written_norm(x):
    """Layer normalization as one writes it. PyTorch copies a channels_last tensor for it."""
    return F.layer_norm(x, x.shape[1:])


def flat_norm(x):
    """The same of a channels_last tensor without a copy, in the order in which it lies in memory."""
    rows = x.permute(0, 2, 3, 1)
    return F.layer_norm(rows, rows.shape[1:]).permute(0, 3, 1, 2)


NORMS = {"written": written_norm, "flat": flat_norm}


def cases(shape, device, dtype, seed=0):
    """Return {op: (eager, ours, tensors)}: two functions of the tensors that return the same results; that of eager PyTorch has the layer
    normalization as its last argument."""
    B, C, H, K = shape
    generator = torch.Generator(device).manual_seed(seed)

    def values(*sizes, scale=1.0):
        return (torch.randn(sizes, generator=generator, device=device) * scale).to(dtype)

    x, residual = (
        values(B, C, H, H).contiguous(memory_format=torch.channels_last).requires_grad_(grad) for grad in (True, False)
    )
    weight = values(K, C, scale=2 / C**0.5).requires_grad_()
    bn_weight, bn_bias = values(C).abs().requires_grad_(), values(C).requires_grad_()
    target = torch.randint(K, (B,), generator=generator, device=device)

    def loss_of(x, weight):
        goodness = F.conv2d(x, weight[:, :, None, None]).square().mean((2, 3))
        return F.cross_entropy(goodness.to(torch.promote_types(x.dtype, torch.float32)), target)

    def step_eager(x, weight, layer_norm=written_norm):
        loss = loss_of(x, weight)
        return loss.detach(), layer_norm(x.detach()), *torch.autograd.grad(loss, (x, weight))

    def step(x, weight):
        s = ff.goodness_step(x, weight, None, target)
        return s.loss, s.normalized, s.grad_x, s.grad_weight

    def epilogue_eager(y, weight, bn_weight, bn_bias, residual, layer_norm=written_norm):
        x = F.relu(F.batch_norm(y, None, None, bn_weight, bn_bias, training=True) + residual)
        loss = loss_of(x, weight)
        grads = torch.autograd.grad(loss, (y, weight, bn_weight, bn_bias))
        return loss.detach(), layer_norm(x.detach()), *grads

    def epilogue(y, weight, bn_weight, bn_bias, residual):
        s = ff.tail_step(
            y, weight, None, target, bn_weight=bn_weight, bn_bias=bn_bias, residual=residual, need_grad_residual=False
        )
        return s.loss, s.normalized, s.grad_y, s.grad_weight, s.grad_bn_weight, s.grad_bn_bias

    def norm_eager(x, layer_norm=written_norm):
        return (layer_norm(x),)

    def norm(x):
        return (ff.layer_norm(x),)

    return {
        "goodness": (step_eager, step, (x, weight)),
        "epilogue": (epilogue_eager, epilogue, (x, weight, bn_weight, bn_bias, residual)),
        "layer_norm": (norm_eager, norm, (x.detach(),)),
    }


def check(op, shape, eager, ours, tensors):
    """Raises RuntimeError unless the error of our results against float64 is at most a small multiple of eager PyTorch's error."""
    in_float64 = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    for got, plain, exact in zip(ours(*tensors), eager(*tensors), eager(*in_float64), strict=True):
        norm = exact.norm().clamp(min=1e-12)
        error, eager_error = (float((v.double() - exact).norm() / norm) for v in (got, plain))
        if not error <= 4 * eager_error + 8 * torch.finfo(got.dtype).eps:
            raise RuntimeError(
                f"wrong result: {op} at {shape} is off by {error:.1e}, eager PyTorch by {eager_error:.1e}"
            )


def run(device, rounds=9, shapes=None):
    """Measure all ops and yield a Row for each op and shape.

    Args:
        device: where to measure; float32 on a CPU, bfloat16 on a GPU.
        rounds: number of timed rounds.
        shapes: [(B, C, H, K)], or None for those of this module.

    Raises RuntimeError: a result is wrong; nothing is timed then."""
    device = torch.device(device)
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    for shape in shapes or (GPU_SHAPES if gpu else CPU_SHAPES):
        for op, (eager, ours, tensors) in cases(shape, device, dtype).items():
            check(op, shape, eager, ours, tensors)
            functions = {name: functools.partial(eager, layer_norm=norm) for name, norm in NORMS.items()}
            functions["fastff"] = ours
            inputs = [tensors]
            if gpu:
                inputs = input_sets(lambda seed: cases(shape, device, dtype, seed)[op][2], tensors[0].nbytes)  # noqa: B023
            times = _times(functions, inputs, rounds)
            base = min(NORMS, key=lambda name: quantile(times[name], 0.5))
            table = "goodness" if op == "epilogue" else op
            name = choose(table, TABLES[table], "auto", tensors[0]).name
            yield Row(op, str(shape), name, *ratios(times, base, "fastff"), quantile(times["fastff"], 0.5) * 1e3)


def _times(functions, inputs, rounds):
    """Return {name: [seconds of each round]} of functions of tensors: calls with the only inputs in turn, or, on a GPU, graphs of calls with all."""
    calls = {name: [functools.partial(f, *tensors) for tensors in inputs] for name, f in functions.items()}
    if len(inputs) == 1:
        return interleave({name: call for name, (call,) in calls.items()}, rounds)
    pool = torch.cuda.graph_pool_handle()
    return replays({name: (recorded(each, True, pool), len(inputs)) for name, each in calls.items()}, rounds)


def tune(device, report, shapes=None):
    """Measure the settings that fastff keeps for each machine, and store them in the cache folder.

    On a CPU this is the factor between the costs of the two algorithms of the goodness (fastff/ops/plan.py), on a GPU the block sizes of the
    Triton kernels.

    Args:
        device: the device to measure on.
        report: function of one line of text, called with each result.
        shapes: [(B, C, H, K)] for the Triton kernels, or None.

    Raises ValueError: the Triton kernels cannot run on `device`."""
    from fastff.ops import plan

    device = torch.device(device)
    if device.type == "cpu":
        row = choose("goodness", TABLES["goodness"], "auto", torch.empty(1, 64, 8, 8))
        return report(f"second moment ({row.name}): counted cost times {plan.calibrate(row.run):.2f}")
    from fastff.kernels.triton import reason, tuning

    if why := reason(torch.empty(1, 1, 1, 1, device=device)):
        raise ValueError(f"tune: {why}")

    tuning.tune(device, device_seconds, shapes, report=report)
    return None
