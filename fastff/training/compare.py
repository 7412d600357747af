"""The same network, weights and batches trained by backpropagation and locally: accuracies, time, memory, in one table and one picture."""

import platform
from pathlib import Path

import torch

import fastff
from fastff.training import experiment
from fastff.training.memory import peak_memory


def run_mode(s, dataset, mode, device, progress=True):
    """Train one mode ("backprop", "block", "layer", "stage"); a dict as in the JSON of `fastff compare`."""
    s = s | ({"mode": "backprop"} if mode == "backprop" else {"mode": "sff", "granularity": mode})
    memory = step_memory(s, dataset, device)
    trainer = experiment.build_trainer(s, experiment.build_network(s, dataset.num_classes, dataset.input_shape, device))
    train, test = experiment.loaders(s, dataset, device)
    history = trainer.fit(train, s["epochs"], validation=test, progress=progress)
    plain = dataset.train_loader(256, augment=None, shuffle=False, device=device, channels_last=s["channels_last"])
    scores, trained = trainer.evaluate(test), trainer.evaluate(plain)
    seconds = [row["seconds"] for row in history]
    return {
        "mode": mode, "test_accuracy": scores["vote"], "train_accuracy": trained["vote"], "seconds_per_epoch": sorted(seconds)[len(seconds) // 2],
        "peak_memory_mb": memory, "epochs": s["epochs"], "blocks": [value for name, value in scores.items() if name.startswith("block ")],
        "block_names": list(trainer.names),
        "history": [{"epoch": r["epoch"], "seconds": sum(seconds[: i + 1]), "test_accuracy": r["test vote"]} for i, r in enumerate(history)],
    }  # fmt: skip


def step_memory(s, dataset, device):
    """Peak memory of a training step, of a network of its own so that measuring changes no result."""
    trainer = experiment.build_trainer(s, experiment.build_network(s, dataset.num_classes, dataset.input_shape, device))
    images, target = next(iter(experiment.loaders(s, dataset, device)[0]))
    trainer.train_mode()
    for _ in range(2):
        trainer.step(images, target)
    return peak_memory(lambda: trainer.step(images, target), device)


def seconds_to(run, accuracy):
    """Seconds of training until the first epoch with this test accuracy, or None."""
    return next((row["seconds"] for row in run["history"] if row["test_accuracy"] >= accuracy), None)


def environment(device):
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "device": f"{device.type}: {name}", "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "fastff": fastff.__version__,
    }  # fmt: skip


def table(runs):
    """A rich table of the runs."""
    from rich.table import Table

    base = next((run["test_accuracy"] for run in runs if run["mode"] == "backprop"), None)
    shown = Table(caption="memory is above parameters and optimiser state; time is to the final test accuracy of backpropagation")
    for name in ("mode", "test", "train", "s / epoch", "time to backprop's", "peak memory"):
        shown.add_column(name, justify="left" if name == "mode" else "right")
    for run in runs:
        needed = None if base is None else seconds_to(run, base)
        shown.add_row(
            run["mode"], f"{run['test_accuracy']:.2%}", f"{run['train_accuracy']:.2%}", f"{run['seconds_per_epoch']:.2f}",
            "not reached" if needed is None else f"{needed:.1f} s", f"{run['peak_memory_mb']:.1f} MiB",
        )  # fmt: skip
    return shown


def compare(s, modes, device, progress=True, say=print):
    """Run all modes. Returns {"runs": [...], "environment": {...}}."""
    dataset = experiment.load_data(s)
    runs = []
    for mode in modes:
        say(f"{mode}: {s['model']} of width {s['width']} on {dataset.name}, {len(dataset.train_images)} training images, {s['epochs']} epochs")
        runs.append(run_mode(s, dataset, mode, device, progress))
    return {"runs": runs, "environment": environment(device), "settings": s}


def picture(result, path):
    """Accuracy over epochs, over seconds and by block, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colours = {"backprop": "#555555", "block": "#0072B2", "layer": "#009E73", "stage": "#D55E00"}
    names = {"backprop": "backpropagation", "block": "block-wise", "layer": "layer-wise", "stage": "stage-wise"}
    runs, s = result["runs"], result["settings"]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    for run in runs:
        accuracy = [100 * row["test_accuracy"] for row in run["history"]]
        style = {"color": colours[run["mode"]], "linewidth": 2.2, "marker": "o", "markersize": 3.5}
        label = f"{names[run['mode']]}: {100 * run['test_accuracy']:.1f} %, {run['peak_memory_mb']:.1f} MiB"
        axes[0].plot([row["epoch"] for row in run["history"]], accuracy, label=label, **style)
        axes[1].plot([row["seconds"] for row in run["history"]], accuracy, **style)
        if run["blocks"]:
            axes[2].plot(range(1, len(run["blocks"]) + 1), [100 * a for a in run["blocks"]], **style)
            axes[2].axhline(100 * run["test_accuracy"], color=colours[run["mode"]], linewidth=1, linestyle="--", alpha=0.7)
    every = [100 * row["test_accuracy"] for run in runs for row in run["history"]]
    floor = max(0, min(sorted(every)[len(every) // 8], *(100 * a for run in runs for a in run["blocks"] or [1])) - 3)
    for axis, title, x in zip(axes, ("over epochs", "over time", "by block (dashed: vote of all)"), ("epoch", "seconds of training", "block"), strict=True):
        axis.set_title(title, fontsize=11, loc="left")
        axis.set_xlabel(x)
        axis.set_ylim(floor, 100.5 if max(every) > 90 else None)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("test accuracy (%)")
    axes[0].legend(frameon=False, loc="lower right", fontsize=9, title="final test accuracy, peak memory of a step", title_fontsize=9)
    figure.suptitle(f"{s['model']} (width {s['width']}) on {s['data']}", fontsize=12, x=0.01, ha="left", weight="bold")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
