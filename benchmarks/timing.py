"""CSV and the environment line, shared by the benchmarks. Timing itself: fastff/bench.py."""

import csv
from pathlib import Path

from benchmarks.environment import environment


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
