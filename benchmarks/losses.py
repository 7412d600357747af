"""Makes a table of where fastff loses: every row of results/*.csv in which it takes more time or memory than what it is compared with.

The files are those that benchmarks/runner.py writes and results/swap-in.csv. A loss is listed if it is at least half a per cent. A contender is
compared with the base of its case and, by medians, with torch.compile if that was measured.
"""

from benchmarks import tables

OTHERS = (
    "eager",
    "compiled",
    "pytorch",
    "onednn",
    "forward",
    "by parts",
    "backprop",
)  # contenders that are not fastff; "backprop" also stands for its variants, such as "backprop, compiled"
LEAST = 1.005


def table():
    found, read = [], False
    for path in sorted(tables.RESULTS.glob("*.csv")):
        rows = tables.read(path.stem)
        read |= bool(rows) and ("contender" in rows[0] or path.stem == "swap-in")
        if rows and {"contender", "base"} <= rows[0].keys():
            found += _of_cases(path.stem, rows)
    found += _of_programs(tables.read("swap-in"))
    if not read:
        return tables.missing("make bench")
    worst = lambda loss: max(loss["time"] or 0, loss["memory"] or 0)  # noqa: E731
    body = [
        (
            f"`{loss['file']}`", loss["what"], loss["against"], _cell(loss["time"]), loss["between"] if loss["time"] else "",
            f"{_cell(loss['memory'])} ({loss['mib']})" if loss["memory"] else "",
        )
        for loss in sorted(found, key=worst, reverse=True)
        if worst(loss) >= LEAST
    ]  # fmt: skip
    if not body:
        return "Nowhere in these files."
    return tables.table(("results of", "what", "against", "time", "20 to 80 %", "peak memory"), body)


def _cell(ratio):
    """Format a ratio; it is empty if nothing is lost."""
    return f"{ratio:.2f} x" if ratio is not None and ratio >= LEAST else ""


def _loss(file, what, against, time, between, mib, base_mib):
    memory = mib / base_mib if mib and base_mib else None
    return {
        "file": file, "what": what, "against": against, "between": between, "mib": f"{mib:.1f} MiB against {base_mib:.1f}" if memory else "",
        "time": time if time >= LEAST else None, "memory": memory if memory and memory >= LEAST else None,
    }  # fmt: skip


def _of_cases(file, rows):
    keys = list(rows[0])[: list(rows[0]).index("contender")]
    for case in tables.grouped(rows, *keys).values():
        named = {row["contender"]: row for row in case}
        text = ", ".join(f"{key} {case[0][key]}" for key in keys if key != "axis" and case[0][key])
        for row in case:
            if row["contender"].split(",")[0] in OTHERS:
                continue
            mib = float(row["peak_mib"] or 0)
            for rival in dict.fromkeys((row["base"], "compiled")):
                if (other := named.get(rival)) is None:
                    continue
                time, between = float(row["ratio"]), f"{float(row['ratio_20']):.2f} to {float(row['ratio_80']):.2f}"
                if rival != row["base"]:
                    time, between = time / float(other["ratio"]), ""
                what = f"{row['contender']}: {text}"
                yield _loss(file, what, rival, time, between, mib, float(other["peak_mib"] or 0))


def _of_programs(rows):
    for row in rows:
        between = f"{1 / float(row['faster_80']):.2f} to {1 / float(row['faster_20']):.2f}"
        memory = float(row["peak_mib_after"]), float(row["peak_mib_before"])
        yield _loss("swap-in", row["what"], "the program before", 1 / float(row["faster"]), between, *memory)
