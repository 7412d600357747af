"""Makes summaries from the CSV files: a table with a line for each kernel, and one with a line for each network."""

from benchmarks import step, tables

LAYOUT = "channels_last"
# {CSV file: (contender, op, base, [columns and values of a row that is shown])}
KERNELS = {
    "goodness": ("fastff", "goodness, loss, all gradients", "eager", [
        {"B": 8, "C": 64, "H": 56, "K": 1000}, {"B": 32, "C": 64, "H": 32, "K": 100}, {"B": 32, "C": 64, "H": 32, "K": 10},
        {"B": 32, "C": 128, "H": 16, "K": 100}, {"B": 32, "C": 512, "H": 4, "K": 10}, {"B": 8, "C": 960, "H": 7, "K": 1000},
    ]),
    "epilogue": ("fused", "epilogue of a block with its goodness step", "eager", [
        {"B": 32, "C": 64, "H": 32, "K": 100, "residual": "gradient"}, {"B": 32, "C": 256, "H": 8, "K": 100, "residual": "gradient"},
    ]),
    "layer_norm": ("fastff", "layer normalisation of a sample", "F.layer_norm", [{"B": 32, "C": 64, "H": 32, "over": "sample"}]),
    "group_goodness": ("fastff", "goodness without weights", "eager", [
        {"family": "hinton", "B": 64, "C": 256}, {"family": "cwcomp", "B": 64, "H": 32}, {"family": "deeperforward", "B": 64, "H": 8},
    ]),
    "convolution": ("fastff", "convolution", "oneDNN", [
        {"B": 32, "C": 64, "H": 32, "D": 64, "pass": "forward"}, {"B": 32, "C": 128, "H": 16, "D": 128, "pass": "gradient of the weight"},
    ]),
    "depthwise": ("fastff", "depthwise convolution, both gradients", "PyTorch", [
        {"B": 32, "C": 96, "H": 28, "kernel": 5, "gradients": "x and weight"}, {"B": 32, "C": 240, "H": 14, "gradients": "x and weight"},
    ]),
}  # fmt: skip


def kernels():
    """Return the table of kernels: a few shapes of each, in channels_last."""
    body, measured = [], {}
    for name, (contender, op, base, wanted) in KERNELS.items():
        rows = [
            row for row in tables.read(name) if row.get("layout", LAYOUT) == LAYOUT and row["contender"] == contender
        ]
        for columns in wanted:
            row = next((r for r in rows if all(r[key] == str(value) for key, value in columns.items())), None)
            if row is None:
                continue
            shape = ", ".join(
                f"{key} {row[key]}"
                for key in list(row)[: list(row).index("contender")]
                if key not in ("layout", "algorithm", "stride")
            )
            body.append((op, shape, base, *tables.faster(row)))
            measured.setdefault(tables.measured_on(row), []).append(name)
    if not body:
        return tables.missing("make bench")
    notes = "".join(
        note if len(measured) == 1 else f"{note} ({', '.join(dict.fromkeys(names))})"
        for note, names in measured.items()
    )
    return tables.table(("op", "shape", "against", "faster", "20 to 80 %"), body) + notes


def steps():
    """Return the table of whole steps: time and memory of each granularity against the fastest backpropagation."""
    body, measured = [], {}
    for name in step.written():
        rows = {row["contender"]: row for row in tables.read(f"step-{name}")}
        first = next(iter(rows.values()))
        cells = [step.title(first), f"{float(rows[first['base']]['peak_mib']):.0f} MiB"]
        others = [float(r["peak_mib"]) for key, r in rows.items() if key.startswith("backprop")]
        cells.append(f"{min(others):.0f} MiB")
        for granularity in ("layer", "block", "stage", "defaults"):
            row = rows.get(granularity)
            cells.append("" if row is None else f"{float(row['ratio']):.2f} x, {float(row['peak_mib']):.0f} MiB")
        body.append(cells)
        measured.setdefault(tables.measured_on(first), []).append(name)
    if not body:
        return tables.missing("make bench")
    header = ("network", "backprop", "its least memory", "layer", "block", "stage", "defaults")
    notes = "".join(note if len(measured) == 1 else f"{note} ({', '.join(names)})" for note, names in measured.items())
    return tables.table(header, body) + notes
