"""What plans, heads and updates learn, and what they cost: accuracy, processor time and peak memory, against backpropagation.

    python -m benchmarks.plans --root FOLDER                    every experiment that has no row in results/plans.csv yet
    python -m benchmarks.plans --root FOLDER --only NAME...     these experiments
    python -m benchmarks.plans --table                          the tables of the rows that there are

An experiment is what `fastff train` does with the same settings: random crops and flips, cosine schedule, the whole test set. One thread; seconds are
processor time of training, without evaluation; memory is that of a step above parameters and optimizer state. One row an experiment and seed. A
network that another experiment starts from (transfer) is kept in FOLDER/runs.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import torch

from benchmarks import extra_losses, tables
from benchmarks.timing import environment
from fastff.app import compare, experiment

RESULTS = tables.RESULTS / "plans.csv"
PART = {"data": "cifar10", "subset": 20000, "epochs": 4}
FEW = PART | {"subset": 5000, "epochs": 16}
THREE = {"plan": "1,3,8"}  # the plan by default until a segment could take a minibatch in parts
ALL = PART | THREE | {"subset": None, "epochs": 6}
BACKPROP = {"mode": "backprop"}
PAPER = {"granularity": "block", "window": 1, "grid": 0, "hidden": 0, "scale": 1.0, "vote": "goodness"}
OLD = {"granularity": "block", "window": 2, "hidden": 0, "vote": "softmax", "optimizer": "adamw"}  # the defaults of 0.1

EXPERIMENTS = {
    "backpropagation, AdamW": PART | BACKPROP | {"optimizer": "adamw"},
    "backpropagation, Muon": PART | BACKPROP,
    "the paper's setting, AdamW": PART | PAPER | {"optimizer": "adamw"},
    "the defaults of 0.1": PART | OLD,
    "two segments, the first in two parts (the defaults)": PART,
    "the defaults and similarity matching": PART | {"similarity": 99},
    "the defaults and similarity matching, weight 1": PART | {"similarity": 1},
    "the defaults and a kinetic penalty": PART | {"kinetic": 0.5},
    "the defaults and a kinetic penalty, weight 0.05": PART | {"kinetic": 0.05},
    "the defaults and the vote of the epoch before": PART | {"vote_before": 0.5},
    "the defaults and the vote of the epoch before, weight 0.2": PART | {"vote_before": 0.2},
    "three segments": PART | THREE,
    "three segments, AdamW": PART | THREE | {"optimizer": "adamw"},
    "three segments, linear spatial term": PART | THREE | {"hidden": 0},
    "nine segments": PART | {"granularity": "block", "window": 1},
    "five segments": PART | {"plan": "0,1,2,4,8"},
    "pairs that take turns": PART | {"plan": "pairs"},
    "drawn cuts": PART | {"plan": "drawn"},
    "three segments, finish 0.5": PART | THREE | {"finish": 0.5},
    "one segment": PART | {"plan": "8"},
    "50,000 images, 6 epochs, three segments": ALL,
    "50,000 images, 6 epochs, learning rate 2e-3": ALL | {"lr": 2e-3},
    "50,000 images, 6 epochs, learning rate 8e-3": ALL | {"lr": 8e-3},
    "50,000 images, 6 epochs, 8 x 8 cells": ALL | {"grid": 8},
    "50,000 images, 6 epochs, cuts that take turns": ALL | {"plan": "1,3,8|0,2,8"},
    "50,000 images, 12 epochs, two segments, cut behind block 5": ALL | {"epochs": 12, "plan": "5/2,8"},
    "50,000 images, 12 epochs, two segments, cut behind block 7": ALL | {"epochs": 12, "plan": "7/2,8"},
    "5,000 images, 16 epochs, two segments, cut behind block 5": FEW | {"plan": "5/2,8"},
}  # fmt: skip
# Backpropagation and local training with their defaults, and local training in three segments: {task: (settings, seeds)}.
TASKS = {
    "CIFAR-10, 50,000 images, 12 epochs": (PART | {"subset": None, "epochs": 12}, 3),
    "CIFAR-100, 50,000 images, 4 epochs": (PART | {"data": "cifar100", "subset": None}, 1),
    "CIFAR-100, 50,000 images, 12 epochs": (PART | {"data": "cifar100", "subset": None, "epochs": 12}, 1),
    "CIFAR-10, 5,000 images": (FEW, 3),
    "CIFAR-10, 1,000 images": (FEW | {"subset": 1000, "epochs": 40}, 3),
    "CIFAR-10, 500 images": (FEW | {"subset": 500, "epochs": 40}, 3),
    "CIFAR-100, 5,000 images": (FEW | {"data": "cifar100"}, 1),
    "Fashion-MNIST, 60,000 images": (PART | {"data": "fashion-mnist", "subset": None, "epochs": 3}, 1),
    "CIFAR-10, 5,000 images, width 32": (FEW | {"width": 32}, 1),
    "CIFAR-10, 5,000 images, MobileNetV3-small": (FEW | {"model": "mobilenet_v3_small"}, 3),
    "CIFAR-10, 1,000 images, from CIFAR-100": (FEW | {"subset": 1000, "epochs": 40, "start": "CIFAR-100, 50,000 images, 4 epochs"}, 1),
}  # fmt: skip


def kinds(options):
    """{kind: settings} of the experiments of a task with these settings."""
    three = {"plan": "2,6,12"} if "mobilenet" in options.get("model", "") else THREE
    return {"backpropagation": BACKPROP, "the defaults": {}, "three segments": three}


EXPERIMENTS |= {
    f"{task}: {kind}": options | own for task, (options, _) in TASKS.items() for kind, own in kinds(options).items()
}
SHOWN = ("the defaults", "three segments")
COLUMNS = ("experiment", "seed", "vote", "last", "seconds", "memory_mib", "blocks", "plan", "settings")


def network_folder(task, options, root):
    """Where the network of a task is kept that other experiments start from."""
    return Path(root) / "runs" / f"{task}, {options.get('mode', 'local')}"


def run(name, options, root, seed):
    """Train one experiment. Returns its row."""
    given = {key: value for key, value in options.items() if value != experiment.DEFAULTS.get(key)}
    options, task = dict(options), name.rpartition(":")[0]
    source = options.pop("start", None)
    extra = {kind: options.pop(kind) for kind in extra_losses.KINDS if kind in options}
    s = experiment.settings(**options, root=root, seed=seed)
    device = torch.device("cpu")
    made = experiment.start(s, device, source and network_folder(source, options, root))
    memory = "" if extra else f"{compare.step_memory(s, made.dataset, device):.1f}"
    for kind, weight in extra.items():
        extra_losses.add(kind, weight, made.trainer, made.train)
    start = time.process_time()
    made.trainer.fit(made.train, s["epochs"], progress=False, meta=experiment.describe(s, made.dataset))
    seconds = time.process_time() - start
    if any(task == other.get("start") for other in EXPERIMENTS.values()) and seed == 0:
        folder = network_folder(task, options, root)
        folder.mkdir(parents=True, exist_ok=True)
        made.trainer.save(folder / "checkpoint.pt")
    accuracy = made.trainer.evaluate(made.test)
    blocks = [value for key, value in accuracy.items() if key.startswith("block ")]
    return {
        "experiment": name, "seed": seed, "vote": f"{accuracy['vote']:.4f}", "last": f"{(blocks or [accuracy['vote']])[-1]:.4f}",
        "seconds": round(seconds), "memory_mib": memory, "blocks": " ".join(f"{value:.4f}" for value in blocks),
        "plan": "" if s["mode"] == "backprop" else made.trainer.engine.plan.name,
        "settings": " ".join(f"{key}={value}" for key, value in given.items()),
    }  # fmt: skip


def seeds(name):
    """The seeds that an experiment is run with."""
    return range(TASKS.get(name.rpartition(":")[0], (None, 1))[1])


def table():
    """The rows that compare plans, heads and updates, as a table in Markdown."""
    rows, body = [row for row in tables.read("plans") if ":" not in row["experiment"]], []
    if not rows:
        return tables.missing("python -m benchmarks.plans --root FOLDER")
    for row in rows:
        seed = "" if row["seed"] == "0" else f", seed {row['seed']}"
        last = "" if "backpropagation" in row["experiment"] else f"{float(row['last']):.1%}"
        accuracy = (f"{float(row['vote']):.1%}", last)
        # The terms of extra_losses are in plain PyTorch, whose cost is not that of the defaults.
        cost = (row["seconds"], f"{row['memory_mib']} MiB") if row["memory_mib"] else ("", "")
        body.append((row["experiment"] + seed, *accuracy, *cost))
    head = ("what", "vote", "last block", "seconds", "memory of a step")
    return tables.table(head, body) + tables.measured_on(rows[0])


def tasks(shown=SHOWN[:1]):
    """Rows of TASKS as a table in Markdown: these kinds of local training beside backpropagation, means of the seeds that both have."""
    rows, body = {(row["experiment"], row["seed"]): row for row in tables.read("plans")}, []
    for task in TASKS:
        for kind in shown:
            pairs = [[rows.get((f"{task}: {one}", seed)) for one in ("backpropagation", kind)] for seed in "012"]
            pairs = [pair for pair in pairs if None not in pair]
            if not pairs:
                continue
            backprop, local = zip(*pairs, strict=True)
            gain = [100 * (float(b["vote"]) - float(a["vote"])) for a, b in pairs]
            mean = lambda column, some: sum(float(row[column]) for row in some) / len(some)  # noqa: E731
            body.append((
                task if kind == "the defaults" else f"{task}, {kind}", len(pairs), f"{mean('vote', backprop):.1%}", f"{mean('vote', local):.1%}",
                f"{mean('last', local):.1%}", _range(gain), f"{mean('seconds', local) / mean('seconds', backprop):.2f}",
                f"{mean('memory_mib', local) / mean('memory_mib', backprop):.2f}",
            ))  # fmt: skip
    if not body:
        return tables.missing("python -m benchmarks.plans --root FOLDER")
    head = ("task", "seeds", "backpropagation", "local, vote", "last block", "points gained", "time", "memory")
    return tables.table(head, body) + tables.measured_on(local[0])


def tasks_by_plan():
    """The same for all kinds of local training."""
    return tasks(SHOWN)


def _range(gains):
    low, high = (f"{gain:+.1f}" for gain in (min(gains), max(gains)))
    return low if len(gains) == 1 else f"{low} to {high}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with the data sets' official files")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, metavar="NAME", help="names of experiments")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0, and for some tasks 1 and 2")
    parser.add_argument("--table", action="store_true", help="print the table and train nothing")
    arguments = parser.parse_args()
    if arguments.table:
        print(tasks_by_plan(), table(), sep="\n\n")
        return
    torch.set_num_threads(1)
    done = {(row["experiment"], int(row["seed"])) for row in tables.read("plans")}
    info = environment()
    asked = [(name, seed) for name in arguments.only or EXPERIMENTS for seed in arguments.seeds or seeds(name)]
    for name, seed in asked:
        if (name, seed) in done:
            continue
        row = run(name, EXPERIMENTS[name], arguments.root, seed)
        accuracy = f"vote {float(row['vote']):.1%}  last {float(row['last']):.1%}"
        print(f"{name:60} seed {seed}  {accuracy}  {row['seconds']} s  {row['memory_mib'] or '-'} MiB", flush=True)
        exists = RESULTS.exists()
        RESULTS.parent.mkdir(exist_ok=True)
        with open(RESULTS, "a", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *info])
            if not exists:
                writer.writeheader()
            writer.writerow(row | info)


if __name__ == "__main__":
    sys.exit(main())
