"""Interleaved timing, CSV and tables shared by the benchmarks."""

import csv
import time
from pathlib import Path

import torch

from benchmarks.environment import environment


def interleave(functions, rounds, warmup=2):
    """Call all functions in turn, `rounds` times after `warmup`; returns {name: [seconds]}. Ratios of one round share the machine's mood."""
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
    """The value at fraction q of the sorted values."""
    values = sorted(values)
    return values[min(len(values) - 1, int(q * len(values)))]


def ratios(times, name, base):
    """(median, 20 %, 80 % quantile) of time(name) / time(base), round by round."""
    pairs = [a / b for a, b in zip(times[name], times[base], strict=True)]
    return quantile(pairs, 0.5), quantile(pairs, 0.2), quantile(pairs, 0.8)


def write_csv(path, rows):
    """Write rows with the environment's columns to `path`."""
    info = environment()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*dict.fromkeys(key for row in rows for key in row), *info])
        writer.writeheader()
        writer.writerows(row | info for row in rows)
    print(f"wrote {path}")


def print_environment():
    """One line: device, threads, versions, commit."""
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
