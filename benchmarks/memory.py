"""Whether SFF(memory=...) keeps its word: the peak memory of a step beside what was counted before anything was trained.

    python -m benchmarks.memory [--batch 64] [--only NAME...] [--csv FILE]

Both are shares of what a step of backpropagation was counted to take. A share too small for the network's largest block is refused, with the least
that can be had, which the row then says.
"""

import argparse
import re

import torch

from benchmarks import networks, tables
from benchmarks.timing import print_environment, write_csv
from fastff import SFF, Trainer
from fastff.memory import peak_memory

CLASSES, SHARES = 10, (0.4, 0.25)
CASES = {  # {name: (network, width, height and width of images)}
    "resnet18-64": ("resnet18", 64, 32),
    "resnet18-16": ("resnet18", 16, 32),
    "mobilenet_v3_large": ("mobilenet_v3_large", None, 32),
    "densenet121": ("densenet121", None, 64),
    "efficientnet_b0": ("efficientnet_b0", None, 64),
}


def measure(name, share, batch):
    """Return a row: the plan for this share, the least share where it is refused, and what was counted and measured."""
    network, width, size = CASES[name]
    torch.manual_seed(0)
    net = networks.build(network, CLASSES, width, size).to(memory_format=torch.channels_last)
    row = {
        "network": name,
        "size": size,
        "batch": batch,
        "memory": share,
        "plan": "",
        "least": "",
        "counted": "",
        "measured": "",
    }
    try:
        sff = SFF(net, CLASSES, input_shape=(3, size, size), memory=share, batch_size=batch)
    except ValueError as error:
        return row | {"least": re.search(r"at least ([\d.]+)", str(error))[1]}
    memory, trainer = sff.segment_memory, Trainer(sff)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    target = torch.arange(batch) % CLASSES
    for _ in range(2):  # the optimizer's state
        trainer.step(images, target)
    counted = max(memory(*segment) for segment in sff.plan.at(0))
    measured = peak_memory(lambda: trainer.step(images, target)) * 2**20
    return row | {
        "plan": sff.plan.name,
        "counted": counted / memory.backprop,
        "measured": measured / memory.backprop,
    }


def table():
    """Return the table of results/memory.csv."""
    rows = tables.read("memory")
    if not rows:
        return tables.missing("python -m benchmarks.memory --csv benchmarks/results/memory.csv")
    body = []
    for row in rows:
        found = [f"{float(row[key]):.2f}" for key in ("counted", "measured")] if row["plan"] else ["", ""]
        plan = row["plan"] or f"refused: at least {row['least']}"
        body.append((row["network"], f"{row['size']} x {row['size']}", row["memory"], plan, *found))
    return tables.table(("network", "images", "memory", "plan", "counted", "measured"), body) + tables.measured_on(
        rows[0]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME", default=list(CASES))
    parser.add_argument("--csv", metavar="FILE")
    a = parser.parse_args()
    print_environment()
    rows = []
    for name in a.only:
        for share in SHARES:
            rows.append(measure(name, share, a.batch))
            print(
                "  ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()),
                flush=True,
            )
    if a.csv:
        write_csv(a.csv, rows)


if __name__ == "__main__":
    main()
