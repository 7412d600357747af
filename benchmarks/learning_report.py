"""Makes the tables and curves of benchmarks/learning.py from results/learning.csv.

A task is a data set, a number of its images and a network. The runs of a task differ in the training. The "time to backpropagation's accuracy" of a
run is the processor time up to the end of the first epoch in which the vote of its blocks reaches the final accuracy of backpropagation on the same
task.
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
    "grid-w2-lr4": "**9 blocks, grid=4, window=2, learning rate 4e-3 (the defaults of 0.1)**",
    "backprop-muon": "backpropagation, Muon",
    "grid-muon": "9 blocks, grid=4, learning rate 4e-3, Muon",
    "grid-w2-muon": "the defaults of 0.1, Muon",
    "stage-muon": "4 stages, grid=4, learning rate 4e-3, Muon",
    "stage-w2-muon": "4 stages, grid=4, window=2, learning rate 4e-3, Muon",
    "grid-w3-lr4": "9 blocks, grid=4, window=3, learning rate 4e-3",
    "stage-lr4": "4 stages, grid=4, learning rate 4e-3",
    "stage-w2-lr4": "4 stages, grid=4, window=2, learning rate 4e-3",
    "layer-w2-lr4": "17 layers, the defaults of 0.1",
    "grid-w2-smooth": "9 blocks, grid=4, window=2, learning rate 2e-3, label smoothing 0.1",
    "grid-w2-tau": "9 blocks, grid=4, window=2, learning rate 2e-3, a learned temperature",
    "grid-w2-lr4-wd20": "the defaults of 0.1 with weight decay 0.2",
}
KINDS = {"backprop": "backpropagation", "block": "block-wise", "stage": "stage-wise", "layer": "layer-wise"}
SHOWN = ("backprop", "paper", "grid-w2-lr4", "stage-w2-lr4", "layer-w2-lr4")  # runs in the curves
COMMAND = "python -m benchmarks.learning --root FOLDER"


def runs():
    """Return {experiment: rows, one for each epoch}. If an experiment was run again, only its last run is returned."""
    found = {}
    for row in tables.read("learning"):
        if row["epoch"] == "1":
            found[row["experiment"]] = []
        found.setdefault(row["experiment"], []).append(row)
    return found


def by_task():
    """Return {(dataset, model, width, images): {experiment: rows}}."""
    found = {}
    for name, rows in runs().items():
        found.setdefault(tuple(rows[-1][key] for key in ("dataset", "model", "width", "images")), {})[name] = rows
    return found


def task_title(task):
    dataset, model, width, images = task
    return f"{dataset}, {int(images):,} images, {model}" + (f" of width {width}" if model.startswith("resnet") else "")


def what(name):
    """Return the name of an experiment without its task: "grid-w2-lr4" for "grid-w2-lr4-32"."""
    return re.sub(r"-(32|500|1000|all)$", "", name)


def kind(name):
    return "backprop" if "backprop" in name else next((k for k in ("stage", "layer") if k in name), "block")


def shown(experiments):
    """Return the experiments of a task that appear in the curves and in the tables of all tasks."""
    return {name: rows for name, rows in experiments.items() if what(name) in SHOWN or what(name) not in LABELS}


def accuracy(rows):
    return float(rows[-1]["vote"])


def seconds(rows):
    return float(rows[-1]["seconds"])


def base_of(experiments):
    """Return the rows of the task's backpropagation, the most accurate one of several, or None if there is none."""
    return max((rows for name, rows in experiments.items() if kind(name) == "backprop"), key=accuracy, default=None)


def reached(rows, wanted):
    """Return the seconds up to the end of the first epoch with at least this accuracy, or None."""
    return next((float(row["seconds"]) for row in rows if float(row["vote"]) >= wanted), None)


def to_base(rows, base):
    """Return the seconds to the accuracy of the task's backpropagation, or None if it is not reached."""
    return None if base is None else reached(rows, accuracy(base))


def _body(experiments):
    base = base_of(experiments)
    for name, rows in experiments.items():
        last, blocks = rows[-1], [float(v) for v in rows[-1]["blocks"].split()]
        label = LABELS.get(what(name)) or (
            "backpropagation" if kind(name) == "backprop" else "block-wise, the defaults of 0.1"
        )
        time = to_base(rows, base)
        yield (
            label, f"{accuracy(rows):.1%}", f"{float(last['last']):.1%}" if blocks else "", f"{max(blocks):.1%}" if blocks else "",
            f"{seconds(rows):.0f}", "not reached" if time is None else f"{time:.0f}",
        )  # fmt: skip


def table(task):
    """Return the table of all runs of one task."""
    experiments = by_task().get(task)
    if not experiments:
        return tables.missing(COMMAND)
    header = ("what", "vote", "last block", "best block", "seconds", "seconds to backpropagation's accuracy")
    return tables.table(header, _body(experiments)) + tables.measured_on(next(iter(experiments.values()))[-1])


def every_table():
    """Return the tables of all tasks, with a heading for each."""
    text = []
    for task, experiments in by_task().items():
        epochs = next(iter(experiments.values()))[-1]["epoch"]
        text.append(f"### {task_title(task)}, {epochs} epochs\n\n{table(task)}")
    return "\n\n".join(text) or tables.missing(COMMAND)


def _kind_label(name):
    return KINDS[kind(name)] + (", paper's setting" if what(name) == "paper" else "")


def time_to_accuracy():
    """Return one table of all tasks: accuracies, and times to backpropagation's accuracy in units of backpropagation's time."""
    body = []
    for task, experiments in by_task().items():
        base = base_of(experiments)
        for name, rows in shown(experiments).items():
            time, base_time = to_base(rows, base), to_base(base, base)
            cells = (
                task_title(task),
                rows[-1]["epoch"],
                _kind_label(name),
                f"{accuracy(rows):.1%}",
                f"{seconds(rows):,.0f}",
            )
            body.append(
                (*cells, *(("not reached", "") if time is None else (f"{time:,.0f}", f"{time / base_time:.2f} x")))
            )
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
    """Return the table of runs that reach backpropagation's accuracy later than backpropagation, or never; the worst are first."""
    found = []
    for task, experiments in by_task().items():
        base = base_of(experiments)
        for name, rows in shown(experiments).items():
            time, base_time = to_base(rows, base), to_base(base, base)
            if base is None or kind(name) == "backprop" or (time is not None and time <= base_time):
                continue
            cells = (task_title(task), _kind_label(name), f"{accuracy(rows):.1%}, {accuracy(base):.1%}")
            if time is None:
                found.append(((True, accuracy(base) - accuracy(rows)), (*cells, f"not reached, {base_time:,.0f}", "")))
            else:
                found.append(
                    ((False, time / base_time), (*cells, f"{time:,.0f}, {base_time:,.0f}", f"{time / base_time:.2f} x"))
                )
    if not tables.read("learning"):
        return tables.missing(COMMAND)
    header = ("task", "training", "accuracy, backpropagation's", "seconds to it, backpropagation's", "against it")
    return tables.table(header, [cells for _, cells in sorted(found, key=lambda f: f[0], reverse=True)])


def drawn():
    """Return {name of a picture: (task, experiments)} for every task with at least two runs."""
    found = {}
    for task, experiments in by_task().items():
        if len(some := shown(experiments)) > 1:
            found["learning-{}-{}-{}-{}.png".format(*task)] = task, some
    return found


def pictures():
    """Return Markdown that shows all curves."""
    lines = [f"![{task_title(task)}]({name})" for name, (task, _) in drawn().items()]
    return "\n".join(lines) or tables.missing(COMMAND)


def curves(folder):
    """Draw test accuracy over epochs and over seconds for each task, into FOLDER/learning-TASK.png."""
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
        figure.suptitle(task_title(task))
        plots.save(figure, f"{folder}/{picture}")
