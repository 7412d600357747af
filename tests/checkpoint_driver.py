"""Trains in forked children, kills them, and goes on from their checkpoints: run by test_checkpoint.py in a process of its own.

    python tests/checkpoint_driver.py FOLDER KIND KILLS     prints one JSON object

A child that has imported torch already starts in milliseconds, so that twenty kills take seconds.
"""

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from fastff import SFF, Backprop, Trainer
from fastff.training.checkpoint import load
from fastff.training.loader import Augment, Loader

with contextlib.suppress(ImportError):
    import torch.utils.tensorboard  # what fit imports, once for all children
with contextlib.suppress(ImportError):
    import tqdm  # torch.fx makes a bar, whose lock all children share: one that is killed within it would stop the others for ever

    tqdm.tqdm.set_lock(threading.RLock())

EPOCHS, CLASSES = 4, 4


def network():
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    layers = []
    for a, b in ((3, 6), (6, 6), (6, 8)):
        layers += [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.Dropout(0.2))]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))


def trainer(kind):
    sff = SFF(network(), CLASSES, input_shape=(3, 8, 8), readout=kind != "block")
    if kind == "backprop":
        return Backprop(sff)
    if kind == "greedy":
        return Trainer(sff, schedule="greedy", window=1)
    options = {
        "block": {"window": 1}, "window": {"window": 2}, "fp16": {"window": 1, "amp": "fp16"}, "pairs": {"plan": "pairs"},
        "drawn": {"plan": "drawn"}, "finish": {"finish": 0.7},
    }[kind]  # fmt: skip
    return Trainer(sff, **options)


def minibatches(kind):
    """Ours, or PyTorch's with an order drawn from the global generator."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (60,), generator=generator)
    if kind == "window":
        data = torch.utils.data.TensorDataset(images / 255, labels)
        return torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    return Loader(images, labels, 8, mean=[0.5] * 3, std=[0.25] * 3, augment=Augment(1, True), shuffle=True)


def run(kind, folder):
    """Train to the end from the checkpoint in `folder`, if there is one."""
    path = folder / "checkpoint.pt"
    made = trainer(kind)
    if path.exists():
        made.load(path)
    (folder / "begun").touch()
    made.fit(minibatches(kind), EPOCHS, out=folder, save_every=1, progress=False)


def child(kind, folder):
    """Process id of a fork that runs it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(kind, folder)
            code = 0
        finally:
            os._exit(code)
    return pid


def begun(kind, folder):
    """Process id of a fork that has begun to fit: how long it takes until then differs from one build of torch to the next."""
    folder.mkdir(exist_ok=True)
    (folder / "begun").unlink(missing_ok=True)
    pid = child(kind, folder)
    while not (folder / "begun").exists():
        ended, status = os.waitpid(pid, os.WNOHANG)
        assert not ended, f"the child ended with status {status} before it began"
        time.sleep(0.001)
    return pid


def same(a, b):
    """Whether two checkpoints' contents are equal to the last bit, seconds apart."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)  # NaN in the history is of a block that was not trained


def main(folder, kind, kills):
    torch.set_num_threads(1)
    folder, kills = Path(folder), int(kills)
    trainer(kind).step(*next(iter(minibatches(kind))))  # what a first step imports
    pid = begun(kind, folder / "whole")
    start = time.perf_counter()
    os.waitpid(pid, 0)
    length = time.perf_counter() - start
    draw, killed, positions, finished = random.Random(7), 0, [], 0
    while killed < kills:  # a run that gets to its end before its kill starts again in another folder
        pid = begun(kind, folder / f"killed-{finished}")
        time.sleep(draw.uniform(0, 0.6) * length)
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            path = folder / f"killed-{finished}" / "checkpoint.pt"
            positions.append(load(path)["steps"] if path.exists() else 0)
        else:
            assert os.WEXITSTATUS(status) == 0
            finished += 1
    _, status = os.waitpid(child(kind, folder / f"killed-{finished}"), 0)
    assert status == 0
    whole = load(folder / "whole" / "checkpoint.pt")
    ends = [load(folder / f"killed-{i}" / "checkpoint.pt") for i in range(finished + 1)]
    left = [p.name for p in folder.glob("killed-*/.*")]
    print(json.dumps({
        "killed": killed, "runs": finished + 1, "positions": positions, "same": [same(end, whole) for end in ends], "left": left,
        "steps": whole["steps"], "epochs": len(whole["history"]),
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
