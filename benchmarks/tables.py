"""Makes Markdown tables from the CSV files in benchmarks/results."""

import csv
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def read(name, folder=None):
    """Return the rows of results/NAME.csv, or of this file in another folder, as dicts, or an empty list if there is no such file."""
    path = (folder or RESULTS) / f"{name}.csv"
    if not path.exists():
        return []
    with open(path) as file:
        return list(csv.DictReader(file))


def table(header, rows):
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def measured_on(row):
    """Return the line below a table that says where its numbers were measured."""
    return f"\n\n{row['device']}, {row['threads']} thread(s), torch {row['torch']}, commit {row['commit']}."


def missing(command):
    """Return the text for a table without measurements. `command` makes them."""
    return f"Not measured yet: `{command}`."


def grouped(rows, *keys):
    """Return {values of the keys: rows} in the order of the rows."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def faster(row):
    """Return two cells: speed-up over the base, and its 20 % to 80 % quantiles."""
    low, high = 1 / float(row["ratio_80"]), 1 / float(row["ratio_20"])
    return f"{1 / float(row['ratio']):.2f} x", f"{low:.2f} to {high:.2f}"


def slower(row):
    """Return two cells: time in units of the base's time, and its 20 % to 80 % quantiles."""
    return f"{float(row['ratio']):.2f} x", f"{float(row['ratio_20']):.2f} to {float(row['ratio_80']):.2f}"


def words(name):
    """Return a name as text: underscores become spaces."""
    return name.replace("_", " ")


def speedups(name, contender, header, cells, faster_than="faster than eager", against=None):
    """Return the table of results/NAME.csv, with a line for each case.

    A line has the cells of cells({contender: row}), then the peak memory of the base and of `contender` if it was measured, then the speed-ups
    of `contender`: over torch.compile and the contenders of `against` ({name: heading}) as quotients of medians, and over the base with the 20 %
    to 80 % quantiles of the rounds."""
    rows = read(name)
    if not rows:
        return missing(f"python -m benchmarks.{name} --csv benchmarks/results/{name}.csv")
    keys = list(rows[0])[: list(rows[0]).index("contender")]
    cases = [{row["contender"]: row for row in case} for case in grouped(rows, *keys).values()]
    base = rows[0]["base"]
    others = {
        k: v for k, v in ({"compiled": "than compiled"} | (against or {})).items() if any(k in case for case in cases)
    }
    memory = ("peak memory",) if cases[0][contender]["peak_mib"] else ()
    body = []
    for case in cases:
        ours = case[contender]
        peaks = (f"{float(case[base]['peak_mib']):.1f} to {float(ours['peak_mib']):.1f} MiB",) if memory else ()
        ratios = (float(case[other]["ratio"]) / float(ours["ratio"]) if other in case else None for other in others)
        quotients = ("" if ratio is None else f"{ratio:.2f} x" for ratio in ratios)
        body.append((*cells(case), *peaks, *quotients, *faster(ours)))
    return table((*header, *memory, *others.values(), faster_than, "20 to 80 %"), body) + measured_on(rows[0])
