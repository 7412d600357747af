"""Checkpoints: resumed to the same bits after kill -9 and Ctrl-C, written whole or not at all, never executed."""

import copy
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import checkpoint_driver as driver
import pytest
import torch

from fastff import SFF, Trainer
from fastff.training import checkpoint
from fastff.training.checkpoint import CheckpointError
from fastff.training.fit import Diverged, Interrupted


@pytest.mark.parametrize(("kind", "kills"), [
        ("block", 20), ("window", 4), ("greedy", 2), ("fp16", 2), ("pairs", 4), ("drawn", 4), ("finish", 4), ("backprop", 2),
    ],
)  # fmt: skip
def test_killed_at_random_moments(kind, kills, tmp_path):
    """SIGKILL, go on, SIGKILL, ...: weights, optimisers, scalers, random states and history end equal to the last bit.

    A checkpoint is written after every step, so that kills fall into the writing as well. "window" draws its order from the global
    generator, and its kills fall inside an epoch."""
    command = [sys.executable, driver.__file__, str(tmp_path), kind, str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["killed"] == kills
    assert result["same"] == [True] * result["runs"], result
    assert result["left"] == []
    assert result["steps"] == 8 * driver.EPOCHS * (3 if kind == "greedy" else 1)
    if kills > 10:
        assert len(set(result["positions"])) > 5, "the kills did not fall at different moments"


def small(classes=3, width=4, **options):
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, width, 3), torch.nn.ReLU(), torch.nn.Conv2d(width, width, 3), torch.nn.ReLU()]
    net = torch.nn.Sequential(
        *layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(width, classes)
    )
    return Trainer(SFF(net, classes, input_shape=(3, 8, 8)), **options)


def batches(count=4, classes=3):
    generator = torch.Generator().manual_seed(1)
    draw = lambda: (torch.randn(5, 3, 8, 8, generator=generator), torch.randint(classes, (5,), generator=generator))  # noqa: E731
    return [draw() for _ in range(count)]


@pytest.fixture
def saved(tmp_path):
    trainer = small()
    trainer.step(*batches()[0])
    trainer.save(tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt"


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "os.replace"])
def test_a_failure_while_writing_leaves_the_former_checkpoint(saved, broken, monkeypatch):
    before, trainer = saved.read_bytes(), small()

    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(broken, fails)
    with pytest.raises(OSError, match="No space left"):
        trainer.save(saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == ["checkpoint.pt"]
    trainer.load(saved)


class Executes:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_loading_executes_nothing(how, tmp_path):
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "executed"
    state = {"format": "fastff", "module": Executes(str(trace))}
    torch.save(state, path) if how == "torch.save" else path.write_bytes(pickle.dumps(state))
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: not a readable fastff checkpoint"):
        small().load(path)
    assert not trace.exists()
    assert isinstance(
        torch.load(path, weights_only=False) if how == "torch.save" else pickle.loads(path.read_bytes()), dict
    )
    assert trace.exists(), "this file would not have shown it"


def test_files_that_are_no_checkpoints(saved, tmp_path):
    path, whole = tmp_path / "other.pt", saved.read_bytes()
    for content, says in (
        (None, "no such checkpoint"),
        (b"", "damaged or of another kind"),
        (whole[: len(whole) // 2], "damaged or of another kind"),
        (whole[:-1], "damaged or of another kind"),
        (b"\x89PNG" + bytes(1000), "damaged or of another kind"),
    ):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"other.pt: .*{says}"):
            small().load(path)
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(CheckpointError, match="expected a fastff checkpoint, got a file with something else in it"):
        small().load(path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        small().load(tmp_path)


def test_checkpoints_of_another_network(saved):
    trainer = small(width=6)
    before = copy.deepcopy(trainer.sff.state_dict())
    with pytest.raises(CheckpointError, match="do not fit this network"):
        trainer.load(saved)
    for name, value in trainer.sff.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} was written by a load that failed"
    with pytest.raises(CheckpointError, match="do not fit this network"):
        small(classes=4).load(saved)
    torch.manual_seed(0)
    deeper = SFF(torch.nn.Sequential(*(torch.nn.Conv2d(3, 3, 1) for _ in range(3))), 3, input_shape=(3, 8, 8))
    with pytest.raises(CheckpointError, match="of another network or cut"):
        Trainer(deeper).load(saved)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """With the block's name and the step; the last good checkpoint stays."""
    trainer, data = small(window=1), batches()
    trainer.fit(data, 1, out=tmp_path, progress=False)
    good = (tmp_path / "checkpoint.pt").read_bytes()
    data[2] = (torch.full_like(data[2][0], float("nan")), data[2][1])
    with pytest.raises(Diverged, match="the loss of block 0 became NaN or infinite at step 7") as caught:
        trainer.fit(data, 2, out=tmp_path, save_every=10, progress=False)
    assert caught.value.step == 7
    assert str(tmp_path / "checkpoint.pt") in str(caught.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


@pytest.mark.parametrize("at", [1, 3, 4])
def test_ctrl_c_finishes_the_step_and_saves(at, tmp_path):
    whole, stopped, data = small(), small(), batches()
    whole.fit(data, 2, progress=False)

    class Stops(list):
        def __iter__(self):
            for i, batch in enumerate(list.__iter__(self), 1):
                if i == at:
                    os.kill(os.getpid(), signal.SIGINT)
                yield batch

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=f"stopped after step {at}; continue with --resume {tmp_path}"):
        stopped.fit(Stops(data), 2, out=tmp_path, progress=False)
    assert signal.getsignal(signal.SIGINT) is handler
    fresh = small()
    fresh.load(tmp_path / "checkpoint.pt")
    assert fresh.steps == at
    fresh.fit(data, 2, out=tmp_path, progress=False)
    assert driver.same(fresh.sff.state_dict(), whole.sff.state_dict())
    assert driver.same([o.state_dict() for o in fresh.optimizers], [o.state_dict() for o in whole.optimizers])


def test_random_state_goes_along(saved):
    trainer = small()
    torch.manual_seed(123)
    trainer.save(saved)
    expected = torch.rand(3)
    torch.manual_seed(5)
    small().load(saved)
    assert torch.equal(torch.rand(3), expected)
    assert set(checkpoint.load(saved)["random"]) >= {"cpu"}
