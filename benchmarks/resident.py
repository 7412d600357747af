"""Peak resident memory of a training step as the operating system counts it, and the memory that PyTorch allocates in it.

    python -m benchmarks.resident [--width 64] [--batch 32] [--classes 100] [--csv FILE]

Each variant runs in a new process. A step on two images creates the optimizer's state and loads all code. Then free memory is returned to the system,
the peak counter is reset (/proc/self/clear_refs), and three steps run. The difference between peak and start is what a step needs, including the
scratch memory of oneDNN. This works on Linux only.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.step import build, variants
from benchmarks.timing import print_environment, write_csv
from fastff.memory import peak_memory

SHOWN = ("backprop", "backprop, 4 micro-batches", "backprop, checkpointing", "block", "layer", "defaults")


def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(a, variant):
    """Measure a step of this variant in this process and return a row with resident_mib and allocated_mib."""
    torch.manual_seed(1)
    images = torch.randn(a.batch, 3, a.size, a.size).contiguous(memory_format=torch.channels_last)
    target = torch.randint(0, a.classes, (a.batch,))
    kind, options = variants(a)[variant]
    trainer = build(a, kind, True, **options)
    trainer.step(images[:2], target[:2])
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        trainer.step(images, target)
    resident = (kilobytes("VmHWM") - before) / 1024
    return {
        "variant": variant,
        "resident_mib": resident,
        "allocated_mib": peak_memory(lambda: trainer.step(images, target), torch.device("cpu")),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    for name, default in (("width", 64), ("batch", 32), ("classes", 100), ("size", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--csv")
    a = parser.parse_args()
    a.compile = False
    if a.variant:
        print(json.dumps(measure(a, a.variant)))
        return
    print_environment()
    rows = []
    for variant in SHOWN:
        command = [sys.executable, "-m", "benchmarks.resident", "--variant", variant, "--model", a.model]
        command += [str(v) for name in ("width", "batch", "classes", "size") for v in (f"--{name}", getattr(a, name))]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise SystemExit(run.stderr)
        row = json.loads(run.stdout.splitlines()[-1]) | {
            "model": a.model,
            "width": a.width,
            "batch": a.batch,
            "size": a.size,
        }
        rows.append(row)
        print(
            f"{variant:28} resident {row['resident_mib']:6.0f} MiB, allocated {row['allocated_mib']:6.0f} MiB",
            flush=True,
        )
    if a.csv:
        write_csv(a.csv, rows)


if __name__ == "__main__":
    main()
