"""Markdown tables out of the CSV files in benchmarks/results."""

import csv
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def read(name):
    """Rows of results/NAME.csv, an empty list where there is none."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        return []
    with open(path) as file:
        return list(csv.DictReader(file))


def table(header, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def measured_on(row):
    """The line below a table: where its figures were measured."""
    return f"\n\n{row['device']}, {row['threads']} thread(s), torch {row['torch']}, commit {row['commit']}."


def missing(command):
    """What stands where nothing was measured."""
    return f"Not measured yet: `{command}`."


def grouped(rows, *keys):
    """{values of the keys: rows}, in the order of the file."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def faster(row):
    """Two cells: how many times as fast as the base, and its 20 to 80 %."""
    low, high = 1 / float(row["ratio_80"]), 1 / float(row["ratio_20"])
    return f"{1 / float(row['ratio']):.2f} x", f"{low:.2f} to {high:.2f}"


def slower(row):
    """Two cells: the time in units of the base's, and its 20 to 80 %."""
    return f"{float(row['ratio']):.2f} x", f"{float(row['ratio_20']):.2f} to {float(row['ratio_80']):.2f}"
