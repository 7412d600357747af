"""Fills the tables of README.md and docs/ from the CSV files in benchmarks/results, and draws the curves of learning and of scale.

    python -m benchmarks.report

A table stands between the lines `<!-- table NAME -->` and `<!-- end -->` and is replaced whole, so that no figure is typed by hand.
"""

import csv
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LABELS = {
    "backprop": "backpropagation (global average, linear classifier)",
    "backprop-lr4": "the same at learning rate 4e-3",
    "paper": "9 blocks, the paper's head (squares, scale 1)",
    "scale4": "9 blocks, squares, scale 4",
    "grid": "9 blocks, squares and spatial term (grid=4)",
    "grid-only": "9 blocks, spatial term alone",
    "grid-lr4": "9 blocks, grid=4, learning rate 4e-3",
    "grid-w2-lr4": "**9 blocks, grid=4, window=2, learning rate 4e-3 (the defaults)**",
    "grid-w3-lr4": "9 blocks, grid=4, window=3, learning rate 4e-3",
    "stage-lr4": "4 stages, grid=4, learning rate 4e-3",
    "stage-w2-lr4": "4 stages, grid=4, window=2, learning rate 4e-3",
    "layer-w2-lr4": "17 layers, the defaults",
    "grid-w2-smooth": "9 blocks, grid=4, window=2, learning rate 2e-3, label smoothing 0.1",
    "grid-w2-tau": "9 blocks, grid=4, window=2, learning rate 2e-3, a learned temperature",
    "grid-w2-lr4-wd20": "the defaults with weight decay 0.2",
}
COLOURS = {"backprop": "#555555", "block": "#0072B2", "stage": "#D55E00", "layer": "#009E73"}


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
    return f"\n\n{row['device']}, {row['threads']} thread(s), torch {row['torch']}, commit {row['commit']}."


def goodness_table():
    rows = read("goodness")
    if not rows:
        return "Not measured yet: run `make bench`."
    body = [
        (
            f"{r['B']}, {r['C']}, {r['H']}, {r['K']}", r["layout"].replace("_", " "), r["algorithm"].replace("_", " "),
            f"{float(r['speedup']):.2f} x", f"{float(r['speedup_20']):.2f} to {float(r['speedup_80']):.2f}",
        )
        for r in rows
    ]  # fmt: skip
    return table(("B, C, H, K", "layout", "algorithm", "faster than eager", "20 to 80 %"), body) + measured_on(rows[0])


def speedup_table(name, columns, header):
    """Of a CSV with speedup columns: `columns` gives the cells before them."""
    rows = read(name)
    if not rows:
        return f"Not measured yet: run `python -m benchmarks.{name} --csv benchmarks/results/{name}.csv`."
    body = [
        (*columns(r), f"{float(r['speedup']):.2f} x", f"{float(r['speedup_20']):.2f} to {float(r['speedup_80']):.2f}")
        for r in rows
    ]
    return table((*header, "faster", "20 to 80 %"), body) + measured_on(rows[0])


def tail_table():
    columns = lambda r: (  # noqa: E731
        f"{r['B']}, {r['C']}, {r['H']}, {r['K']}", r["layout"].replace("_", " "), r["residual"], f"{float(r['against_parts']):.2f} x",
    )  # fmt: skip
    return speedup_table("tail", columns, ("B, C, H, K", "layout", "residual", "than by parts"))


def depthwise_table():
    columns = lambda r: (  # noqa: E731
        f"{r['B']}, {r['C']}, {r['H']}", f"{r['kernel']} x {r['kernel']}, stride {r['stride']}", r["layout"].replace("_", " "), r["gradients"],
    )  # fmt: skip
    return speedup_table("depthwise", columns, ("B, C, H", "filters", "layout", "forward and gradient of"))


def convolution_table():
    columns = lambda r: (  # noqa: E731
        f"{r['B']}, {r['C']}, {r['H']}, {r['D']}", f"{r['kernel']} x {r['kernel']}, stride {r['stride']}",
        *(f"{float(r[f'{who}_gflops']):.0f}" for who in ("fastff", "onednn", "forward")),
    )  # fmt: skip
    header = ("B, C, H, D", "filters", "fastff, GFLOP/s", "oneDNN, GFLOP/s", "oneDNN's forward pass")
    return speedup_table("convolution", columns, header)


def step_table(*names):
    found = [(name, rows) for name in names if (rows := read(name))]
    if not found:
        return "Not measured yet: run `make bench`."
    text = []
    for _, rows in found:
        r = rows[0]
        body = [
            (
                row["variant"],
                row["layout"].replace("_", " "),
                f"{float(row['ratio']):.2f} x",
                f"{float(row['ratio_20']):.2f} to {float(row['ratio_80']):.2f}",
                f"{float(row['peak_mib']):.0f} MiB",
            )
            for row in rows
        ]
        title = f"{r['model']}, width {r['width']}, batch {r['batch']}, {r['size']} x {r['size']}, {r['classes']} classes; ratios to {r['base']}:\n\n"
        text.append(title + table(("variant", "layout", "time", "20 to 80 %", "peak memory"), body))
    return "\n\n".join(text) + measured_on(found[-1][1][0])


def budget_table():
    rows = read("budget")
    if not rows:
        return "Not measured yet: run `make bench`."
    parts = list(dict.fromkeys(row["part"] for row in rows))
    found = {(row["variant"], row["part"]): row for row in rows}
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    body = []
    for part in parts:
        cells = [part]
        for variant in variants:
            row = found.get((variant, part))
            cells += ["", "", ""] if row is None else [
                f"{float(row['milliseconds']):.1f} ({float(row['share']):.0%})", f"{float(row['gflop']):.2f}", f"{float(row['mbyte']):.0f}",
            ]  # fmt: skip
        body.append(cells)
    header = ["part", *(f"{variant}, {unit}" for variant in variants for unit in ("ms", "GFLOP", "MB"))]
    return table(header, body) + measured_on(rows[0])


def classes_table():
    rows = read("classes")
    if not rows:
        return "Not measured yet: run `python -m benchmarks.classes --csv benchmarks/results/classes.csv`."
    found = {(row["variant"], row["classes"]): row for row in rows}
    variants, classes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("variant", "classes"))
    body = []
    for count in classes:
        cells = [f"{int(count):,}"]
        for variant in variants:
            row = found[variant, count]
            cells += [f"{float(row['ratio']):.2f} x", f"{float(row['peak_mib']):.0f} MiB"]
        body.append(cells)
    return table(["classes", *(f"{v}, {what}" for v in variants for what in ("time", "memory"))], body) + measured_on(
        rows[0]
    )


def swap_in_table():
    rows = read("swap-in")
    if not rows:
        return "Not measured yet: run `python -m benchmarks.swap_in --csv benchmarks/results/swap-in.csv`."
    body = [
        (
            row["what"],
            f"{float(row['faster']):.2f} x",
            f"{float(row['faster_20']):.2f} to {float(row['faster_80']):.2f}",
            f"{float(row['peak_mib_before']):.1f} to {float(row['peak_mib_after']):.1f} MiB",
            f"{float(row['accuracy_before']):.1%} and {float(row['accuracy_after']):.1%}",
            row["lines"],
        )
        for row in rows
    ]
    header = ("style", "faster", "20 to 80 %", "peak memory", f"accuracy after {rows[0]['epochs']} epochs", "lines")
    return table(header, body) + measured_on(rows[0])


def runs():
    """{experiment: its rows by epoch}; of one that was run again the last run."""
    found = {}
    for row in read("learning"):
        if row["epoch"] == "1":
            found[row["experiment"]] = []
        found.setdefault(row["experiment"], []).append(row)
    return found


def base_of(rows, all_runs):
    """The backpropagation run of the same task."""
    keys = ("dataset", "model", "width", "images")
    same = [r for name, r in all_runs.items() if "backprop" in name and all(r[-1][k] == rows[-1][k] for k in keys)]
    return max(same, key=lambda r: float(r[-1]["vote"]), default=None)


def reached(rows, accuracy):
    """Seconds at the first epoch with this accuracy."""
    return next((float(row["seconds"]) for row in rows if float(row["vote"]) >= accuracy), None)


def learning_table(width="16", images="5000", dataset="cifar10", model="resnet18"):
    every = runs()
    body = []
    for name, rows in every.items():
        last = rows[-1]
        if (last["width"], last["images"], last["dataset"], last["model"]) != (width, images, dataset, model):
            continue
        base = base_of(rows, every)
        seconds = None if base is None else reached(rows, float(base[-1]["vote"]))
        blocks = [float(v) for v in last["blocks"].split()]
        task_free = re.sub(r"-(32|500|1000)$", "", name)
        label = LABELS.get(task_free, task_free)
        if dataset != "cifar10" or model != "resnet18":
            label = "backpropagation" if "backprop" in name else "block-wise, the defaults"
        body.append((
            label, f"{float(last['vote']):.1%}", f"{float(last['last']):.1%}" if blocks else "", f"{max(blocks):.1%}" if blocks else "",
            f"{float(last['seconds']):.0f}", "not reached" if seconds is None else f"{seconds:.0f}",
        ))  # fmt: skip
    return table(("what", "vote", "last block", "best block", "seconds", "seconds to backpropagation's accuracy"), body)


def learning_tables():
    every = runs()
    tasks = list(
        dict.fromkeys((r[-1]["width"], r[-1]["images"], r[-1]["dataset"], r[-1]["model"]) for r in every.values())
    )
    text = []
    for width, images, dataset, model in tasks:
        epochs = next(
            r[-1]["epoch"]
            for r in every.values()
            if (r[-1]["width"], r[-1]["images"], r[-1]["dataset"], r[-1]["model"]) == (width, images, dataset, model)
        )
        size = f" of width {width}" if model.startswith("resnet") else ""
        text.append(
            f"### {dataset}, {int(images):,} images, {model}{size}, {epochs} epochs\n\n"
            + learning_table(width, images, dataset, model)
        )
    return "\n\n".join(text) + measured_on(next(iter(every.values()))[-1])


def curves():
    """docs/learning-TASK.png: test accuracy over epochs and over seconds, for each task."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    every = runs()
    tasks = {}
    for name, rows in every.items():
        last = rows[-1]
        tasks.setdefault((last["dataset"], last["model"], last["width"], last["images"]), []).append(name)
    shown = ("backprop", "paper", "grid-w2-lr4", "stage-w2-lr4", "layer-w2-lr4")
    for (dataset, model, width, images), names in tasks.items():
        names = [
            n
            for n in names
            if dataset != "cifar10" or model != "resnet18" or re.sub(r"-(32|500|1000)$", "", n) in shown
        ]
        if len(names) < 2:
            continue
        figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
        for name in names:
            rows = every[name]
            kind = "backprop" if "backprop" in name else next((k for k in ("stage", "layer") if k in name), "block")
            style = ":" if name.startswith("paper") else "-"
            label = {
                "backprop": "backpropagation",
                "block": "9 blocks" if model == "resnet18" else "blocks",
                "stage": "4 stages",
                "layer": "17 layers",
            }[kind]
            label += ", paper's setting" if name.startswith("paper") else ""
            accuracy = [100 * float(r["vote"]) for r in rows]
            for axis, x in zip(
                axes, ([int(r["epoch"]) for r in rows], [float(r["seconds"]) for r in rows]), strict=True
            ):
                axis.plot(x, accuracy, style, color=COLOURS[kind], label=f"{label}: {accuracy[-1]:.1f} %", linewidth=2)
        for axis, x in zip(axes, ("epoch", "processor seconds, one thread"), strict=True):
            axis.set_xlabel(x)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].set_ylabel("test accuracy (%)")
        axes[0].legend(frameon=False, loc="lower right")
        size = f" of width {width}" if model.startswith("resnet") else ""
        figure.suptitle(f"{dataset}, {int(images):,} training images, {model}{size}")
        figure.savefig(ROOT / "docs" / f"learning-{dataset}-{model}-{width}-{images}.png", dpi=110)
        plt.close(figure)


def roofline_table():
    header = ("B, C, H, K", "algorithm", "MB", "GFLOP", "bound by", "predicted us", "floor us", "x floor")
    body = [
        (
            f"{r['B']}, {r['C']}, {r['H']}, {r['K']}", r["algorithm"].replace("_", " "), f"{float(r['mbytes']):.0f}",
            f"{float(r['gflop']):.1f}", r["bound"], f"{float(r['total_us']):.0f}", f"{float(r['floor_us']):.0f}",
            f"{float(r['times_floor']):.2f}",
        )
        for r in read("roofline")
    ]  # fmt: skip
    return table(header, body)


def scale_table(devices=(8, 1024)):
    """Of results/scale.csv, the rows of some numbers of devices."""
    rows = read("scale")
    if not rows:
        return "Not computed yet: run `python -m benchmarks.scale --csv benchmarks/results/scale.csv`."
    methods, r = list(dict.fromkeys(row["method"] for row in rows)), rows[0]
    found = {(row["faster"], row["link"], row["devices"], row["method"]): row for row in rows}
    body = []
    for faster, link in dict.fromkeys((row["faster"], row["link"]) for row in rows):
        for count in map(str, devices):
            cells = [link, f"{float(faster):g} x", f"{int(count):,}"]
            for method in methods:
                row = found.get((faster, link, count, method))
                text = "" if row is None else f"{float(row['efficiency']):.0%}"
                if row is not None and "2-D" in method:
                    most = f"{float(row['mbytes_sent']):.0f} MB, {float(row['memory_mib']):,.0f} MiB"
                    text += f" ({row['data']} x {row['stages']}: {float(row['images_per_second']):,.0f}/s, {most})"
                cells.append(text)
            body.append(cells)
    width = f", width {r['width']}" if r["model"].startswith("resnet") else ""
    title = (
        f"{r['model']}{width}, {r['granularity']} granularity, {float(r['batch']):g} images a device, Adam, {r['all_reduce']} all-reduce. "
        f"Efficiency against one device; 2-D: replicas x stages of the fastest split, images/s, and of the devices with most the MB sent a step "
        f"and the MiB of memory. Computing 1 x as fast as one core of the machine below, the other speeds are assumed:\n\n"
    )
    return title + table(("link", "computing", "devices", *methods), body) + measured_on(r)


def scale_measured_table():
    from benchmarks.scale import label

    rows = read("scale-measured")
    if not rows:
        return (
            "Not measured yet: run `python -m benchmarks.scale --measure --csv benchmarks/results/scale-measured.csv`."
        )
    percent = lambda text, digits=0: f"{float(text):+.{digits}%}" if text else ""  # noqa: E731
    number = lambda text, digits=1: f"{float(text):.{digits}f}" if text else ""  # noqa: E731
    header = (
        "processes",
        "what",
        "ms a step",
        "20 to 80 %",
        "predicted",
        "off",
        "slowed",
        "off",
        "MB sent",
        "predicted",
        "off",
    )
    text = []
    for batch in dict.fromkeys(row["batch"] for row in rows):
        own = [row for row in rows if row["batch"] == batch]
        body = [
            (
                r["processes"], label(r), number(r["milliseconds"]), f"{number(r['milliseconds_20'])} to {number(r['milliseconds_80'])}",
                number(r["predicted"]), percent(r["error"]), number(r["slowed"]), percent(r["slowed_error"]),
                number(r["mbytes"], 3), number(r["predicted_mbytes"], 3), percent(r["bytes_error"], 2),
            )
            for r in own
        ]  # fmt: skip
        r = own[0]
        title = f"{r['model']}, width {r['width']}, {r['size']} x {r['size']}, {r['classes']} classes, {batch} images a process:\n\n"
        text.append(title + table(header, body))
    return "\n\n".join(text) + measured_on(rows[0])


def scale_plot():
    """docs/scale.png: efficiency over the number of devices, a panel for each link and each speed of the devices but one core's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in read("scale") if float(row["faster"]) != 1]
    if not rows:
        return
    speeds, links = (list(dict.fromkeys(row[key] for row in rows)) for key in ("faster", "link"))
    size = (3.9 * len(links), 3.1 * len(speeds) + 0.8)
    figure, axes = plt.subplots(
        len(speeds), len(links), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    styles = {"data": "-", "DDP": "-", "blocks": ":", "1F1B": ":", "2-D": "--"}
    for faster, line in zip(speeds, axes, strict=True):
        for link, axis in zip(links, line, strict=True):
            for method in dict.fromkeys(row["method"] for row in rows):
                own = [r for r in rows if (r["faster"], r["link"], r["method"]) == (faster, link, method)]
                kind, split = method.split(", ")
                colour = COLOURS["block" if kind == "SFF" else "backprop"]
                label = method.replace("backprop", "backpropagation").replace("2-D", "best of all splits")
                x, y = ([float(r[key]) for r in own] for key in ("devices", "efficiency"))
                axis.plot(x, [100 * v for v in y], styles[split], color=colour, linewidth=2, label=label)
            axis.set_title(f"{link}\ndevices {float(faster):g} x one core (assumed)", fontsize=9)
            axis.set_xscale("log", base=2)
            axis.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
            axis.set_ylim(0, 105)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("devices")
    for line in axes:
        line[0].set_ylabel("efficiency against one (%)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    r = rows[0]
    width = f" of width {r['width']}" if r["model"].startswith("resnet") else ""
    figure.suptitle(f"A model of scale: {r['model']}{width}, {float(r['batch']):g} images a device")
    figure.savefig(ROOT / "docs" / "scale.png", dpi=110)
    plt.close(figure)


TABLES = {
    "roofline": roofline_table,
    "goodness": goodness_table,
    "tail": tail_table,
    "depthwise": depthwise_table,
    "convolution": convolution_table,
    "step": lambda: step_table("step"),
    "steps": lambda: step_table("step", "step-16", "step-mobilenet"),
    "budget": budget_table,
    "classes": classes_table,
    "swap-in": swap_in_table,
    "scale": scale_table,
    "scale-measured": scale_measured_table,
    "learning": lambda: learning_table(),
    "learning-all": learning_tables,
}


def fill(path):
    """Replace the tables in one file."""
    text = path.read_text()

    def replaced(match):
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    path.write_text(re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", replaced, text, flags=re.DOTALL))


def main():
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        fill(path)
    curves()
    scale_plot()


if __name__ == "__main__":
    main()
