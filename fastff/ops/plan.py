"""Direct or second moment, and how much at a time: chosen by counted cost, corrected by a measured factor.

Counted per sample, in multiply-adds of matrix products plus bytes that elementwise passes move (sff.md section 3):

    direct          3 P C K products, 6 passes over a [K, P]          (4 P C K when a is computed twice)
    second moment   2 P C^2 + 2 K C^2 products, 7 passes over t [K, C]

An elementwise byte costs about as much as BYTE multiply-adds in cache. How well the small products of either algorithm use a machine is not
counted but measured: `calibrate` times both and keeps the median ratio of measured to counted cost in the user's cache folder. The
choice is the same for the same shape until calibrated again, so that resumed runs repeat their bits.

On a GPU the times of four ways are modelled instead: Triton's kernels for direct and second moment, and direct as three large matrix products,
"products" by Triton with the elementwise work inside, "cublas" by PyTorch with passes between them. The model is of an H100 and was not measured
(docs/kernels.md).
"""

import math
import time
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from fastff import cache
from fastff.kernels.triton import blocks
from fastff.spec import Plan, Projection

BYTE = 3.0
# Median over the shapes of `calibrate`, 2 cores of an AVX2 server processor, torch 2.13, float32.
SECOND_MOMENT_FACTOR = 1.4

CALIBRATION_SHAPES = [(8, 64, 1024, 100), (8, 64, 256, 10), (8, 128, 256, 100), (32, 32, 256, 100), (2, 64, 3136, 1000)]


def direct_cost(C, P, K, recompute=False):
    return (4 if recompute else 3) * P * C * K + BYTE * 6 * 4 * K * P


def second_moment_cost(C, P, K):
    return 2 * P * C * C + 2 * K * C * C + BYTE * 7 * 4 * K * C


# Of an H100, in a microsecond: bytes of device memory and of the L2 cache, operations of products by the size of an element. LAUNCH: microseconds.
MEMORY, CACHE, PRODUCTS, LAUNCH = 3.0e6, 5.5e6, {2: 400e6, 4: 50e6, 8: 50e6}, 3.0
TF32 = 200e6  # operations a microsecond of the second moment's products of 16-bit x, and of float32 x where PyTorch's are in TF32
FMA = 0.5  # of the rate of cuBLAS: what products of float32 without TF32 are taken to have in Triton
CLASSES = 128  # of a tile of the second moment's head


class Gpu(NamedTuple):
    """What the choice on a GPU depends on beside the shape: bytes of an element, the compute capability whose limits Triton's kernels have
    (fastff/kernels/triton/blocks.py), None where there are none, and whether products of float32 are in TF32."""

    itemsize: int
    arch: int | None
    tf32: bool = False

    def refusal(self, algorithm, C, K):
        """Return why an algorithm is not to be chosen for C channels and K classes, or None."""
        if self.arch is not None:
            return blocks.refusal(algorithm, C, K, *self.kernels)
        wide = algorithm == "second_moment" and self.itemsize > 2
        return None if wide else "PyTorch's operators compute it as products, or in float32"

    @property
    def kernels(self):
        """The last arguments of `blocks.refusal` and `blocks.table`."""
        return self.itemsize, False, self.arch


def gpu_microseconds(algorithm, B, C, P, K, gpu):
    """Return the modelled time of a goodness step on a GPU: bytes, products and launches, one after another."""
    rate = TF32 if gpu.tf32 and gpu.itemsize == 4 else PRODUCTS[gpu.itemsize]
    x, a, products = B * C * P * gpu.itemsize, B * K * P * gpu.itemsize, 2 * B * P * C / rate
    if algorithm == "direct":
        # each piece of channels makes the products of all of them, from x and, with several pieces, W in the cache; twice for several tiles
        sizes = blocks.table(algorithm, B, C, P, K, 0, *gpu.kernels)
        pieces, tiles = -(-C // sizes.BC), -(-P // sizes.BP)
        times = pieces * min(tiles, 2)
        weight = 4 * sizes.BK * C * times * tiles * -(-B // sizes.NS) if pieces > 1 else 0
        return 2 * LAUNCH + 3.5 * x / MEMORY + (times * x + weight) / CACHE + (times + 2) * products * sizes.BK
    if algorithm == "second_moment":  # S is read again for each tile of classes, W for each sample
        cached = B * (4 * C * C * -(-K // CLASSES) + 2 * 4 * K * C)
        rate = min(TF32, rate)
        return 3 * LAUNCH + 3.5 * x / MEMORY + cached / CACHE + (4 * P + 6 * K) * B * C * C / rate
    if algorithm == "products":  # a [P, K] is written and read by two products, x also by the normalization
        BK = blocks.table(algorithm, B, C, P, K, 0, *gpu.kernels).BK
        return (
            8 * LAUNCH
            + (5 * x + 3 * a) / MEMORY
            + 3 * products * -(-K // BK) * BK / (FMA if rate == PRODUCTS[4] else 1)
        )
    if algorithm == "cublas":  # a is squared and scaled in passes of its own
        return 10 * LAUNCH + (6 * x + 6 * a) / MEMORY + 3 * products * K
    raise ValueError(f"algorithm: expected 'direct', 'second_moment', 'products' or 'cublas', got {algorithm!r}")


@lru_cache(maxsize=4096)
def on_gpu(B, C, P, K, gpu):
    """Return {algorithm: modelled microseconds} of those that can run, the quickest first."""
    names = [name for name in ("direct", "second_moment", "products") if gpu.refusal(name, C, K) is None] + ["cublas"]
    times = {name: gpu_microseconds(name, B, C, P, K, gpu) for name in names}
    return dict(sorted(times.items(), key=lambda pair: pair[1]))


FILE = "plan.json"


@lru_cache
def second_moment_factor():
    """Return the factor and where it comes from."""
    try:
        factor = float(cache.read(FILE)["second_moment_factor"])
        if math.isfinite(factor) and factor > 0:
            return factor, str(cache.file(FILE))
    except (ValueError, KeyError, TypeError):
        pass
    return SECOND_MOMENT_FACTOR, "default"


@lru_cache
def budget(device_type):
    """Return the bytes for the temporaries of a chunk: a third of the last-level cache of a CPU, and enough to fill a GPU."""
    if device_type != "cpu":
        return 256 * 2**20
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        size = int(text.rstrip("KM")) * (2**20 if text.endswith("M") else 2**10)
    except (OSError, ValueError):
        size = 24 * 2**20
    return min(max(size // 3, 2 * 2**20), 16 * 2**20)


@lru_cache(maxsize=4096)
def plan(B, C, P, K, kernel=(1, 1), algorithm="auto", device_type="cpu", cost=1.0, gpu=None):
    """Return the Plan for x of B samples, C channels and P positions, and K classes (K = 0: no squares).

    cost: the time of the second moment in this implementation, relative to that of the torch implementation. gpu: a Gpu, in its place."""
    room = budget(device_type) // 4
    if kernel != (1, 1):
        if algorithm == "second_moment":
            raise ValueError(f"algorithm: second_moment needs kernel size 1, got {kernel[0]} x {kernel[1]}")
        return Plan("convolution", min(max(1, room // max(1, K * P + 2 * C * P)), max(B, 1)), K)
    recompute = room < K * P
    if gpu is not None:
        if algorithm == "auto":
            algorithm = next(iter(on_gpu(B, C, P, K, gpu)))
        elif gpu.arch is not None and (why := gpu.refusal(algorithm, C, K)):
            if algorithm != "direct":
                raise ValueError(f"algorithm: expected one that can run on this GPU, got {algorithm}: {why}")
            algorithm = next(name for name in on_gpu(B, C, P, K, gpu) if name in ("products", "cublas"))
    elif algorithm == "auto":
        second = cost * second_moment_factor()[0] * second_moment_cost(C, P, K)
        algorithm = "second_moment" if second < direct_cost(C, P, K, recompute) else "direct"
    per_sample = C * P + (2 * C * K + 2 * C * C if algorithm == "second_moment" else K * P)
    samples = min(max(1, room // max(1, per_sample)), max(B, 1))
    return Plan(algorithm, samples, max(1, min(K, room // P)))


def calibrate(run, repeats=5):
    """Measure the factor on this machine (a few seconds), store it and return it.

    run: the implementation that is measured (fastff/ops/goodness.py), whose own SECOND_MOMENT_COST is divided out."""
    cost, ratios = getattr(run, "SECOND_MOMENT_COST", 1.0), []
    for B, C, P, K in CALIBRATION_SHAPES:
        x, projection, d = torch.randn(B, C, P, 1), Projection(torch.randn(K, C, 1, 1)), torch.randn(B, K)
        seconds = {"direct": [], "second_moment": []}
        for _ in range(repeats + 1):
            for algorithm, times in seconds.items():
                chosen = plan(B, C, P, K, algorithm=algorithm)
                start = time.perf_counter()
                run.goodness_backward(d, x, projection, chosen, True)
                times.append(time.perf_counter() - start)
        measured = {name: sorted(times[1:])[repeats // 2] for name, times in seconds.items()}
        counted = cost * second_moment_cost(C, P, K) / direct_cost(C, P, K)
        ratios.append(measured["second_moment"] / measured["direct"] / counted)
    factor = sorted(ratios)[len(ratios) // 2]
    cache.write(FILE, {"second_moment_factor": factor, "torch": torch.__version__, "threads": torch.get_num_threads()})
    second_moment_factor.cache_clear()
    plan.cache_clear()
    return factor
