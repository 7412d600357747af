"""Draws docs/step-memory.png: the memory of one training step over time, measured, by backpropagation and block by block.

    python docs/make_step_picture.py

ResNet18 of width 16, batch 32, 32 x 32, 100 classes, channels last, as in the table of docs/step.md. PyTorch's profiler records every
allocation and release (fastff/memory.py says what it does not see). It slows both steps down, so how long they take is not in the picture.
"""

from itertools import accumulate
from pathlib import Path
from statistics import median

import matplotlib
import torch
from torch.profiler import ProfilerActivity, profile, record_function

import fastff

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARK = "end of a block"
GREY, BLUE = "#444444", "#0072B2"


def mark(*_):
    with record_function(MARK):
        pass


class Marked(fastff.Trainer):
    """Marks the end of each block, which is where its optimiser has made its step."""

    def optimizer_step(self, *arguments):
        super().optimizer_step(*arguments)
        mark()


def build(kind, batch=32, classes=100):
    """A function that makes a training step, after two to warm up."""
    torch.manual_seed(0)
    net = fastff.models.resnet18(classes, stem="cifar", width=16).to(memory_format=torch.channels_last)
    sff = fastff.SFF(net, classes, grid=0, window=1, readout=kind == "backprop")
    trainer = fastff.Backprop(sff) if kind == "backprop" else Marked(sff)
    if kind == "backprop":
        for module in [block for stage in (net.layer1, net.layer2, net.layer3, net.layer4) for block in stage]:
            module.register_forward_pre_hook(between_blocks)
        net.avgpool.register_forward_pre_hook(between_blocks)
    trainer.train_mode()
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    target = torch.randint(classes, (batch,))
    for _ in range(2):
        trainer.step(images, target)
    return lambda: trainer.step(images, target)


def between_blocks(module, inputs):
    """A cut: passed now by the forward pass, and by the backward pass when its gradient is there."""
    mark()
    inputs[0].register_hook(mark)


def record(step):
    """[(nanoseconds, MiB above the start, whether this is a mark)] of one call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    found, now = [], 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
        if event.name() in ("[memory]", MARK):
            found.append((event.start_ns(), now / 2**20, event.name() == MARK))
    return found


def typical(step, rounds=15):
    """(shares of the step's time in per cent, MiB, shares at the marks), between events the median of several recordings."""
    runs = [record(step) for _ in range(rounds + 1)][1:]  # the first sees some memory from before
    sizes, marks = ([event[i] for event in runs[0]] for i in (1, 2))
    runs = [run for run in runs if [event[1] for event in run] == sizes]
    gaps = [[b[0] - a[0] for a, b in zip(run, run[1:], strict=False)] for run in runs]
    times = [0, *accumulate(median(gap) for gap in zip(*gaps, strict=True))]
    print(
        f"peak {max(sizes):.1f} MiB, {times[-1] / 1e6:.0f} ms while recorded, {len(runs)} of {rounds} recordings alike"
    )
    times = [100 * time / times[-1] for time in times]
    return times, sizes, [time for time, is_mark in zip(times, marks, strict=True) if is_mark]


def panel(axis, title, colour, times, sizes, marks, names):
    axis.fill_between(times, sizes, step="post", color=colour, alpha=0.15, linewidth=0)
    axis.step(times, sizes, where="post", color=colour, linewidth=1.4)
    for at in marks:
        axis.axvline(at, color="#bbbbbb", linewidth=0.8, zorder=0)
    for left, right, name in zip([0.0, *marks], [*marks, times[-1]], names, strict=False):
        axis.text(
            (left + right) / 2, 0.985, name, transform=axis.get_xaxis_transform(), ha="center", va="top", fontsize=10
        )
    peak = max(sizes)
    axis.axhline(peak, color=colour, linewidth=0.8, linestyle=":")
    axis.text(times[-1] * 1.01, peak, f"{peak:.0f} MiB", color=colour, va="center", fontsize=11)
    axis.set_title(title, loc="left", fontsize=12, fontweight="bold")
    axis.set_ylabel("MiB above the start")
    axis.set_xlim(0, times[-1])


def main():
    torch.set_num_threads(1)
    blocks = [str(i) for i in range(9)]
    found = {kind: typical(build(kind)) for kind in ("backprop", "block")}
    top = 1.14 * max(found["backprop"][1])
    with plt.rc_context({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(2, 1, figsize=(10, 6.4), layout="constrained", sharey=True)
        panel(
            axes[0],
            "Backpropagation: forward through blocks 0 to 8, then back",
            GREY,
            *found["backprop"],
            [*blocks, "", *blocks[::-1]],
        )
        panel(
            axes[1], "Block by block: each is trained and freed before the next starts", BLUE, *found["block"], blocks
        )
        axes[0].set_ylim(0, top)
        axes[1].set_xlabel("time, per cent of the step")
        figure.savefig(Path(__file__).with_name("step-memory.png"), dpi=110)


if __name__ == "__main__":
    main()
