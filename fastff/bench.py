"""Microbenchmarks of the kernels (`fastff bench`): each op against eager PyTorch. Results are checked first, and timings are interleaved.

The benchmarks in the repository's folder benchmarks/ measure more, whole networks too. This module answers whether fastff is faster on this
machine.
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
        speedup, low, high: time of eager PyTorch over that of fastff, the median and the 20 % and 80 % quantiles.
        milliseconds: median time of fastff."""

    op: str
    shape: str
    implementation: str
    speedup: float
    low: float
    high: float
    milliseconds: float


def cases(shape, device, dtype):
    """Return {op: (eager, ours, tensors)}: two functions of the tensors that return the same results."""
    B, C, H, K = shape
    generator = torch.Generator().manual_seed(0)

    def values(*sizes, scale=1.0):
        return (torch.randn(sizes, generator=generator) * scale).to(device, dtype)

    x, residual = (
        values(B, C, H, H).contiguous(memory_format=torch.channels_last).requires_grad_(grad) for grad in (True, False)
    )
    weight = values(K, C, scale=2 / C**0.5).requires_grad_()
    bn_weight, bn_bias = values(C).abs().requires_grad_(), values(C).requires_grad_()
    target = torch.randint(K, (B,), generator=generator).to(device)

    def loss_of(x, weight):
        goodness = F.conv2d(x, weight[:, :, None, None]).square().mean((2, 3))
        return F.cross_entropy(goodness.to(torch.promote_types(x.dtype, torch.float32)), target)

    def step_eager(x, weight):
        loss = loss_of(x, weight)
        return loss.detach(), F.layer_norm(x.detach(), x.shape[1:]), *torch.autograd.grad(loss, (x, weight))

    def step(x, weight):
        s = ff.goodness_step(x, weight, None, target)
        return s.loss, s.normalized, s.grad_x, s.grad_weight

    def epilogue_eager(y, weight, bn_weight, bn_bias, residual):
        x = F.relu(F.batch_norm(y, None, None, bn_weight, bn_bias, training=True) + residual)
        loss = loss_of(x, weight)
        grads = torch.autograd.grad(loss, (y, weight, bn_weight, bn_bias))
        return loss.detach(), F.layer_norm(x.detach(), x.shape[1:]), *grads

    def epilogue(y, weight, bn_weight, bn_bias, residual):
        s = ff.tail_step(
            y, weight, None, target, bn_weight=bn_weight, bn_bias=bn_bias, residual=residual, need_grad_residual=False
        )
        return s.loss, s.normalized, s.grad_y, s.grad_weight, s.grad_bn_weight, s.grad_bn_bias

    def norm_eager(x):
        return (F.layer_norm(x, x.shape[1:]),)

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
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    for shape in shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES):
        for op, (eager, ours, tensors) in cases(shape, device, dtype).items():
            check(op, shape, eager, ours, tensors)
            times = interleave(
                {"eager": functools.partial(eager, *tensors), "fastff": functools.partial(ours, *tensors)}, rounds
            )
            table = "goodness" if op == "epilogue" else op
            name = choose(table, TABLES[table], "auto", tensors[0]).name
            yield Row(op, str(shape), name, *ratios(times, "eager", "fastff"), quantile(times["fastff"], 0.5) * 1e3)


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

    def seconds(function):
        return quantile(interleave({"": function}, 7)[""], 0.5)

    tuning.tune(device, seconds, shapes, report=report)
    return None
