"""Accuracy of block-local training and backpropagation: CIFAR-10 (5,000 images), ResNet18 of width 16 and 32, 16 epochs, and other tasks.

    python -m benchmarks.learning --root FOLDER                 every experiment that is not in results/learning.csv
    python -m benchmarks.learning --root FOLDER --only NAME...  these experiments

All runs use one thread and one seed. Seconds are the processor time of training so far, without evaluation. All experiments together take a few hours
on one core. benchmarks/learning_report.py makes tables and curves of the results.
"""

import argparse
import csv
import sys
import time
from pathlib import Path

import torch

import fastff
from benchmarks.timing import append_csv
from fastff.training import Backprop, Trainer, data, optim

RESULTS = Path(__file__).parent / "results" / "learning.csv"
PAPER = {"grid": 0, "scale": 1.0, "window": 1}
BASE = {
    "width": 16,
    "images": 5000,
    "epochs": 16,
    "lr": 2e-3,
    "weight_decay": 0.05,
    "updates": "adamw",
    "mode": "sff",
    "granularity": "block",
    "hidden": 0,
    "vote": "softmax",
    "dataset": "cifar10",
    "model": "resnet18",
}

BEST = {"window": 2, "lr": 4e-3}
STAGE = {"granularity": "stage"}
MUON = {"updates": "muon"}
FASHION = {"dataset": "fashion-mnist"}
MOBILE = {"model": "mobilenet_v3_small"}
BACKPROP = {"mode": "backprop"}
ALL = {"images": 50000, "epochs": 6}

EXPERIMENTS = {
    "backprop": BACKPROP,
    "backprop-lr4": BACKPROP | {"lr": 4e-3},
    "paper": PAPER,
    "scale4": PAPER | {"scale": 4.0},
    "grid": {"window": 1},
    "grid-only": {"window": 1, "squares": False},
    "grid-lr4": {"window": 1, "lr": 4e-3},
    "grid-w2-lr4": BEST,
    "grid-w3-lr4": BEST | {"window": 3},
    "stage-lr4": STAGE | {"window": 1, "lr": 4e-3},
    "stage-w2-lr4": STAGE | BEST,
    "layer-w2-lr4": BEST | {"granularity": "layer"},
    "grid-w2-smooth": {"window": 2, "label_smoothing": 0.1},
    "grid-w2-tau": {"window": 2, "learn_tau": True},
    "grid-w2-lr4-wd20": BEST | {"weight_decay": 0.2},
    "backprop-muon": BACKPROP | MUON,
    "grid-muon": {"window": 1, "lr": 4e-3} | MUON,
    "grid-w2-muon": BEST | MUON,
    "stage-muon": STAGE | {"window": 1, "lr": 4e-3} | MUON,
    "stage-w2-muon": STAGE | BEST | MUON,
    "backprop-32": BACKPROP | {"width": 32},
    "grid-w2-lr4-32": BEST | {"width": 32},
    "stage-w2-lr4-32": STAGE | BEST | {"width": 32},
    "backprop-1000": BACKPROP | {"images": 1000, "epochs": 40},
    "grid-w2-lr4-1000": BEST | {"images": 1000, "epochs": 40},
    "stage-w2-lr4-1000": STAGE | BEST | {"images": 1000, "epochs": 40},
    "backprop-500": BACKPROP | {"images": 500, "epochs": 40},
    "grid-w2-lr4-500": BEST | {"images": 500, "epochs": 40},
    "stage-w2-lr4-500": STAGE | BEST | {"images": 500, "epochs": 40},
    "backprop-all": BACKPROP | ALL,
    "grid-w2-lr4-all": BEST | ALL,
    "stage-w2-lr4-all": STAGE | BEST | ALL,
    "fashion-backprop-all": FASHION | BACKPROP | {"images": 60000, "epochs": 3},
    "fashion-block-all": FASHION | BEST | {"images": 60000, "epochs": 3},
    "fashion-backprop": FASHION | BACKPROP,
    "fashion-block": FASHION | BEST,
    "fashion-mobilenet-backprop": FASHION | MOBILE | BACKPROP,
    "fashion-mobilenet-block": FASHION | MOBILE | BEST,
    "mobilenet-backprop": MOBILE | BACKPROP,
    "mobilenet-block": MOBILE | BEST,
}

SFF_KEYS = (
    "grid",
    "hidden",
    "vote",
    "scale",
    "window",
    "squares",
    "label_smoothing",
    "learn_tau",
    "tau",
    "kernel_size",
    "margin",
    "bias",
    "normalize",
)


@torch.no_grad()
def votes(sff, loader):
    """Return {name: test accuracy} of several ways to combine the blocks, and of each block alone."""
    sff.eval()
    counts, total = {}, 0
    for images, target in loader:
        logits = torch.stack(sff.logits(sff.goodness(images)))
        probabilities = logits.softmax(2)
        half = len(logits) // 2
        combinations = {
            "softmax": probabilities.mean(0),
            "log-softmax": logits.log_softmax(2).mean(0),
            "goodness": logits.mean(0),
            "last half": probabilities[half:].mean(0),
            "last": logits[-1],
        } | {f"block {i}": g for i, g in enumerate(logits)}
        for name, scores in combinations.items():
            counts[name] = counts.get(name, 0) + (scores.argmax(1) == target).sum().item()
        total += len(target)
    sff.train()
    return {name: count / total for name, count in counts.items()}


def run(name, options, root):
    """Train one experiment and yield a row of the CSV after each epoch."""
    o = BASE | options
    d = data.load(o["dataset"], root=root, subset=o["images"], test_subset=2000)
    torch.manual_seed(0)
    make = getattr(fastff.models, o["model"])
    width = {"width": o["width"]} if o["model"].startswith("resnet") else {}
    net = make(d.num_classes, stem="cifar", in_channels=d.input_shape[0], **width).to(memory_format=torch.channels_last)
    sff = fastff.SFF(
        net, d.num_classes, o["granularity"], d.input_shape, readout=o["mode"] == "backprop",
        **{k: o[k] for k in SFF_KEYS if k in o},
    )  # fmt: skip
    optimizer = getattr(optim, o["updates"])(o["lr"], o["weight_decay"])
    trainer = Backprop(sff, optimizer) if o["mode"] == "backprop" else Trainer(sff, optimizer)
    train, test = d.train_loader(64, drop_last=True, channels_last=True), d.test_loader(500, channels_last=True)
    steps, seconds = o["epochs"] * len(train), 0.0
    for epoch in range(o["epochs"]):
        train.set_epoch(epoch)
        trainer.train_mode()
        start = time.process_time()
        for i, (images, target) in enumerate(train):
            trainer.engine.set_progress(trainer.lr_schedule, (epoch * len(train) + i + 1) / steps)
            losses = trainer.step(images, target)
        seconds += time.process_time() - start
        assert torch.isfinite(losses).all(), name
        if o["mode"] == "backprop":
            accuracy = {"vote": trainer.evaluate(test)["vote"]}
        else:
            accuracy = votes(sff, test)
            accuracy = {"vote": accuracy.pop("softmax"), "last": accuracy.pop("last"), **accuracy}
        blocks = " ".join(f"{v:.4f}" for k, v in accuracy.items() if k.startswith("block "))
        other = " ".join(f"{k}={accuracy[k]:.4f}" for k in ("log-softmax", "goodness", "last half") if k in accuracy)
        yield {
            "experiment": name, "dataset": o["dataset"], "model": o["model"], "width": o["width"], "images": o["images"], "epoch": epoch + 1,
            "seconds": round(seconds, 1), "vote": accuracy["vote"], "last": accuracy.get("last", accuracy["vote"]), "other votes": other,
            "blocks": blocks, "options": " ".join(f"{k}={v}" for k, v in options.items()),
        }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", help="folder with the data sets' official files")
    parser.add_argument(
        "--only", nargs="+", choices=EXPERIMENTS, metavar="NAME", help=f"out of {', '.join(EXPERIMENTS)}"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done = set()
    if RESULTS.exists():
        with open(RESULTS) as file:
            done = {row["experiment"] for row in csv.DictReader(file)}
    for name in arguments.only or [name for name in EXPERIMENTS if name not in done]:
        rows = []
        for row in run(name, EXPERIMENTS[name], arguments.root):
            rows.append(row)
            print(
                f"{name:20} epoch {row['epoch']:2}  {row['seconds']:6.0f} s  vote {row['vote']:.1%}  last {row['last']:.1%}",
                flush=True,
            )
        print(f"{'':20} {rows[-1]['other votes']}  blocks {rows[-1]['blocks']}", flush=True)
        append_csv(RESULTS, rows)


if __name__ == "__main__":
    sys.exit(main())
