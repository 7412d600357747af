"""Writes the CSV files of the benchmarks, with the columns of the environment. The timing itself is in fastff/bench.py."""

import csv
import functools
from pathlib import Path

import torch

from fastff.app import environment as machine

COLUMNS = ("device", "threads", "torch", "python", "fastff", "commit")


@functools.cache
def environment():
    """Return {column: value} of what describes the machine, the versions and the commit in every CSV file."""
    found = machine.environment("cuda" if torch.cuda.is_available() else "cpu")
    return {column: found[column] for column in COLUMNS} | {"commit": found["commit"] or "unknown"}


def write_csv(path, rows):
    """Write rows (dicts), each with the columns of the environment, to the file `path`."""
    info = environment()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, [*dict.fromkeys(key for row in rows for key in row), *info])
        writer.writeheader()
        writer.writerows(row | info for row in rows)
    print(f"wrote {path}")


def append_csv(path, rows):
    """Add rows (dicts of the same columns) with the columns of the environment to the file `path`, which is on the disk when this returns."""
    info, path = environment(), Path(path)
    begun = path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *info])
        if not begun:
            writer.writeheader()
        writer.writerows(row | info for row in rows)


def print_environment():
    """Print the environment in one line."""
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
