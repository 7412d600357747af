"""Draws runs of `fastff train` and `fastff compare`: accuracy over epochs, over seconds and by block, and the memory of a step."""

import contextlib
import io
from pathlib import Path

from fastff.training.readers import optional

# {mode: (label, colour, marker)}. The colours are Okabe and Ito's, which people with colour blindness can tell apart.
STYLES = {
    "backprop": ("backpropagation", "#444444", "s"),
    "block": ("block-wise", "#0072B2", "o"),
    "layer": ("layer-wise", "#D55E00", "^"),
    "stage": ("stage-wise", "#009E73", "D"),
}
LOOK = {
    "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": True, "grid.color": "#dddddd",
    "legend.frameon": False,
}  # fmt: skip


@contextlib.contextmanager
def _drawn(width, height):
    """Yields a matplotlib figure of so many inches. Raises ImportError: matplotlib is not installed."""
    with optional("matplotlib", "the picture").rc_context(LOOK):
        yield optional("matplotlib.figure", "the picture").Figure(figsize=(width, height), layout="constrained")


def _svg(figure):
    """Return the figure as an SVG file."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def picture(result, path):
    """Draw the result of `fastff.app.compare.compare`, write it to `path` as PNG, and return it as SVG.

    Raises ImportError: matplotlib is not installed."""
    runs, s = result["runs"], result["settings"]
    with _drawn(16, 5.6) as figure:
        epochs, seconds, blocks, memory = figure.subplots(1, 4, width_ratios=[3, 3, 3, 1.9])
        _curves(epochs, seconds, runs)
        _by_block(blocks, runs)
        _memory(memory, runs)
        for axis in (epochs, seconds, blocks):
            axis.set_ylim(*_range(runs))
        figure.legend(*epochs.get_legend_handles_labels(), loc="outside lower center", ncols=len(runs), fontsize=12)
        title = f"{s['model']} of width {s['width']} on {Path(s['data']).name}"
        figure.suptitle(f"{title}: the same network, weights and batches", fontsize=13)
        figure.savefig(path, dpi=110)
        return _svg(figure)


def learning(history, names):
    """Draw what each block learned over the epochs of a run, as SVG: loss, accuracy in training and on the test images, and the vote's.

    Args:
        history: rows of Trainer.history.
        names: of the losses, as in the history: those of the blocks."""
    columns = [
        ("Loss in training", "train loss {name}", 1), ("Accuracy in training", "train accuracy {name}", 100),
        ("Accuracy on test images", "test block {index}", 100),
    ]  # fmt: skip
    nan = float("nan")  # of blocks that an epoch did not train
    epochs = [row["epoch"] for row in history]
    with _drawn(15, 5) as figure:
        axes = figure.subplots(1, 3)
        axes[2].sharey(axes[1])
        colours = _by_depth(len(names))
        marker = "o" if len(epochs) < 25 else None
        for axis, (title, key, factor) in zip(axes, columns, strict=True):
            for index, name in enumerate(names):
                found = [factor * row.get(key.format(name=name, index=index), nan) for row in history]
                if any(value == value for value in found):
                    label = f"{index} {name}" if axis is axes[0] else None
                    axis.plot(epochs, found, color=colours[index], marker=marker, markersize=3.5, label=label)
            unit = " (%)" if factor == 100 else " (cross-entropy)"
            axis.set(title=title, xlabel="epoch", ylabel=title.split()[0].lower() + unit)
            axis.xaxis.get_major_locator().set_params(integer=True)
        vote = [100 * row.get("test vote", nan) for row in history]
        label = "all blocks' vote" if len(names) > 1 else "network"
        axes[2].plot(epochs, vote, color="black", linestyle="--", linewidth=2, label=label)
        axes[0].set_yscale("log")
        axes[0].yaxis.set_major_formatter("{x:g}")
        figure.legend(loc="outside lower center", ncols=min(6, len(names) + 1), fontsize=10)
        return _svg(figure)


def _by_depth(count):
    """Return a colour for each block, from dark (the first) to light."""
    depths = [0.9 * i / max(1, count - 1) for i in range(count)]
    return optional("matplotlib", "the picture").colormaps["viridis"](depths)


def step_memory(curve, visits, names):
    """Draw the memory of one training step over time, as SVG, in the colours of the blocks that it is at.

    Args: curve and visits as fastff.memory.by_block returns them; names of the blocks."""
    with _drawn(15, 3.8) as figure:
        axis = figure.subplots()
        times, values = zip(*curve, strict=True)
        axis.fill_between(times, values, step="post", color="#bbbbbb", linewidth=0)
        ends = [*(time for time, _ in visits[1:]), times[-1]]
        colours = _by_depth(len(names))
        for (start, index), end in zip(visits, ends, strict=False):  # backpropagation has no visits, and one end
            inside = [(t, v) for t, v in curve if start <= t < end]
            before = [v for t, v in curve if t < start][-1:] or [0]
            t, v = [start, *(t for t, _ in inside), end], [before[0], *(v for _, v in inside)]
            axis.fill_between(t, [*v, v[-1]], step="post", color=colours[index], linewidth=0)
            axis.axvline(start, color="#888888", linewidth=0.6)
            if end - start > times[-1] / 60:
                axis.text(start, 1.01, f" {index}", transform=axis.get_xaxis_transform(), fontsize=10)
        axis.set(xlabel="time within the step; a number is the block that starts", xticks=[], xlim=(0, times[-1]))
        axis.set_ylabel("MiB above parameters\nand optimizer state")
        axis.set_ylim(bottom=0)
        axis.grid(False)
        return _svg(figure)


def _curves(epochs, seconds, runs):
    for run in runs:
        name, colour, marker = STYLES[run["mode"]]
        history = run["history"]
        accuracy = [100 * row["test_accuracy"] for row in history]
        style = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 2, "alpha": 0.9}
        epochs.plot([row["epoch"] for row in history], accuracy, label=f"{name}: {accuracy[-1]:.1f} %", **style)
        seconds.plot([row["seconds"] for row in history], accuracy, **style)
    epochs.set(title="After each epoch", xlabel="epoch", ylabel="test accuracy (%)")
    epochs.xaxis.get_major_locator().set_params(integer=True)
    seconds.set(title="After seconds of training", xlabel="seconds (without evaluation)")
    seconds.set_xlim(left=0)


def _by_block(axis, runs):
    """Draw the accuracy of each block alone and of all together. The axis is the relative depth, for runs with different numbers of blocks."""
    axis.set(title="Each block alone, and all together", xlabel="depth of the block")
    axis.set_xlim(-0.05, 1.3)
    for run in runs:
        name, colour, marker = STYLES[run["mode"]]
        alone = [100 * accuracy for accuracy in run["blocks"]]
        axis.plot(run["block_depths"], alone, color=colour, marker=marker, markersize=5, linewidth=2, alpha=0.9)
        vote = 100 * run["test_accuracy"]
        shift = 1.18 + 0.03 * (runs.index(run) - (len(runs) - 1) / 2)
        axis.plot([shift], [vote], color=colour, marker=marker, markersize=9, markeredgecolor="white", clip_on=False)
    axis.axvline(1.08, color="#bbbbbb", linewidth=1)
    axis.set_xticks([0, 0.5, 1, 1.18], ["input", "middle", "last", "all"])


def _memory(axis, runs):
    """Draw bars of what a training step allocates."""
    names, colours, _ = zip(*(STYLES[run["mode"]] for run in runs), strict=True)
    names = [name.replace("backpropagation", "back-\nprop.").replace("-wise", "") for name in names]
    bars = axis.bar(names, [run["peak_memory_mb"] for run in runs], color=colours, width=0.7)
    axis.bar_label(bars, fmt="{:.1f}", fontsize=11)
    axis.set(title="Memory of a step", ylabel="peak, MiB above parameters\nand optimizer state")
    axis.grid(False)
    axis.margins(y=0.12)


def _range(runs):
    """Return the limits of the accuracy axis. They hold all values except those of the first fifth of the epochs, which may lie below."""
    curves = [[100 * row["test_accuracy"] for row in run["history"]] for run in runs]
    late = [value for curve in curves for value in curve[min(len(curve) // 5, len(curve) - 1) :]]
    shown = late + [100 * value for run in runs for value in run["blocks"]]
    low, high = min(shown), max(*shown, *(max(curve) for curve in curves))
    room = max(1.0, 0.06 * (high - low))
    return max(0.0, low - room), min(high + room, 100 + room / 2)
