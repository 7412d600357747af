"""Checkpoints written by version 0.1 load, and training goes on as it did there.

tests/data/trainer-0.1.pt and backprop-0.1.pt were saved by a Ctrl-C after 6 of 12 steps, in the middle of the second epoch; history-0.1.json
is the history that version 0.1 reached from there (seconds left out).
"""

import json
from pathlib import Path

import pytest
import torch

from fastff import SFF, Backprop, Trainer
from fastff.training import checkpoint, optim

DATA = Path(__file__).parent / "data"


def network():
    torch.manual_seed(0)
    layers = [
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 4, 3),
        torch.nn.ReLU(),
    ]
    net = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
    return SFF(net, 3, input_shape=(3, 8, 8), granularity="layer", hidden=0, readout=True)


def batches():
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(5, 3, 8, 8, generator=draw), torch.randint(3, (5,), generator=draw)) for _ in range(4)]


# what 0.1 had by default
MAKE = {
    "trainer": lambda: Trainer(network(), optim.adamw(4e-3), window=2, amp="fp16"),
    "backprop": lambda: Backprop(network(), optim.adamw(2e-3)),
}


@pytest.mark.parametrize("name", MAKE)
def test_training_goes_on(name):
    trainer = MAKE[name]()
    trainer.load(DATA / f"{name}-0.1.pt")
    assert (trainer.steps, trainer.position) == (6, {"epoch": 1, "batch": 2})
    history = trainer.fit(batches(), 3, progress=False)
    expected = json.loads((DATA / "history-0.1.json").read_text())[name]
    assert [row.keys() - {"seconds"} for row in history] == [row.keys() for row in expected]
    for row, before in zip(history, expected, strict=True):
        assert {key: row[key] for key in before} == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("name", MAKE)
def test_what_is_saved_has_the_same_form(name, tmp_path):
    """Keys, types and tensors' shapes of a loaded and saved checkpoint are those of the file."""
    trainer = MAKE[name]()
    trainer.load(DATA / f"{name}-0.1.pt")
    trainer.save(tmp_path / "again.pt")
    before, after = checkpoint.load(DATA / f"{name}-0.1.pt"), checkpoint.load(tmp_path / "again.pt")
    for state in (before, after):  # these depend on the machine
        state["random"].pop("cuda", None)
        state["epoch_random"].pop("cuda", None)
    for key in ("python", "numpy", "loader"):  # later versions have these as well
        after["random"].pop(key)
    classes = [state.pop("class") for state in after["optimizers"]]
    assert classes == ["AdamW"] * len(classes)
    assert form(before) == form(after)
    assert before["meta"] == after["meta"] == {"note": "fastff 0.1"}


def form(value):
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, dict):
        return {key: form(entry) for key, entry in value.items()}
    return [form(entry) for entry in value] if isinstance(value, (list, tuple)) else type(value).__name__


def test_with_other_settings_the_old_defaults_are_said():
    with pytest.raises(
        checkpoint.CheckpointError, match=r"trainer-0.1.pt: .* \(written by fastff 0.1, whose defaults were .*hidden=0"
    ):
        Trainer(network()).load(DATA / "trainer-0.1.pt")
