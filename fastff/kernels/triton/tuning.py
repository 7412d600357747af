"""Measuring block sizes on the user's own GPU (`fastff bench --tune`); blocks.py keeps them and uses them from then on."""

import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
from typing import NamedTuple

import torch

from fastff import cache, spec
from fastff.arguments import first_line
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


class Case(NamedTuple):
    """A launch to measure: a goodness step of x [B, C, H, H] with K classes by an algorithm."""

    algorithm: str
    B: int
    C: int
    H: int
    K: int
    dtype: torch.dtype

    def table(self, device):
        """The Blocks of the table, None where these kernels do not take the step."""
        arch = blocks.architecture(device)
        return blocks.table(self.algorithm, self.B, self.C, self.H**2, self.K, 0, self.dtype.itemsize, arch=arch)

    def step(self, device):
        """A function of Blocks that makes the step."""
        x = torch.randn(self.B, self.C, self.H, self.H, device=device, dtype=self.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(self.K, self.C, 1, 1, device=device)
        loss = spec.Loss(target=torch.randint(self.K, (self.B,), device=device))
        return functools.partial(_step, x, weight, spec.Plan(self.algorithm, self.B, self.K), loss)


def tune(device, time, shapes=None, dtype=torch.bfloat16, B=512, report=lambda text: None, processes=None):
    """Measure every candidate for every shape (C, H, K) with time(function) -> seconds; store and return {key: Blocks}.

    processes: how many compile the candidates before that, into Triton's cache of files (some seconds each); None for one a core, 0 for none."""
    name = blocks.device_name(device)
    best = dict(blocks.measured(name))
    cases = [
        Case(algorithm, B, C, H, K, dtype) for C, H, K in shapes or SHAPES for algorithm in ("direct", "second_moment")
    ]
    cases = [case for case in cases if case.table(device)]
    if device.type == "cuda" and processes != 0:
        compile_ahead(
            [(case, sizes, device) for case in cases for sizes in candidates(case.table(device))], processes, report
        )
    for case in cases:
        start, step, seconds = case.table(device), case.step(device), {}
        for sizes in candidates(start):
            try:
                seconds[sizes] = time(functools.partial(step, sizes))
            except Exception as error:  # too much shared memory or registers: Triton says it in errors of many kinds
                if sizes == start:
                    raise
                report(f"  {sizes}: {first_line(error)}")
        winner = min(seconds, key=seconds.__getitem__)
        best[blocks.key_of(case.algorithm, case.C, case.H**2, case.K, 0, dtype.itemsize, False)] = winner
        gain = f"{seconds[start] / seconds[winner]:.2f} times as fast as the table's"
        report(f"{case.algorithm} {(B, case.C, case.H, case.K)}: {winner}, {gain}")
    cache.write(blocks.FILE, cache.read(blocks.FILE) | {name: best})
    blocks.measured.cache_clear()
    return best


def compile_ahead(jobs, processes, report):
    """Make the step of each job (case, sizes, device) once, in several processes, which leave what they compile in Triton's cache."""
    processes = min(processes or os.cpu_count() or 1, len(jobs))
    report(f"compiling {len(jobs)} candidates in {processes} processes")
    spawned = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(processes, spawned) as pool:
        list(pool.map(_compile, jobs))


def _compile(job):
    """Make one step. An error comes again, and is reported, where the candidate is measured."""
    case, sizes, device = job
    with contextlib.suppress(Exception):
        case.step(device)(sizes)


def _step(x, weight, plan, loss, sizes):
    launch = goodness.Launch(x, spec.Projection(weight), plan, sizes=sizes)
    return launch.step(loss, spec.Normalization("layer_norm"), torch.empty_like(x))[0]
