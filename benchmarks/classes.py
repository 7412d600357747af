"""What more classes cost a training step: ResNet18 at K from 2 to 10,000, each against the same step at K = 10, in one run.

    python -m benchmarks.classes [--width 64] [--batch 32] [--classes 2 10 100 1000 10000] [--csv FILE] [--rounds N]

The network in the paper's setting (grid=0, window=1), block-wise and layer-wise, and backpropagation. Memory is what the step allocates
above parameters and optimiser state.
"""

import argparse
import copy

import torch

from benchmarks.step import PAPER, build, check
from benchmarks.timing import print_environment, write_csv
from fastff.bench import interleave, quantile, ratios
from fastff.training.memory import peak_memory

VARIANTS = {
    "backprop": ("backprop", {}),
    "block": ("sff", PAPER),
    "layer": ("sff", PAPER | {"granularity": "layer"}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 64), ("batch", 32), ("size", 32), ("rounds", 9)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 10, 100, 1000, 10000])
    parser.add_argument("--csv")
    a = parser.parse_args()
    a.model = "resnet18"
    print_environment()
    torch.manual_seed(1)
    images = torch.randn(a.batch, 3, a.size, a.size).contiguous(memory_format=torch.channels_last)
    rows = []
    for variant, (kind, options) in VARIANTS.items():
        steps = {}
        for classes in sorted({10, *a.classes}):
            of = copy.copy(a)
            of.classes = classes
            target = torch.randint(0, classes, (a.batch,))
            if variant == "block":
                check(of, images, target)
            trainer = build(of, kind, True, **options)
            steps[classes] = lambda trainer=trainer, target=target: trainer.step(images, target)
            steps[classes]()  # optimiser state and gradients exist from here on
        memory = {classes: peak_memory(step, torch.device("cpu")) for classes, step in steps.items()}
        times = interleave(steps, a.rounds)
        for classes in steps:
            ratio, low, high = ratios(times, classes, 10)
            print(f"{variant:10} K = {classes:6} {ratio:6.2f} x [{low:.2f}, {high:.2f}]  {memory[classes]:6.0f} MiB")
            rows.append({
                "model": a.model, "width": a.width, "batch": a.batch, "variant": variant, "classes": classes, "ratio": ratio, "ratio_20": low,
                "ratio_80": high, "milliseconds": quantile(times[classes], 0.5) * 1e3, "peak_mib": memory[classes],
            })  # fmt: skip
    if a.csv:
        write_csv(a.csv, rows)


if __name__ == "__main__":
    main()
