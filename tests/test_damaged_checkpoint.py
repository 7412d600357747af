"""Checkpoints that do not fit are refused whole: damaged ones, newer ones, ones of other optimisers, ones with anything missing or changed."""

import copy
import errno
import functools
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import checkpoint_driver as driver
import numpy as np
import pytest
import torch
from test_checkpoint import batches, small
from torch.utils.data import DataLoader, Dataset, Subset, WeightedRandomSampler

from fastff import Backprop, Trainer
from fastff.training import checkpoint, optim, report
from fastff.training.checkpoint import CheckpointError
from fastff.training.fit import Interrupted
from fastff.training.randomness import generators_of, random_state


def trained(optimizer=None, **options):
    trainer = small(optimizer=optimizer or optim.adamw(), window=1, **options)
    trainer.fit(batches(3), 1, progress=False)
    trainer.state.totals, trainer.state.position["batch"] = torch.rand(3, 2), 1
    return trainer


def everything(trainer):
    """Copies of all that a load may write to."""
    state = trainer.state
    optimizers = [optimizer.state_dict() for optimizer in trainer.optimizers]
    scalers = [None if scaler is None else scaler.state_dict() for scaler in trainer.engine.scalers]
    written = [trainer.sff.state_dict(), optimizers, scalers, random_state()]
    return copy.deepcopy([*written, state.steps, state.position, state.history, state.totals, state.meta])


def places(value, path=()):
    """Yields the path of everything in nested dicts and lists; of long lists of numbers (a random state) the first alone."""
    for key, entry in value.items() if isinstance(value, dict) else list(enumerate(value))[:1]:
        yield (*path, key)
        if isinstance(entry, (dict, list, tuple)):
            yield from places(entry, (*path, key))


def changed(state, path, change):
    """A copy of a checkpoint's contents in which the entry at `path` is changed, or removed for change None."""
    state = copy.deepcopy(state)
    *outer, last = path
    inside = state
    for key in outer:
        if isinstance(inside[key], tuple):
            inside[key] = list(inside[key])
        inside = inside[key]
    if change is None:
        del inside[last]
    else:
        inside[last] = change(inside[last])
    return state


def other_type(value):
    return 3 if isinstance(value, (str, dict, list, tuple)) else "something else"


def other_shape(value):
    return torch.zeros(7, 5, dtype=value.dtype)


def may_be_missing(place):
    """Options that torch fills in, what files of version 0.1 have not, states of parameters that never had a gradient."""
    filled = ("amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")
    later = ("class", "python", "numpy", "loader", "cuda")
    return place[-1] in filled + later or (place[-2:-1] == ("state",) and isinstance(place[-1], int))


CHANGES = {"removed": None, "type": other_type, "shape": other_shape}


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "checkpoint.pt"
    trained(amp="fp16").save(path)
    return checkpoint.load(path)


@pytest.mark.parametrize("how", ["removed", "type", "shape"])
def test_every_entry_removed_or_changed(how, contents, tmp_path):
    """One at a time: a CheckpointError with the file's name, and everything to the last bit as before."""
    trainer, path = trained(amp="fp16"), tmp_path / "changed.pt"
    with torch.no_grad():
        trainer.sff.heads[0].weight.add_(1)
    before, count = everything(trainer), 0
    for place in places(contents):
        entry = contents
        for key in place:
            entry = entry[key]
        free = place[0] in ("meta", "history") and len(place) > 1  # as the user likes
        if free or (how == "removed" and may_be_missing(place)):
            continue
        if how == "shape" and not isinstance(entry, torch.Tensor):
            continue
        torch.save(changed(contents, place, CHANGES[how]), path)
        with pytest.raises(CheckpointError) as caught:
            trainer.load(path)
            pytest.fail(f"{place} loads")
        assert str(path) in str(caught.value)
        assert driver.same(everything(trainer), before), f"{place}: something was written by a load that failed"
        count += 1
    assert count > (20 if how == "shape" else 60)
    torch.save(contents, path)
    trainer.load(path)
    assert not driver.same(everything(trainer), before)


@pytest.mark.parametrize(
    "place, value",
    [
        (("scalers", 0, "scale"), None), (("scalers", 0, "_growth_tracker"), None), (("scalers", 1, "growth_factor"), None),
        (("random", "loader"), "abcd"), (("epoch_random", "loader"), [3]),
    ],
)  # fmt: skip
def test_values_that_would_fail_later(place, value, contents, tmp_path):
    trainer, path = trained(amp="fp16"), tmp_path / "changed.pt"
    before = everything(trainer)
    torch.save(changed(contents, place, lambda _: value), path)
    with pytest.raises(CheckpointError, match=place[-1] if place[0] == "scalers" else place[0]):
        trainer.load(path)
    assert driver.same(everything(trainer), before)


OPTIMIZERS = {
    "AdamW": None,
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=0.1),
    "RAdam": lambda groups: torch.optim.RAdam(groups, lr=0.1),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.1),
}


@pytest.mark.parametrize("classes", [True, False], ids=["with class", "as 0.1"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_checkpoints_of_another_optimizer(kind, classes, tmp_path):
    path = tmp_path / "checkpoint.pt"
    trained(OPTIMIZERS[kind]).save(path)
    if not classes:
        state = checkpoint.load(path)
        for optimizer in state["optimizers"]:
            del optimizer["class"]
        checkpoint.save(path, state)
    for other, make in OPTIMIZERS.items():
        trainer = trained(make)
        before = everything(trainer)
        if other == kind:
            trainer.load(path)
        elif classes or not {kind, other} <= {"AdamW", "Adam", "RAdam"}:  # these have the same states
            with pytest.raises(CheckpointError, match=r"optimizers\[0\] does not fit: "):
                trainer.load(path)
            assert driver.same(everything(trainer), before)
        trainer.step(*batches(1)[0])


def test_an_optimizer_that_copies_incompletely_still_loads(tmp_path):
    """A class of the user's, whose copies lack what its __init__ made, cannot be tried out."""

    class Wrapped(torch.optim.SGD):
        def __init__(self, groups):
            super().__init__(groups, lr=0.1, momentum=0.9)
            self.factor = 0.5

        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad *= self.factor
            return super().step(closure)

    first, second = trained(Wrapped), small(optimizer=Wrapped, window=1)
    first.save(tmp_path / "checkpoint.pt")
    second.load(tmp_path / "checkpoint.pt")
    assert driver.same(everything(first)[:2], everything(second)[:2])


def test_newer_versions_are_refused(contents, tmp_path):
    path = tmp_path / "newer.pt"
    for version in (2, "1", None, 0, 1.0, True):
        torch.save(contents | {"version": version}, path)
        with pytest.raises(CheckpointError, match=f"newer.pt: expected version 1 to 1 .*, got {version!r}"):
            small().load(path)


def test_flipped_bits_are_noticed_or_harmless(contents, tmp_path):
    """Harmless are those in padding and in dates."""
    path = tmp_path / "flipped.pt"
    checkpoint.save(path, contents)
    whole, draw, noticed = path.read_bytes(), random.Random(3), 0
    for _ in range(150):
        data = bytearray(whole)
        position = draw.randrange(len(data))
        data[position] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            assert driver.same(checkpoint.load(path), contents), f"byte {position}"
        except CheckpointError:
            noticed += 1
    assert noticed > 50


# --- writing


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_said(tmp_path, monkeypatch):
    full = lambda path, mode: Path("/dev/full").open(mode)  # noqa: E731, SIM115
    monkeypatch.setattr(checkpoint, "open", full, raising=False)
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'") as caught:
        small().save(path)
    assert caught.value.errno == errno.ENOSPC


def test_what_killed_processes_left_is_removed(tmp_path):
    """Of processes of this machine that do not run any more, and of this path alone."""
    path = tmp_path / "checkpoint.pt"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    node = checkpoint.platform.node()
    left = f".checkpoint.pt.{node}.{ended.pid}.tmp"
    kept = [
        f".checkpoint.pt.{node}.{os.getppid()}.tmp", f".checkpoint.pt.elsewhere.{ended.pid}.tmp", f".other.pt.{node}.{ended.pid}.tmp",
        ".checkpoint.pt.tmp", "other.tmp",
    ]  # fmt: skip
    for name in (left, *kept):
        (tmp_path / name).write_bytes(b"half")
    small().save(path)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "checkpoint.pt"])


def test_a_system_that_opens_no_folders(tmp_path, monkeypatch):
    """As Windows, where a signal 0 would moreover end a process."""

    def opens(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", opens)
    trainer = trained()
    trainer.save(tmp_path / "checkpoint.pt")
    small(optimizer=optim.adamw(), window=1).load(tmp_path / "checkpoint.pt")
    monkeypatch.setattr(checkpoint.os, "name", "nt")
    monkeypatch.setattr(checkpoint.os, "kill", None)
    assert not checkpoint._runs(os.getpid())


def test_a_system_without_resource(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert report._memory(torch.device("cpu")) == ""


# --- data that draw


class Draws(Dataset):
    """Samples with noise from a generator, or from a global one."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 12

    def __getitem__(self, index):
        noise = {"numpy": np.random.rand, "random": random.random, "torch": lambda: torch.rand(()).item()}
        return torch.full((3, 8, 8), float(noise.get(self.source, lambda: 0.0)())) + index / 12, index % 3


def loader_of(source):
    generator = torch.Generator().manual_seed(5) if source == "generator" else None
    return DataLoader(Draws(source), batch_size=4, shuffle=True, generator=generator)


def seeded():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)


class Stops:
    """A loader that interrupts training after so many minibatches."""

    def __init__(self, loader, after):
        self.__dict__.update(vars(loader))
        self.loader, self.after, self.dataset = loader, after, loader.dataset

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            yield batch
            self.after -= 1
            if self.after == 0:
                os.kill(os.getpid(), 15)


@pytest.mark.parametrize("stop", [1, 2, 4])
@pytest.mark.parametrize("source", ["generator", "numpy", "random", "torch"])
@pytest.mark.parametrize("make", [Trainer, Backprop])
def test_resumed_draws_are_the_same(make, source, stop, tmp_path):
    """Whatever the loader draws from, in the middle of an epoch and between two, with dropout between the draws; stopped by SIGTERM."""

    def trainer():
        torch.manual_seed(0)
        layers = [
            torch.nn.Conv2d(3, 4, 3),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.5),
            torch.nn.Conv2d(4, 4, 3),
            torch.nn.ReLU(),
        ]
        net = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3))
        return make(driver.SFF(net, 3, input_shape=(3, 8, 8), readout=True))

    whole, stopped, resumed = trainer(), trainer(), trainer()
    seeded()
    whole.fit(loader_of(source), 3, progress=False)
    seeded()
    with pytest.raises(Interrupted, match=f"stopped after step {stop + 1};"):
        stopped.fit(Stops(loader_of(source), stop), 3, out=tmp_path, progress=False)
    torch.manual_seed(77)
    np.random.seed(77)
    random.seed(77)
    resumed.load(tmp_path / "checkpoint.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed.fit(loader_of(source), 3, progress=False)
    assert driver.same(resumed.sff.state_dict(), whole.sff.state_dict())
    assert driver.same(resumed.history, whole.history)


class Drawing(Draws):
    def __init__(self, drawn):
        super().__init__("none")
        self.drawn = drawn


OF_THIS_FILE, BY_A_METHOD = np.random.default_rng(0), random.Random(0)


class DrawsByMethod(Draws):
    def __getitem__(self, index):
        return BY_A_METHOD.random()


class Batches(list):
    """A loader of its own kind."""

    drawn: np.random.Generator


def of_functions():
    """Transforms that draw from a generator: of a closure, of the file, of a partial's arguments."""
    inside = np.random.RandomState(0)
    yield lambda x: x + inside.rand()
    yield lambda x: x + OF_THIS_FILE.random()
    yield functools.partial(torch.add, alpha=random.Random(0))


def drawing_loaders():
    """(how a loader draws from a generator that no checkpoint holds, the loader, what is said of it)"""
    generator = np.random.default_rng(0)
    yield "data set", DataLoader(Drawing(generator), batch_size=4), "Drawing has a Generator"
    yield "list of transforms", DataLoader(Drawing([generator])), "Drawing has a Generator"
    yield "transform of a subset", DataLoader(Subset(Drawing(Drawing(generator)), range(4))), "Drawing has a Generator"
    yield (
        "sampler in a sampler",
        DataLoader(Draws(""), sampler=Drawing(Drawing(random.Random(0)))),
        "Drawing has a Random",
    )
    yield "method", DataLoader(DrawsByMethod("")), "DrawsByMethod has a Random"
    owners = "Drawing has a RandomState", "Drawing has a Generator", "partial has a Random"
    for function, said in zip(of_functions(), owners, strict=True):
        yield f"function: {said}", DataLoader(Drawing(function)), said
    loader = Batches()
    loader.drawn = generator
    yield "loader", loader, "Batches has a Generator"


@pytest.mark.parametrize(("loader", "said"), [pytest.param(*rest, id=name) for name, *rest in drawing_loaders()])
def test_generators_are_found_wherever_a_loader_has_them(loader, said):
    assert generators_of(loader) == ([], f"its {said} of its own, whose state is not saved")


def test_generators_that_checkpoints_hold_are_found_in_their_order():
    own, other = torch.Generator(), torch.Generator()
    loader = DataLoader(Drawing({"a": own}), sampler=WeightedRandomSampler([1.0] * 12, 12, generator=other))
    loader.dataset.globals = random.random.__self__, np.random.mtrand._rand
    found, reason = generators_of(loader)
    assert reason is None and {id(generator) for generator in found} == {id(own), id(other)}
    assert all(a is b for a, b in zip(found, generators_of(loader)[0], strict=True))


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (
            lambda: DataLoader(Draws(""), batch_size=4, num_workers=1, persistent_workers=True),
            "its workers are persistent",
        ),
        (lambda: DataLoader(Drawing(np.random.default_rng(0)), batch_size=4), "its Drawing has a Generator of its own"),
        (lambda: loader_of("generator"), "it has 1 generators of its own, the checkpoint has the states of 0"),
    ],
)
def test_what_cannot_be_resumed_is_said(loader, reason, tmp_path):
    first = small()
    first.fit(batches(3), 1, out=tmp_path, progress=False)
    second = small()
    second.load(tmp_path / "checkpoint.pt")
    with pytest.warns(UserWarning, match=f"loader: going on from a checkpoint is not bit for bit with it: {reason}"):
        second.fit(loader(), 2, progress=False)


def test_a_learning_rate_may_be_a_tensor_here_and_a_number_there(tmp_path):
    """As with and without recorded CUDA graphs."""
    for first, second in ((0.1, torch.tensor(0.1)), (torch.tensor(0.1), 0.1)):
        saved, loaded = (
            small(optimizer=lambda groups, lr=lr: torch.optim.Adam(groups, lr=lr, foreach=False), window=1)
            for lr in (first, second)
        )
        saved.step(*batches(1)[0])
        saved.save(tmp_path / "checkpoint.pt")
        loaded.load(tmp_path / "checkpoint.pt")
        assert float(loaded.optimizers[0].param_groups[0]["lr"]) == pytest.approx(0.1)
