"""Builds networks, data sets and trainers from a dict of settings, which checkpoints keep. The commands use it."""

import math
import os
from pathlib import Path
from typing import NamedTuple

import torch

from fastff import models
from fastff.app.environment import check_implementations
from fastff.arguments import check_member, first_line, number_between, whole_number
from fastff.graph.cut import GRANULARITIES
from fastff.parallel.ranks import BATCH_NORMS, leader_first
from fastff.plan import ending_at
from fastff.sff import SFF
from fastff.training import data, optim
from fastff.training.backprop import Backprop
from fastff.training.checkpoint import CheckpointError, load
from fastff.training.engine import AMP
from fastff.training.trainer import Trainer

MODELS = ("resnet18", "resnet34", "mobilenet_v3_small", "mobilenet_v3_large")

DEFAULTS = {
    "data": "digits", "root": None, "subset": None, "image_size": None,
    "model": "resnet18", "width": 16, "mode": "sff", "granularity": "auto",
    "epochs": 15, "batch_size": 64, "lr": None, "weight_decay": 0.05, "optimizer": "muon",
    "grid": 4, "hidden": 64, "scale": None, "window": None, "plan": None, "memory": None, "finish": 0.0, "vote": "weighted",
    "schedule": "all",
    "micro_batches": 1, "clip": None, "amp": None, "compile": False, "channels_last": True,
    "seed": 0, "freeze": 0, "batch_norm": "local",
}  # fmt: skip
# What runs did that were saved before there was such a setting, where it is not today's default.
BEFORE = {"optimizer": "adamw", "hidden": 0, "vote": "softmax", "granularity": "block"}
CHOICES = {
    "model": MODELS, "mode": ("sff", "backprop"), "schedule": ("all", "greedy"), "amp": (*AMP, "fp32"), "batch_norm": BATCH_NORMS,
    "optimizer": ("adamw", "muon"),
}  # fmt: skip
# Smallest allowed value of each whole number. Batch norm needs two values of each channel, and a channel may have one position.
LEAST = {
    "epochs": 1, "batch_size": 2, "width": 1, "micro_batches": 1, "grid": 0, "hidden": 0, "freeze": 0, "seed": 0, "window": 1,
}  # fmt: skip
# The weight gradient of a strided 1 x 1 convolution in channels_last writes past the end of oneDNN's buffer if the
# convolution has fewer channels than a vector register has floats (oneDNN issue 6035; seen with torch 2.13 and AVX2 at 2
# to 6 channels). The process crashes then, possibly later. The shortcuts of a ResNet are such convolutions. The longest
# register holds 16 floats.
CHANNELS_LAST_WIDTH = 16
RESUMABLE = ("epochs", "root")  # settings that may change when a run is resumed
LAUNCH = "TORCHELASTIC_RUN_ID"  # torchrun's name of a job, the same after restarts; "none" if the job has no name


def device_named(name=None):
    """Return the torch.device of `name`. None is cuda if there is a GPU, else cpu.

    Raises ValueError: the device does not work on this machine, or FASTFF_IMPL names an implementation that cannot run there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        works = device.type != "meta" and torch.zeros(1, device=device).item() == 0
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        text = f"expected one that works here, such as cpu or cuda, got {name!r} ({first_line(error)})"
        raise ValueError(f"device: {text}") from error
    if not works:
        raise ValueError(f"device: expected one that holds data, such as cpu or cuda, got {name!r}")
    check_implementations(device)
    return device


def settings(**given):
    """Return DEFAULTS updated with `given`, as a dict. A None in `given` leaves the default.

    Raises ValueError: a setting is out of range or contradicts another one, as far as this can be checked without data."""
    given = {key: value for key, value in given.items() if value is not None}
    s = DEFAULTS | given
    for key, allowed in CHOICES.items():
        check_member(key, s[key], allowed)
    for key, least in LEAST.items():
        s[key] = None if s[key] is None else whole_number(key, s[key], least)
    for key, zero in (("lr", False), ("clip", False), ("weight_decay", True)):
        s[key] = None if s[key] is None else number_between(key, s[key], 0, math.inf, low_allowed=zero)
    if s["hidden"] and not s["grid"]:
        if "hidden" in given:
            raise ValueError(f"hidden: expected 0 without a spatial term (grid 0), got {s['hidden']}")
        s["hidden"] = 0
    if _smallest_part(s["batch_size"], s["micro_batches"]) < 2:
        got = f"{s['micro_batches']} parts of a batch of {s['batch_size']}"
        raise ValueError(f"micro_batches: expected parts of at least 2 images each, got {got}")
    if s["mode"] == "backprop":
        for key in ("window", "plan", "memory", "finish", "grid", "hidden", "schedule", "freeze", "granularity"):
            if key in given and given[key] != DEFAULTS[key]:
                raise ValueError(f"{key}: expected none with mode backprop, which has no blocks, got {given[key]!r}")
    if s["schedule"] == "greedy":
        if s["window"] not in (None, 1):
            got = s["window"]
            raise ValueError(f"window: expected 1 with schedule='greedy', which trains one block alone, got {got}")
        if s["freeze"]:  # a greedy run would never train the heads of frozen blocks
            raise ValueError(f"freeze: expected 0 with schedule greedy, got {s['freeze']}")
    if s["model"].startswith("resnet") and s["width"] < CHANNELS_LAST_WIDTH and s["channels_last"]:
        if "channels_last" in given:
            text = f"a ResNet of width {CHANNELS_LAST_WIDTH} or more, since oneDNN corrupts memory for narrower ones"
            raise ValueError(f"channels_last: expected {text}, got width {s['width']}")
        s["channels_last"] = False
    # Paths are made absolute, so that a run can be resumed from another working directory.
    if s["data"] not in data.NAMES and Path(s["data"]).expanduser().is_dir():
        s["data"] = str(Path(s["data"]).expanduser().resolve())
    if s["root"] is not None:
        s["root"] = str(Path(s["root"]).expanduser().resolve())
    return s


def writable_folder(out, argument="out"):
    """Create the folder `out` and check that it can be written, before any training is done. Returns its Path.

    Raises ValueError: the folder cannot be written; the message names `argument`."""
    out = Path(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".fastff").touch()
        (out / ".fastff").unlink()
    except OSError as error:
        raise ValueError(f"{argument}: expected a folder that can be written, got {out} ({error.strerror})") from error
    return out


def load_data(s):
    """Return the Dataset of the settings `s`. With several processes, rank 0 downloads it."""
    return leader_first(lambda: data.load(s["data"], s["root"], s["subset"], s["seed"], s["image_size"]))


def loaders(s, dataset, device, replicas=1):
    """Return the Loaders (training, test). `replicas` is the number of data-parallel ranks that share each minibatch."""
    options = {"device": device, "channels_last": s["channels_last"]}
    last = len(dataset.train_images) % s["batch_size"] or s["batch_size"]
    # Batch norm cannot train on a single image with one position. If the last minibatch has such a part, it is dropped.
    drop_last = _smallest_part(last // replicas, s["micro_batches"]) < 2 and len(dataset.train_images) > s["batch_size"]
    train = dataset.train_loader(s["batch_size"], seed=s["seed"], drop_last=drop_last, **options)
    return train, dataset.test_loader(max(256, s["batch_size"]), **options)


def _smallest_part(size, micro_batches):
    """Number of images in the smallest micro-batch of a minibatch of `size` images, which is the last."""
    part = max(1, -(-size // micro_batches))
    return size % part or min(part, size)


def build_network(s, num_classes, input_shape, device="cpu"):
    """Return the SFF of the settings `s` for images of input_shape (C, H, W), on `device`.

    The seed determines its weights; those of the model are drawn before those of the heads."""
    torch.manual_seed(s["seed"])
    stem = "cifar" if max(input_shape[1:]) <= 96 else "imagenet"
    # The MobileNets of the paper start with 16 channels.
    size = {"width": s["width"]} if s["model"].startswith("resnet") else {"width_mult": s["width"] / 16}
    net = getattr(models, s["model"])(num_classes, stem=stem, in_channels=input_shape[0], **size)
    if s["channels_last"]:
        net = net.to(memory_format=torch.channels_last)
    granularity = s["granularity"]
    if granularity not in GRANULARITIES:
        paths = [path.strip() for path in granularity.split(",")]
        if len(paths) > 1 or paths[0] in dict(net.named_modules()) or "." in granularity:
            granularity = paths
    options = {key: s[key] for key in ("grid", "hidden", "scale", "window", "memory", "batch_size", "vote")}
    if s["mode"] == "sff":
        options["plan"] = _plan(s["plan"])
    return SFF(net, num_classes, granularity, input_shape, readout=s["mode"] == "backprop", **options).to(device)


def _plan(text):
    """The argument `plan` of SFF that a setting means: "pairs", "drawn", or numbers of blocks with commas, with / and the parts behind a number
    where a segment takes a minibatch in parts, turns of them with |."""
    if text is None or text in ("pairs", "drawn"):
        return text
    try:
        turns = [[tuple(map(int, end.split("/"))) for end in turn.split(",")] for turn in text.split("|")]
        if len(turns) == 1 and any(len(end) > 1 for end in turns[0]):
            ends, parts = zip(*((*end, 1)[:2] for end in turns[0]), strict=True)
            return ending_at(ends, parts)
        turns = [[end for (end,) in turn] for turn in turns]
    except ValueError:
        expected = "pairs, drawn, the blocks that end segments, such as 1,3,8, or 3/2,8 for a first one in 2 parts, or turns, such as 1,3,8|0,2,8"
        raise ValueError(f"plan: expected {expected}, got {text!r}") from None
    return turns if len(turns) > 1 else turns[0]


def build_trainer(s, sff, distributed=None):
    """Return the Trainer of the settings `s` for the SFF `sff`, or a Backprop if the mode is "backprop".

    Raises ValueError: several processes with "backprop", or all blocks frozen."""
    lr = s["lr"] or (optim.BACKPROP_LR if s["mode"] == "backprop" else optim.LOCAL_LR)
    options = {key: s[key] for key in ("micro_batches", "compile")} | {"clip_grad_norm": s["clip"]}
    options["amp"] = None if s["amp"] == "fp32" else s["amp"]
    make = getattr(optim, s["optimizer"])(lr, s["weight_decay"])
    if s["mode"] == "backprop":
        if distributed is not None:
            raise ValueError(
                "mode: expected sff with several processes, got 'backprop'; torch's DistributedDataParallel trains so"
            )
        return Backprop(sff, make, **options)
    if s["freeze"] >= len(sff.blocks):
        count = len(sff.blocks)
        raise ValueError(f"freeze: expected at most {count - 1} of the {count} blocks, got {s['freeze']}")
    frozen = {"frozen": s["freeze"], "train_frozen_heads": True}
    how = {"schedule": s["schedule"], "finish": s["finish"]}
    return Trainer(sff, make, distributed=distributed, **how, **frozen, **options)


def make_trainer(s, dataset, device, distributed=None):
    """Return the Trainer (or Backprop) of the settings `s` for a new network and this data set."""
    return build_trainer(s, build_network(s, dataset.num_classes, dataset.input_shape, device), distributed)


def trained_twice(s, dataset, device):
    """Return (trainer, images, target) after two steps on a minibatch, by this process alone, to measure a step without changing a run."""
    trainer = make_trainer(s, dataset, device)
    images, target = next(iter(loaders(s, dataset, device)[0]))
    trainer.train_mode()
    for _ in range(2):
        trainer.step(images, target)
    return trainer, images, target


def describe(s, dataset):
    """Return the dict that a checkpoint keeps as `meta`: the settings, and the facts about the data set that the network depends on."""
    return {
        "settings": s, "num_classes": dataset.num_classes, "input_shape": list(dataset.input_shape),
        "classes": list(dataset.classes), "mean": list(dataset.mean), "std": list(dataset.std),
        "train_images": len(dataset.train_images),
    }  # fmt: skip


class Run(NamedTuple):
    """A run of `fastff train`: settings, data set, Trainer (or Backprop), and the loaders of training and test images."""

    settings: dict
    dataset: data.Dataset
    trainer: object
    train: data.Loader
    test: data.Loader

    def fit(self, out, save_every=None):
        """Train to the last epoch of the settings, write checkpoints and metrics to the folder `out`, and return the history."""
        meta = describe(self.settings, self.dataset) | {"launch": os.environ.get(LAUNCH)}
        return self.trainer.fit(self.train, self.settings["epochs"], self.test, out, save_every=save_every, meta=meta)

    @property
    def finished(self):
        """Whether all epochs have been trained."""
        return self.trainer.position["epoch"] >= self.settings["epochs"] * self.trainer.engine.phases


def amp_on(device, amp):
    """Return the setting `amp` of a new run on `device`: bf16 on a GPU that has it, unless another is asked for."""
    if amp is None and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return amp


def start(s, device, start_from=None, distributed=None):
    """Return a new Run.

    Args:
        s: settings.
        device: torch.device.
        start_from: folder of another run whose blocks are copied, or None.
        distributed: fastff.Distributed, or None for one process.

    Raises:
        ValueError: blocks are to be frozen without `start_from`.
        CheckpointError: `start_from` holds no run, or its blocks do not fit."""
    if s["freeze"] and start_from is None:
        raise ValueError(f"freeze: expected 0 without --from, which would bring trained blocks, got {s['freeze']}")
    if start_from is not None:
        read_run(start_from)  # fails early if there is no such run, before data is downloaded
    s = s | {"amp": amp_on(device, s["amp"])}
    dataset = load_data(s)
    sff = build_network(s, dataset.num_classes, dataset.input_shape, device)
    if start_from is not None:
        transfer(sff, start_from)
    trainer = build_trainer(s, sff, distributed)
    return Run(s, dataset, trainer, *loaders(s, dataset, device, trainer.ranks.data_size))


def resume(folder, device, distributed=None, **given):
    """Return the Run in `folder` in the state where it stopped. The number of processes may differ.

    Args:
        folder: folder of the run.
        device: torch.device.
        distributed: fastff.Distributed, or None for one process.
        given: settings; those in RESUMABLE may differ from the run's.

    Raises ValueError: another setting differs, or the data set is not that of the run."""
    _, meta = read_run(folder)
    s = dict(meta["settings"])
    given = {key: value for key, value in given.items() if value is not None}
    asked = settings(**(s | given))
    for key in given:
        if asked[key] != s[key] and key not in RESUMABLE:
            text = f"expected {s[key]!r}, as the run in {folder} has (only {' and '.join(RESUMABLE)} can change)"
            raise ValueError(f"{key}: {text}, got {asked[key]!r}")
    if asked["schedule"] == "greedy" and asked["epochs"] != s["epochs"]:
        text = f"expected {s['epochs']}, since a greedy run counts them block by block"
        raise ValueError(f"epochs: {text}, got {asked['epochs']}")
    dataset = load_data(asked)
    found = describe(s, dataset)
    for key, value in found.items():
        if meta[key] != value:
            text = f"expected the data set of the run in {folder}, whose {key} is {short(meta[key])}"
            raise ValueError(f"data: {text}, got {short(value)}")
    trainer = make_trainer(asked, dataset, device, distributed)
    trainer.load(Path(folder) / "checkpoint.pt")
    return Run(asked, dataset, trainer, *loaders(asked, dataset, device, trainer.ranks.data_size))


def restarted(folder):
    """Whether torchrun has restarted these processes (after a failure, or with other ranks) and the run in `folder` was theirs before."""
    if not (Path(folder) / "checkpoint.pt").exists() or LAUNCH not in os.environ:
        return False
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        return True
    return os.environ[LAUNCH] != "none" and read_run(folder)[1].get("launch") == os.environ[LAUNCH]


def short(value):
    """Return what an error shows of a value that may be long."""
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."


def read_run(folder, device="cpu"):
    """Read the checkpoint in the folder of a run and return (state, meta).

    Raises CheckpointError: the folder holds no checkpoint of `fastff train`."""
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder}: expected the folder of a run (fastff train --out), there is no such folder")
    file = Path(folder) / "checkpoint.pt"
    state = load(file, device)
    meta = state.get("meta")
    if not isinstance(meta, dict) or not {"settings", "classes", "input_shape", "train_images"} <= meta.keys():
        raise CheckpointError(
            f"{file}: expected a checkpoint of fastff train, it does not say how to build the network"
        )
    # A setting that the run does not have was added to fastff later.
    return state, meta | {"settings": DEFAULTS | BEFORE | meta["settings"]}


def transfer(sff, folder):
    """Copy the weights of all blocks from the run in `folder` into `sff`.

    Heads and classifier are copied too if the number of classes is the same. Heads are matched by the names of their
    blocks, which depend on the granularity.

    Raises CheckpointError: `folder` holds no run, or a block is missing in it or has another shape."""
    state, meta = read_run(folder)
    saved = state["module"]
    if not any(key.startswith("model.") for key in saved):  # backpropagation saves the model without heads
        saved = {f"model.{key}": value for key, value in saved.items()}
    places = {name: f"heads.{index}." for index, name in enumerate(state["names"])}
    heads = {f"heads.{index}.": places.get(block.name) for index, block in enumerate(sff.blocks)}
    in_blocks = tuple({f"model.{name}." for block in sff.blocks for name in block.modules_called})
    same_classes = meta["num_classes"] == sff.num_classes
    wanted, missing = sff.state_dict(), []
    for key, value in wanted.items():
        head = next((head for head in heads if key.startswith(head)), "")
        found = saved.get(key.replace(head, heads[head] or "none.", 1) if head else key)
        of_block = key.startswith(in_blocks)
        if found is not None and found.shape == value.shape and (of_block or same_classes):
            wanted[key] = found
        elif of_block:
            shape = "missing" if found is None else list(found.shape)
            missing.append(f"{key.removeprefix('model.')} is {shape} there, {list(value.shape)} here")
    if missing:
        s = meta["settings"]
        raise CheckpointError(
            f"{folder}: expected a run with the same blocks, but {len(missing)} of their tensors do not fit: "
            f"{missing[0]} (it has {s['model']} of width {s['width']} for {s['data']}, images of "
            f"{meta['input_shape'][0]} channels)"
        )
    sff.load_state_dict(wanted)
