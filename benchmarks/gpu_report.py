"""Makes Markdown tables from the folder that benchmarks/gpu.py writes: benchmarks/results/gpu-DEVICE."""

import functools

from benchmarks import tables

CONTENDERS = (
    "eager",
    "compiled",
    "torch",
    "triton",
    "cuda",
)  # the first two are plain PyTorch, the last two our kernels
NUMBERS = [
    "error",
    "plain_error",
    "cold_us",
    "warm_us",
    "host_us",
    "launches",
    "ms",
    "host_ms",
    "device_ms",
    "peak_mib",
    "value",
    "accuracy",
    "ns",
]  # of a row, in the log


def short(row):
    """Return a row as a few words, for the log."""
    who = (
        row.get("contender")
        or row.get("implementation")
        or row.get("variant")
        or row.get("rate")
        or row.get("kernel")
        or ""
    )
    if row.get("state", "ok") != "ok":
        return f"{who} {row['state']}"
    return " ".join([who, *(f"{key} {_number(row[key])}" for key in NUMBERS if row.get(key) is not None)])


def _number(value):
    return f"{float(value):.3g}" if value not in (None, "") else ""


def rates(rows):
    return tables.table(("what", "rate"), [(r["rate"], f"{float(r['value']):,.0f} {r['unit']}") for r in rows])


def checks(rows):
    """Return a table with a line for each function: calls, those that were right, and the largest error beside PyTorch's."""
    body = []
    for (function, impl), group in tables.grouped(rows, "function", "implementation").items():
        refused = sum(row["state"].startswith("refused") for row in group)
        right = [row for row in group if row["state"] == "ok"]
        worst = max(
            (r for r in right if r["error"]), key=lambda r: float(r["error"]) / float(r["allowed"]), default=None
        )
        error = f"{float(worst['error']):.1e} ({worst['dtype']})" if worst else ""
        plain = f"{float(worst['plain_error']):.1e}" if worst and worst["plain_error"] else ""
        body.append((f"`{function}`", impl, len(group), len(right), refused, error, plain))
    return tables.table(("function", "implementation", "calls", "right", "refused", "error", "PyTorch's error"), body)


def kernels(rows, copy):
    """Return the table of the kernels in microseconds, cold, and the speed over the fastest plain PyTorch. `copy` is the rate in GB/s, or None."""
    present = [name for name in CONTENDERS if any(row["contender"] == name for row in rows)]
    body = []
    for key, group in tables.grouped(rows, *list(rows[0])[: list(rows[0]).index("contender")]).items():
        function, B, C, H, K, dtype, layout, options = key
        by = {row["contender"]: row for row in group}
        cold = {name: float(row["cold_us"]) for name, row in by.items() if row["cold_us"]}
        plain, ours = (
            min((cold[name] for name in part if name in cold), default=None)
            for part in (CONTENDERS[:2], CONTENDERS[3:])
        )
        states = {name: row["state"].split(":")[0] for name, row in by.items()}
        of = by.get("triton") or group[0]
        call = " ".join(filter(None, (f"{B}, {C}, {H}, {K};", dtype, layout.replace("channels_last", ""), options)))
        floor = f"{1e3 * float(of['mbytes']) / copy:.0f}" if copy and of["mbytes"] else ""
        times = (f"{cold[name]:.0f}" if name in cold else states.get(name, "") for name in present)
        faster = f"{plain / ours:.2f} x" if plain and ours else ""
        more = (_number(of[column]) for column in ("warm_us", "host_us", "launches"))
        body.append((f"`{function}`", call, floor, *times, faster, *more))
    header = ("function", "B, C, H, K", "floor", *present, "faster", "triton, warm", "its host time", "its launches")
    return tables.table(header, body)


def steps(rows):
    """Return the table of training steps; ratios to the fastest backpropagation of the same batch."""
    body = []
    for _, group in tables.grouped(rows, "batch").items():
        base = min((float(r["ms"]) for r in group if r["variant"].startswith("backprop")), default=None)
        for r in group:
            ratio = f"{float(r['ms']) / base:.2f} x" if base else ""
            cells = (f"{float(r[key]):.2f}" for key in ("ms", "host_ms", "device_ms"))
            body.append((r["batch"], r["variant"], *cells, r["launches"], f"{float(r['peak_mib']):,.0f} MiB", ratio))
    header = ("batch", "step", "ms", "host ms", "device ms", "launches", "peak memory", "time to the fastest backprop")
    return tables.table(header, body)


def learning(rows):
    cells = [(r["variant"], r["data"], r["epochs"], r["on"], f"{float(r['accuracy']):.1%}") for r in rows]
    return tables.table(("step", "data", "epochs", "on", "accuracy"), cells)


def counters(rows):
    """Return the table of what Nsight Compute counted."""
    body = []
    for r in rows:
        mb = [f"{float(r[key]) / 1e6:.1f}" if r[key] else "" for key in ("dram_read", "dram_written", "l2_bytes")]
        more = [_number(r[key]) for key in ("registers", "warps_percent", "tensor_percent", "hmma_percent")]
        call = f"`{r['function']}` {r['B']}, {r['C']}, {r['H']}, {r['K']}"
        body.append((call, r["kernel"][:40], f"{float(r['ns']) / 1e3:.1f}" if r["ns"] else "", *mb, *more))
    header = (
        "call",
        "kernel",
        "us",
        "MB read",
        "MB written",
        "MB of L2",
        "registers",
        "warps %",
        "tensor pipe %",
        "hmma %",
    )
    return tables.table(header, body)


def tables_of(folder):
    """Return the tables of all parts that a folder has."""
    found, reached = [], tables.read("rates", folder)
    copy = float(reached[0]["value"]) if reached else None
    of_kernels = "Kernels, microseconds on the device, inputs not in the L2 cache"
    for name, title, make in (
        ("rates", "What the device reaches", rates),
        ("check", "Checked against float64", checks),
        ("kernels", of_kernels, functools.partial(kernels, copy=copy)),
        ("steps", "Training steps of ResNet18, bfloat16, AdamW", steps),
        ("learning", "Learning", learning),
        ("counters", "Counted by Nsight Compute", counters),
    ):
        rows = tables.read(name, folder)
        if rows:
            found.append(f"{title}:\n\n{make(rows)}{tables.measured_on(rows[0])}")
    return "\n\n".join(found) or "Nothing was measured."


def table():
    """Return the tables of every device whose results are in benchmarks/results."""
    folders = sorted(path for path in tables.RESULTS.glob("gpu-*") if path.is_dir())
    if not folders:
        return f"{tables.missing('make gpu')} Nothing has run on a GPU so far."
    return "\n\n".join(f"**{folder.name.removeprefix('gpu-')}**\n\n{tables_of(folder)}" for folder in folders)
