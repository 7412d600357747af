"""Compares backpropagation with local training (`fastff compare`): accuracy, time and memory, for the same network, weights and batches."""

from statistics import median

from fastff.app import experiment
from fastff.app.environment import environment
from fastff.memory import peak_memory

MODES = ("backprop", "block", "layer", "stage")
CUTS = {"block": "auto"}  # granularities of modes; of others that of the same name


def modes_named(text):
    """Split a comma-separated list of modes, such as "backprop,block".

    Raises ValueError: a name is not in MODES or occurs twice."""
    modes = [name.strip() for name in text.split(",")]
    if any(mode not in MODES for mode in modes) or len(set(modes)) < len(modes):
        known = ", ".join(MODES)
        raise ValueError(f"modes: expected names out of {known}, each once, separated by commas, got {text!r}")
    return modes


def compare(s, modes, device, say):
    """Train in each of `modes`, one after the other.

    Args:
        s: settings, as `experiment.settings` returns them.
        modes: names out of MODES.
        device: torch.device.
        say: function that prints one line of text.

    Returns: {"runs": [result of run_mode, with the seconds of training until the test accuracy was backpropagation's last one or None],
    "environment": {...}, "settings": s}, which can be written as JSON."""
    dataset = experiment.load_data(s)
    runs = []
    for mode in modes:
        size = f"{len(dataset.train_images):,} training and {len(dataset.test_images):,} test images of {dataset.name}"
        say(f"{mode}: {s['model']} of width {s['width']}, {size}, {s['epochs']} epochs")
        runs.append(run_mode(s, dataset, mode, device))
    base = next((run["test_accuracy"] for run in runs if run["mode"] == "backprop"), None)
    for run in runs:
        reached = (row["seconds"] for row in run["history"] if base is not None and row["test_accuracy"] >= base)
        run["seconds_to_backprop"] = next(reached, None)
    return {"runs": runs, "environment": environment(device), "settings": s}


def run_mode(s, dataset, mode, device):
    """Train in one mode and return a dict, as in the JSON of `fastff compare`.

    Seconds are those of training without evaluation. Accuracies are those of the vote, in eval mode and without
    augmentation. The accuracies of the blocks are those on the test images."""
    s = s | ({"mode": "backprop"} if mode == "backprop" else {"mode": "sff", "granularity": CUTS.get(mode, mode)})
    memory = step_memory(s, dataset, device)
    trainer = experiment.make_trainer(s, dataset, device)
    train, test = experiment.loaders(s, dataset, device)
    rows = trainer.fit(train, s["epochs"], validation=test)
    plain = dataset.train_loader(256, augment=None, shuffle=False, device=device, channels_last=s["channels_last"])
    history, seconds = [], 0.0
    for row in rows:
        seconds += row["seconds"]
        blocks = [value for name, value in row.items() if name.startswith("test block ")]
        history.append({"epoch": row["epoch"], "seconds": seconds, "test_accuracy": row["test vote"], "blocks": blocks})
    voters = trainer.sff.plan.voters if history[-1]["blocks"] else ()
    return {
        "mode": mode,
        "test_accuracy": history[-1]["test_accuracy"],
        "train_accuracy": trainer.evaluate(plain)["vote"],
        "seconds_per_epoch": median(row["seconds"] for row in rows),
        "peak_memory_mb": memory,
        "epochs": s["epochs"],
        "blocks": history[-1]["blocks"],
        "block_names": [trainer.names[i] for i in voters],
        "block_depths": [(i + 1) / len(trainer.names) for i in voters],
        "history": history,
    }


def step_memory(s, dataset, device):
    """Return the peak memory of a training step in MiB."""
    trainer, *batch = experiment.trained_twice(s, dataset, device)
    return peak_memory(lambda: trainer.step(*batch), device)
