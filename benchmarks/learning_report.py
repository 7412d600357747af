"""Tables and curves of benchmarks/learning.py, from results/learning.csv.

A task is a data set, a number of its images and a network; the runs of a task differ in how they train. A run's time to backpropagation's accuracy
is the processor time after the first epoch in which the blocks' vote is at least what backpropagation ends with on the same task.
"""

import re

from benchmarks import plots, tables

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
KINDS = {"backprop": "backpropagation", "block": "block-wise", "stage": "stage-wise", "layer": "layer-wise"}
SHOWN = ("backprop", "paper", "grid-w2-lr4", "stage-w2-lr4", "layer-w2-lr4")  # in the curves
COMMAND = "python -m benchmarks.learning --root FOLDER"
README_TASK = ("cifar10", "resnet18", "16", "5000")


def runs():
    """{experiment: its rows by epoch}; of one that was run again the last run."""
    found = {}
    for row in tables.read("learning"):
        if row["epoch"] == "1":
            found[row["experiment"]] = []
        found.setdefault(row["experiment"], []).append(row)
    return found


def by_task():
    """{(dataset, model, width, images): {experiment: rows}}; a width only of networks that have one."""
    found = {}
    for name, rows in runs().items():
        found.setdefault(tuple(rows[-1][key] for key in ("dataset", "model", "width", "images")), {})[name] = rows
    return found


def described(task):
    dataset, model, width, images = task
    return f"{dataset}, {int(images):,} images, {model}" + (f" of width {width}" if model.startswith("resnet") else "")


def what(name):
    """The experiment's name without its task: "grid-w2-lr4-32" is "grid-w2-lr4"."""
    return re.sub(r"-(32|500|1000|all)$", "", name)


def kind(name):
    return "backprop" if "backprop" in name else next((k for k in ("stage", "layer") if k in name), "block")


def shown(experiments):
    """Those of a task that stand for a way to train, others of a table of their own left out."""
    return {name: rows for name, rows in experiments.items() if what(name) in SHOWN or what(name) not in LABELS}


def accuracy(rows):
    return float(rows[-1]["vote"])


def seconds(rows):
    return float(rows[-1]["seconds"])


def base_of(experiments):
    """The rows of the task's backpropagation, the better one of several; None without."""
    return max((rows for name, rows in experiments.items() if kind(name) == "backprop"), key=accuracy, default=None)


def reached(rows, wanted):
    """Seconds at the first epoch with this accuracy."""
    return next((float(row["seconds"]) for row in rows if float(row["vote"]) >= wanted), None)


def to_base(rows, base):
    """Seconds to the accuracy of the task's backpropagation, or None."""
    return None if base is None else reached(rows, accuracy(base))


def _body(experiments):
    base = base_of(experiments)
    for name, rows in experiments.items():
        last, blocks = rows[-1], [float(v) for v in rows[-1]["blocks"].split()]
        label = LABELS.get(what(name)) or (
            "backpropagation" if kind(name) == "backprop" else "block-wise, the defaults"
        )
        time = to_base(rows, base)
        yield (
            label, f"{accuracy(rows):.1%}", f"{float(last['last']):.1%}" if blocks else "", f"{max(blocks):.1%}" if blocks else "",
            f"{seconds(rows):.0f}", "not reached" if time is None else f"{time:.0f}",
        )  # fmt: skip


def table(task=README_TASK):
    """Everything of one task."""
    experiments = by_task().get(task)
    if not experiments:
        return tables.missing(COMMAND)
    header = ("what", "vote", "last block", "best block", "seconds", "seconds to backpropagation's accuracy")
    return tables.table(header, _body(experiments)) + tables.measured_on(next(iter(experiments.values()))[-1])


def every_table():
    """Everything of all tasks, a heading for each."""
    text = []
    for task, experiments in by_task().items():
        epochs = next(iter(experiments.values()))[-1]["epoch"]
        text.append(f"### {described(task)}, {epochs} epochs\n\n{table(task)}")
    return "\n\n".join(text) or tables.missing(COMMAND)


def _named(name):
    return KINDS[kind(name)] + (", paper's setting" if what(name) == "paper" else "")


def time_to_accuracy():
    """One table of all tasks: accuracy, and the time to backpropagation's in units of backpropagation's own."""
    body = []
    for task, experiments in by_task().items():
        base = base_of(experiments)
        for name, rows in shown(experiments).items():
            time, own = to_base(rows, base), to_base(base, base)
            cells = (described(task), rows[-1]["epoch"], _named(name), f"{accuracy(rows):.1%}", f"{seconds(rows):,.0f}")
            body.append((*cells, *(("not reached", "") if time is None else (f"{time:,.0f}", f"{time / own:.2f} x"))))
    if not body:
        return tables.missing(COMMAND)
    header = (
        "task",
        "epochs",
        "training",
        "accuracy",
        "seconds",
        "seconds to backpropagation's accuracy",
        "against it",
    )
    return tables.table(header, body)


def losses():
    """The runs that take longer to backpropagation's accuracy than backpropagation, or never come to it; worst first."""
    found = []
    for task, experiments in by_task().items():
        base = base_of(experiments)
        for name, rows in shown(experiments).items():
            time, own = to_base(rows, base), to_base(base, base)
            if base is None or kind(name) == "backprop" or (time is not None and time <= own):
                continue
            cells = (described(task), _named(name), f"{accuracy(rows):.1%}, {accuracy(base):.1%}")
            if time is None:
                found.append(((True, accuracy(base) - accuracy(rows)), (*cells, f"not reached, {own:,.0f}", "")))
            else:
                found.append(((False, time / own), (*cells, f"{time:,.0f}, {own:,.0f}", f"{time / own:.2f} x")))
    if not tables.read("learning"):
        return tables.missing(COMMAND)
    header = ("task", "training", "accuracy, backpropagation's", "seconds to it, backpropagation's", "against it")
    return tables.table(header, [cells for _, cells in sorted(found, key=lambda f: f[0], reverse=True)])


def drawn():
    """{name of the picture: (task, its runs)}: of every task with two runs or more."""
    found = {}
    for task, experiments in by_task().items():
        if len(some := shown(experiments)) > 1:
            found["learning-{}-{}-{}-{}.png".format(*task)] = task, some
    return found


def pictures():
    """Markdown of all curves."""
    lines = [f"![{described(task)}]({name})" for name, (task, _) in drawn().items()]
    return "\n".join(lines) or tables.missing(COMMAND)


def curves(folder):
    """FOLDER/learning-TASK.png: test accuracy over epochs and over seconds, for each task."""
    for picture, (task, experiments) in drawn().items():
        figure, (axes,) = plots.figure(1, 2, sharey=True)
        blocks = "9 blocks" if task[1] == "resnet18" else "blocks"
        labels = {"backprop": "backpropagation", "block": blocks, "stage": "4 stages", "layer": "17 layers"}
        for name, rows in experiments.items():
            label = labels[kind(name)] + (", paper's setting" if what(name) == "paper" else "")
            percent = [100 * float(row["vote"]) for row in rows]
            look = {"color": plots.COLOURS[kind(name)], "linewidth": 2, "label": f"{label}: {percent[-1]:.1f} %"}
            look["linestyle"] = ":" if what(name) == "paper" else "-"
            axes[0].plot([int(row["epoch"]) for row in rows], percent, **look)
            axes[1].plot([float(row["seconds"]) for row in rows], percent, **look)
        for axis, x in zip(axes, ("epoch", "processor seconds, one thread"), strict=True):
            axis.set_xlabel(x)
        axes[0].set_ylabel("test accuracy (%)")
        axes[0].legend(frameon=False, loc="lower right")
        figure.suptitle(described(task))
        plots.save(figure, f"{folder}/{picture}")
