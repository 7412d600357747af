"""Everything that needs a GPU, in one run of at most eight minutes: it checks the kernels, and times kernels and training steps.

    make gpu                    python -m benchmarks.gpu [--out FOLDER] [--only PART...] [--seconds 480]
    make gpu GPU_DRY=1          the same on a CPU, to find mistakes in it: tiny shapes, Triton's interpreter, stand-ins for graphs and events

    rates       what this device reaches: copies, products of matrices
    check       every kernel against float64, its error beside that of PyTorch, its bits twice; steps as a CUDA graph against ordinary ones. At the
                same time, in nearly as many processes as there are cores, all that the later parts run is compiled
    kernels     each op at the shapes of training against plain PyTorch, eager and compiled, all as CUDA graphs
    steps       ResNet18: backpropagation, and block-local training, eager, compiled and as a CUDA graph
    learning    ResNet18 on the digits data set, on the GPU and on the CPU
    counters    what Nsight Compute counts in four calls, if `ncu` is installed
    scale       with several GPUs, steps over 2, 4 and 8 of them against the predictions of benchmarks/scale.py

Each row is written to FOLDER/PART.csv as soon as it is known, with the name of the device. Jobs run in processes of their own: after an error the run
goes on, and ends with exit status 1. Each part has a time at which it ends; what it had no time for is said. FOLDER/problems.csv has the errors.
"""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import gpu_check, gpu_kernels, gpu_report, gpu_steps
from benchmarks.gpu_device import DEVICE, DRY
from benchmarks.gpu_workers import Job, Pool
from benchmarks.tables import RESULTS, ROOT
from benchmarks.timing import append_csv, print_environment
from fastff.kernels.triton import INTERPRETED


class Part(NamedTuple):
    """The jobs that make FOLDER/name.csv; `parallel` ones at the same time. The part ends when this share of all the time is over."""

    name: str
    jobs: list
    end: float
    parallel: bool = False


def parts():
    """Return the Parts in the order in which they run. What compiles longest comes first, and checks take turns with what else compiles."""
    turns = itertools.zip_longest(gpu_check.jobs(), gpu_kernels.jobs_ahead())
    checks = gpu_steps.jobs_ahead() + [job for turn in turns for job in turn if job is not None]
    found = [
        Part("rates", [Job("rates", gpu_kernels.rates)], 0.06),
        Part("check", checks, 0.36, True),
        Part("kernels", gpu_kernels.jobs(), 0.61),
        Part("steps", gpu_steps.jobs(), 0.83),
        Part("learning", gpu_steps.learning_jobs(), 0.9, True),
        Part("counters", gpu_kernels.counter_jobs(), 0.98),
    ]
    if torch.cuda.device_count() > 1:
        found.append(Part("scale", [Job("scale", gpu_steps.scales)], 1.5))
    return found


class Run:
    """Runs parts into a folder, and remembers what went wrong and what was cut."""

    def __init__(self, folder, seconds, processes):
        self.folder, self.seconds, self.start = Path(folder), seconds, time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [*self.folder.glob("*.csv"), self.folder / "log.txt"]:
            path.unlink(missing_ok=True)
        log = self.folder / "log.txt"
        together, alone = (processes, 1) if processes else (0, 0)
        self.together, self.alone = Pool(together, 1, log), Pool(alone, 1 if DRY else os.cpu_count(), log)
        self.problems, self.cut = [], {}

    def say(self, text):
        """Print a line with the time since the start, and write it to the log."""
        line = f"{time.monotonic() - self.start:6.1f} s  {text}"
        print(line, flush=True)
        with open(self.folder / "log.txt", "a") as file:
            file.write(line + "\n")

    def run(self, part):
        """Run the jobs of a part."""
        if not part.jobs:
            self.say(f"{part.name}: nothing that can run here")
        pool = self.together if part.parallel else self.alone
        for outcome in pool.run(part.jobs, self.start + part.end * self.seconds):
            if outcome.cut:
                self.cut.setdefault(part.name, []).append(outcome.job.name)
                continue
            if outcome.rows:
                append_csv(self.folder / f"{part.name}.csv", outcome.rows)
            said = f"{part.name}: {outcome.job.name}: {outcome.seconds:.1f} s"
            self.say(" | ".join([said, *map(gpu_report.short, outcome.rows)]))
            bad = [row for row in outcome.rows if not row.get("state", "ok").startswith(("ok", "refused"))]
            texts = [gpu_report.short(row) for row in bad] + ([outcome.problem] if outcome.problem else [])
            for text in texts:
                self.say(f"PROBLEM {part.name}: {outcome.job.name}: {text}")
                self.problems.append({"part": part.name, "job": outcome.job.name, "problem": text})
                append_csv(self.folder / "problems.csv", self.problems[-1:])
        left_out = self.cut.get(part.name, [])
        if left_out:
            self.say(f"{part.name}: no time for {len(left_out)} of {len(part.jobs)}: {'; '.join(left_out)}")

    def close(self):
        """End the processes, and print tables and what went wrong. Returns the exit status."""
        self.together.close()
        self.alone.close()
        print(f"\n{gpu_report.tables_of(self.folder)}\n")
        for part, names in self.cut.items():
            print(f"no time in {part}: {len(names)} jobs")
        for problem in self.problems:
            print("problem in {part}: {job}: {problem}".format(**problem))
        self.say(f"{len(self.problems)} problems; everything is in {self.folder}")
        return 1 if self.problems else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = torch.cuda.get_device_name().replace(" ", "-").lower() if torch.cuda.is_available() else ""
    out = ROOT / "build" / "gpu-dry" if DRY else RESULTS / f"gpu-{device}"
    parser.add_argument("--out", type=Path, default=out, help="folder of the results, whose former ones it replaces")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in parts()], help="these parts")
    parser.add_argument("--seconds", type=float, default=3600 if DRY else 480, help="of the whole run")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="run every N-th job of a part only")
    processes = 2 if DRY else max(1, (os.cpu_count() or 1) - 2)
    parser.add_argument("--processes", type=int, default=processes, help="that compile and check; 0: all in this one")
    a = parser.parse_args()
    if DRY and not INTERPRETED:
        sys.exit(
            "benchmarks.gpu needs a CUDA device, and torch sees none here; make gpu GPU_DRY=1 goes through it without one"
        )
    if DEVICE.type == "cuda" and INTERPRETED:
        sys.exit("TRITON_INTERPRET: expected unset where torch sees a CUDA device, got 1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # each process compiles by itself
    print_environment()
    run = Run(a.out, a.seconds, a.processes)
    for part in parts():
        if a.only is None or part.name in a.only:
            run.run(part._replace(jobs=part.jobs[:: a.every]))
    sys.exit(run.close())


if __name__ == "__main__":
    main()
