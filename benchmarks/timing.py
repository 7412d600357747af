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
    Path(path).unlink(missing_ok=True)
    append_csv(path, rows)
    print(f"wrote {path}")


def append_csv(path, rows):
    """Add rows (dicts), each with the columns of the environment, to the file `path`, whose columns are those of the first rows that it got."""
    info, path = environment(), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", newline="") as file:
        file.seek(0)
        columns = next(csv.reader(file), None)
        writer = csv.DictWriter(file, columns or [*dict.fromkeys(key for row in rows for key in row), *info])
        if columns is None:
            writer.writeheader()
        writer.writerows(row | info for row in rows)


def print_environment():
    """Print the environment in one line."""
    print(", ".join(f"{key} {value}" for key, value in environment().items()))
