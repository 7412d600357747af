"""Trains over several forked ranks, kills or stops one, and goes on from the checkpoint with other ranks: run by test_distributed.py.

    python tests/kill_driver.py FOLDER KIND KILLS [SIGNAL]     prints one JSON object

KIND "block": 1 to 3 ranks share the blocks, each attempt another number of them. "data": 2 ranks share minibatches. A child that has imported
torch already starts in milliseconds.
"""

import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
from checkpoint_driver import same
from torch import nn

from fastff import SFF, Distributed, RankFailed, Trainer
from fastff.parallel import watch
from fastff.training.checkpoint import load
from fastff.training.loader import Augment, Loader

with contextlib.suppress(ImportError):
    import torch.utils.tensorboard  # what fit imports, once for all children

EPOCHS, CLASSES, LIMIT = 4, 4, 8  # LIMIT: seconds to wait for another rank
watch.PERIOD, watch.PATIENCE = 0.05, 0.6


def trainer(kind, ranks):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    layers = []
    for a, b in ((3, 6), (6, 6), (6, 8), (8, 8)):
        layers += [nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU())]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))
    several = Distributed(block_ranks=ranks if kind == "block" else 1, timeout=LIMIT)
    return Trainer(SFF(net, CLASSES, input_shape=(3, 8, 8), window=1), distributed=several if ranks > 1 else None)


def run(kind, ranks, folder):
    """Train to the end from the checkpoint in `folder`, if there is one."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, CLASSES, (60,), generator=generator)
    data = Loader(images, labels, 8, mean=[0.5] * 3, std=[0.25] * 3, augment=Augment(1, True), shuffle=True)
    made = trainer(kind, ranks)
    if (folder / "checkpoint.pt").exists():
        made.load(folder / "checkpoint.pt")
    (folder / "begun").touch()
    made.fit(data, EPOCHS, out=folder, save_every=1, progress=False)


def start(kind, ranks, folder):
    """Process ids of forks that run it together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            code = 1
            try:
                run(kind, ranks, folder)
                code = 0
            except RankFailed as error:
                if watch.prints_failure():
                    with open(folder / "failures.txt", "a") as file:
                        file.write(f"{error}\n")
            finally:
                os._exit(code)
        children.append(pid)
    return children


def ended(children):
    """Exit statuses, negative for signals."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def modified(path):
    """When the file was written last; 0 without one."""
    return path.stat().st_mtime_ns if path.exists() else 0


def main(folder, kind, kills, how="SIGKILL"):
    torch.set_num_threads(1)
    folder, kills, how = Path(folder), int(kills), getattr(signal, how)
    (folder / "whole").mkdir(parents=True)
    assert ended(start(kind, 1 if kind == "block" else 2, folder / "whole")) == [0] * (1 if kind == "block" else 2)
    draw, killed, positions, finished, statuses, longest = random.Random(3), 0, [], 0, [], 0.0
    lost, told, reports = [], 0, []
    while killed < kills:  # a run that gets to its end before its kill starts again in another folder
        target = folder / f"killed-{finished}"
        target.mkdir(exist_ok=True)
        ranks = draw.choice([2, 3]) if kind == "block" else 2
        (target / "begun").unlink(missing_ok=True)
        children = start(kind, ranks, target)
        early = draw.random() < 0.1  # while the ranks still come together
        # Often not before its next step has been saved, on a slow machine too.
        saved = modified(target / "checkpoint.pt") if draw.random() < 0.7 else None
        wait_until = time.monotonic() + 20  # a run that had got to its end saves no more
        while not early and not ((target / "begun").exists() and saved != modified(target / "checkpoint.pt")):
            if time.monotonic() > wait_until:
                break
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        victim = draw.randrange(ranks)  # with rank 0 the store ends, since no torchrun keeps it elsewhere
        os.kill(children[victim], how)
        begun = time.perf_counter()
        others = ended([pid for pid in children if pid != children[victim]])
        os.kill(children[victim], signal.SIGKILL)
        longest = max(longest, time.perf_counter() - begun)
        if ended([children[victim]]) == [0] or not any(others):  # the others were done before it was killed
            finished, told = finished + 1, 0
            continue
        killed += 1
        statuses.append(others)
        path = target / "checkpoint.pt"
        positions.append(load(path)["steps"] if path.exists() else 0)
        lines = (target / "failures.txt").read_text().splitlines() if (target / "failures.txt").exists() else []
        ends = [int(line.split("ended at step ")[1].split(";")[0]) for line in lines[told:] if "ended at step" in line]
        reports.append(len(lines) - told)
        told = len(lines)
        lost.append(max(ends, default=positions[-1]) - positions[-1])
    ranks = 1 if kind == "block" else 2
    assert ended(start(kind, ranks, folder / f"killed-{finished}")) == [0] * ranks
    whole = load(folder / "whole" / "checkpoint.pt")
    ends = [load(folder / f"killed-{i}" / "checkpoint.pt") for i in range(finished + 1)]
    lines = [line for file in folder.glob("killed-*/failures.txt") for line in file.read_text().splitlines()]
    print(json.dumps({
        "killed": killed, "runs": finished + 1, "positions": positions, "statuses": statuses, "told": lines, "longest": longest, "lost": lost,
        "reports": reports,
        "same": [same(end, whole) for end in ends], "steps": whole["steps"],
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
