"""Measuring block sizes on the user's own GPU (`fastff bench --tune`); blocks.py keeps them and uses them from then on."""

import functools
import itertools

import torch

from fastff import cache, spec
from fastff.kernels.triton import blocks, goodness

SHAPES = [(C, H, K) for C, H in ((64, 32), (128, 16), (256, 8), (512, 4), (24, 56), (112, 14)) for K in (10, 100, 1000)]


def candidates(start):
    """`start`, then the same with half and twice the positions, classes and warps: sizes that a tensor core takes."""
    yield start
    for BP, BK, warps in itertools.product(*((n // 2, n, n * 2) for n in (start.BP, start.BK, start.warps))):
        found = start._replace(BP=BP, BK=BK, warps=warps)
        if not start.HK and start.BK != BK:  # direct has all classes in a tile
            continue
        if found != start and BP * start.NS >= 16 and 16 <= BK <= 256 and 1 <= warps <= 32:
            yield found


def tune(device, time, shapes=None, dtype=torch.bfloat16, B=512, report=lambda text: None):
    """Measure every candidate for every shape (C, H, K) with time(function) -> seconds; store and return {key: Blocks}."""
    name = blocks.device_name(device)
    best = dict(blocks.measured(name))
    for C, H, K in shapes or SHAPES:
        x = torch.randn(B, C, H, H, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(K, C, 1, 1, device=device)
        loss = spec.Loss(target=torch.randint(K, (B,), device=device))
        for algorithm in ("direct",) + ("second_moment",) * (C <= goodness.SECOND_MOMENT_CHANNELS):
            start = blocks.table(algorithm, B, C, H * H, K, 0, x.element_size(), arch=blocks.architecture(x.device))
            if start is None:  # not by these kernels
                continue
            seconds = {}
            for sizes in candidates(start):
                step = functools.partial(_step, x, weight, spec.Plan(algorithm, B, K), sizes, loss)
                try:
                    seconds[sizes] = time(step)
                except (
                    Exception
                ) as error:  # too much shared memory or registers: Triton says it in errors of many kinds
                    if sizes == start:
                        raise
                    report(f"  {sizes}: {str(error).splitlines()[0]}")
            winner = min(seconds, key=seconds.__getitem__)
            best[blocks.key_of(algorithm, C, H * H, K, 0, x.element_size(), False)] = winner
            report(
                f"{algorithm} {(B, C, H, K)}: {winner}, {seconds[start] / seconds[winner]:.2f} times as fast as the table's"
            )
    cache.write(blocks.FILE, cache.read(blocks.FILE) | {name: best})
    blocks.measured.cache_clear()
    return best


def _step(x, weight, plan, sizes, loss):
    launch = goodness.Launch(x, spec.Projection(weight), plan, sizes=sizes)
    return launch.step(loss, spec.Normalization("layer_norm"), torch.empty_like(x))[0]
