"""Networks, data and trainers from a plain dict of settings, which checkpoints keep as `meta`: shared by compare, train and predict."""

import torch

from fastff import models
from fastff.sff import SFF
from fastff.training import data, optim
from fastff.training.backprop import Backprop
from fastff.training.checkpoint import CheckpointError, load
from fastff.training.trainer import Trainer

MODELS = ("resnet18", "resnet34", "mobilenet_v3_small", "mobilenet_v3_large")
MODES = ("backprop", "block", "layer", "stage")

DEFAULTS = {
    "data": "digits", "root": None, "subset": None, "image_size": None, "model": "resnet18", "width": 16, "mode": "sff", "granularity": "block",
    "epochs": 15, "batch_size": 64, "lr": None, "weight_decay": 0.05, "grid": 4, "scale": None, "window": 2, "vote": "softmax", "schedule": "all",
    "micro_batches": 1, "clip": None, "amp": None, "compile": False, "channels_last": True, "seed": 0, "freeze": 0,
}  # fmt: skip


def settings(**given):
    """The defaults with what is given (None leaves a default), checked."""
    chosen = DEFAULTS | {key: value for key, value in given.items() if value is not None}
    if chosen["model"] not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {chosen['model']!r}")
    if chosen["mode"] not in ("sff", "backprop"):
        raise ValueError(f"mode: expected 'sff' or 'backprop', got {chosen['mode']!r}")
    for key in ("epochs", "batch_size", "width"):
        if not isinstance(chosen[key], int) or chosen[key] < 1:
            raise ValueError(f"{key}: expected a whole number of at least 1, got {chosen[key]!r}")
    if chosen["lr"] is not None and not 0 < chosen["lr"] < float("inf"):
        raise ValueError(f"lr: expected a positive number, got {chosen['lr']!r}")
    return chosen


def load_data(s):
    return data.load(s["data"], s["root"], s["subset"], s["seed"], s["image_size"])


def loaders(s, dataset, device):
    """(training, test) loaders."""
    options = {"device": device, "channels_last": s["channels_last"]}
    train = dataset.train_loader(s["batch_size"], seed=s["seed"], **options)
    return train, dataset.test_loader(max(256, s["batch_size"]), **options)


def build_network(s, num_classes, input_shape, device="cpu"):
    """The SFF of these settings, its weights drawn from the seed alone."""
    torch.manual_seed(s["seed"])
    stem = "cifar" if max(input_shape[1:]) <= 96 else "imagenet"
    size = {"width": s["width"]} if s["model"].startswith("resnet") else {}
    net = getattr(models, s["model"])(num_classes, stem=stem, in_channels=input_shape[0], **size)
    if s["channels_last"]:
        net = net.to(memory_format=torch.channels_last)
    granularity = s["granularity"].split(",") if "," in s["granularity"] or "." in s["granularity"] else s["granularity"]
    heads = {key: s[key] for key in ("grid", "scale", "window", "vote")}
    return SFF(net, num_classes, granularity, input_shape, readout=s["mode"] == "backprop", **heads).to(device)


def build_trainer(s, sff):
    """A Trainer, or Backprop where mode is "backprop"."""
    lr = s["lr"] or (optim.BACKPROP_LR if s["mode"] == "backprop" else optim.LOCAL_LR)
    options = {"micro_batches": s["micro_batches"], "amp": s["amp"], "clip_grad_norm": s["clip"], "compile": s["compile"]}
    make = optim.adamw(lr, s["weight_decay"])
    if s["mode"] == "backprop":
        return Backprop(sff, make, **options)
    return Trainer(sff, make, schedule=s["schedule"], frozen=s["freeze"], **options)


def describe(s, dataset):
    """`meta` of a run: the settings and what else the network is built from."""
    return {
        "settings": s, "num_classes": dataset.num_classes, "input_shape": list(dataset.input_shape), "classes": list(dataset.classes),
        "mean": list(dataset.mean), "std": list(dataset.std),
    }  # fmt: skip


def read_run(path, device="cpu"):
    """(state, meta) of a run's folder. Raises CheckpointError."""
    file = f"{path}/checkpoint.pt"
    state = load(file, device)
    if not isinstance(state.get("meta"), dict) or "settings" not in state["meta"]:
        raise CheckpointError(f"{file}: written without settings, not by `fastff train`")
    return state, state["meta"]


def transfer(sff, path):
    """Copy the blocks' weights of another run, and its heads where the classes are as many. Raises CheckpointError if nothing fits."""
    state, meta = read_run(path)
    wanted, copied = sff.state_dict(), 0
    found = state["module"] if any(key.startswith("model.") for key in state["module"]) else {f"model.{k}": v for k, v in state["module"].items()}
    own = {f"model.{name}.{key}" for block in sff.blocks for name in block.modules_called for key in sff.model.get_submodule(name).state_dict()}
    for key, value in found.items():
        fits = key in wanted and wanted[key].shape == value.shape
        if fits and (key in own or (key.startswith("heads.") and meta["num_classes"] == sff.num_classes)):
            wanted[key] = value
            copied += key in own
    if copied < len(own):
        raise CheckpointError(f"{path}: only {copied} of {len(own)} tensors of the blocks fit: it was trained with {meta['settings']['model']}, "
                              f"width {meta['settings']['width']}")  # fmt: skip
    sff.load_state_dict(wanted)
