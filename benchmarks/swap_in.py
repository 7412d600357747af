"""Six programs in common styles (examples/swap_in), with and without fastff: time and peak memory of a minibatch, accuracy, lines changed.

    python -m benchmarks.swap_in [--batch 64] [--epochs 5] [--rounds N] [--csv FILE]

Both versions of a program are trained on the digits with the same seed. If the accuracy with fastff is lower by more than --noise, no number is
printed. Then minibatches of both are timed in turn. Memory is what a minibatch allocates above parameters and optimizer state.
"""

import argparse
import difflib
import importlib
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.timing import print_environment, write_csv
from examples.swap_in import digits
from fastff.bench import interleave, quantile, ratios
from fastff.memory import peak_memory

RECIPES = {
    "layers": "layers with train(x_pos, x_neg)",
    "config": "a configuration, a loss for each layer",
    "groups": "class groups, forward_forward(x, y)",
    "outputs": "blocks that return (y, goodness)",
    "suite": "a suite with run_train(x_pos, x_neg)",
    "heads": "auxiliary heads inside forward",
}
VERSIONS = ("before", "after")


def module(name, version):
    return importlib.import_module(f"examples.swap_in.{name}_{version}")


def lines_changed(name):
    """Return the number of lines of the program with fastff that are not in the one without."""
    texts = [Path(module(name, version).__file__).read_text().splitlines() for version in VERSIONS]
    return sum(line.startswith("+") and not line.startswith("+++") for line in difflib.unified_diff(*texts, n=0))


def table():
    rows = tables.read("swap-in")
    if not rows:
        return tables.missing("python -m benchmarks.swap_in --csv benchmarks/results/swap-in.csv")
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
    return tables.table(header, body) + tables.measured_on(rows[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("batch", 64), ("epochs", 12), ("rounds", 25)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--noise", type=float, default=0.15)
    parser.add_argument("--csv")
    a = parser.parse_args()
    print_environment()
    (x, label), _ = digits.images()
    x, label = x[: a.batch], label[: a.batch]
    print(f"{'':42} {'faster':>8} {'20-80 %':>14} {'memory':>18} {'accuracy':>18} {'lines':>6}")
    rows = []
    for name, what in RECIPES.items():
        steps, accuracy, memory = {}, {}, {}
        for version in VERSIONS:
            torch.manual_seed(0)
            net = module(name, version).Net()
            accuracy[version] = digits.fit(net, a.epochs, quiet=True)
            steps[version] = lambda net=net: net.train_batch(x, label)
            memory[version] = peak_memory(steps[version])
        if accuracy["after"] < accuracy["before"] - a.noise:
            print(f"{what:42} wrong result: accuracy {accuracy['after']:.1%}, before {accuracy['before']:.1%}")
            continue
        times = interleave(steps, a.rounds)
        faster, low, high = ratios(times, "before", "after")
        changed = lines_changed(name)
        shown = [f"{d['before']:{f}} -> {d['after']:{f}}" for d, f in ((memory, ".1f"), (accuracy, ".1%"))]
        print(f"{what:42} {faster:6.2f} x [{low:.2f}, {high:.2f}] {shown[0]:>14} MiB {shown[1]:>18} {changed:6}")
        row = {
            "recipe": name,
            "what": what,
            "batch": a.batch,
            "epochs": a.epochs,
            "faster": faster,
            "faster_20": low,
            "faster_80": high,
        }
        for version in VERSIONS:
            row[f"milliseconds_{version}"] = quantile(times[version], 0.5) * 1e3
            row[f"peak_mib_{version}"], row[f"accuracy_{version}"] = memory[version], accuracy[version]
        rows.append(row | {"lines": changed})
    if a.csv:
        write_csv(a.csv, rows)
    behind = [r["what"] for r in rows if r["faster"] < 1.5 and r["peak_mib_after"] > 0.5 * r["peak_mib_before"]]
    print(f"neither 1.5 x faster nor at half the memory: {', '.join(behind) or 'none'}")


if __name__ == "__main__":
    main()
