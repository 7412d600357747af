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


def words(name):
    """channels_last as text."""
    return name.replace("_", " ")


def speedups(name, contender, header, cells, faster_than="faster than eager", against=None):
    """The table of results/NAME.csv, a line for each case: what `cells` makes of its rows {contender: row}, then how `contender` does.

    Its peak memory after the base's where that was measured; how many times as fast it is as the contenders of `against` ({name: heading}) and as
    torch.compile, as quotients of medians; and as the base, with 20 to 80 % of the rounds."""
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
        own = case[contender]
        peaks = (f"{float(case[base]['peak_mib']):.1f} to {float(own['peak_mib']):.1f} MiB",) if memory else ()
        ratios = (float(case[other]["ratio"]) / float(own["ratio"]) if other in case else None for other in others)
        quotients = ("" if ratio is None else f"{ratio:.2f} x" for ratio in ratios)
        body.append((*cells(case), *peaks, *quotients, *faster(own)))
    return table((*header, *memory, *others.values(), faster_than, "20 to 80 %"), body) + measured_on(rows[0])
