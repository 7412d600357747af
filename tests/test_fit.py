"""fit and evaluate: what they take from a loader, what they say of blocks that are not trained, the modes they leave."""

import copy
import csv
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_oracle import CLASSES, Plain, adamw, assert_same_training, batches, grouped, made, sgd, train, vector

from fastff import SFF, Backprop, Trainer
from fastff import plan as plans
from fastff.reference import train_step
from fastff.training import Diverged
from fastff.training.batch import IMAGES, LABELS, unpack


def small(**options):
    return made(dtype=torch.float32, **options)


def data_of(sff, steps=2, size=6):
    return batches(sff, steps, size, dtype=torch.float32)


# --- epochs


def test_fit_learns_and_evaluates():
    """A problem a linear layer can solve: every block must, and the learning rate must end at zero."""
    torch.manual_seed(0)
    target = torch.randint(CLASSES, (64,))
    images = (
        torch.randn(64, 3, 8, 8) * 0.3
        + F.one_hot(target, CLASSES)[:, :3, None, None] * 2
        - F.one_hot(target, CLASSES)[:, None, None, 2:].sum(3, keepdim=True)
    )
    images[target == 4, :, 4:] += 3
    loader = list(zip(images.split(16), target.split(16), strict=True))
    sff = made(dtype=torch.float32)
    sff.eval()
    trainer = Trainer(sff, adamw)
    history = trainer.fit(loader, epochs=8, validation=loader, progress=False)
    assert [row["epoch"] for row in history] == list(range(1, 9))
    assert trainer.steps == 32
    assert history[-1]["test vote"] >= 0.95
    for name in trainer.names:
        assert history[-1][f"train loss {name}"] < 0.5 * history[0][f"train loss {name}"]
    assert all(group["lr"] == pytest.approx(0, abs=1e-9) for o in trainer.optimizers for group in o.param_groups)
    assert sff.training, "evaluation leaves the mode as it was"
    again = trainer.evaluate(iter(loader))
    assert again["vote"] == history[-1]["test vote"]
    sff.eval()
    with torch.no_grad():
        right = sum(int((sff(x).argmax(1) == y).sum()) for x, y in loader)
    assert again["vote"] == pytest.approx(right / 64)


class Reports:
    """In place of the display and the writer of metrics."""

    def __init__(self):
        self.calls = []

    def start(self, trainer, epochs, batches):
        self.calls.append(("start", trainer.names, epochs, batches))

    def update(self, state, images_per_second):
        assert images_per_second > 0
        self.calls.append(("update", state.steps))

    def epoch(self, history):
        self.calls.append(("epoch", history[-1]["epoch"]))

    def close(self):
        self.calls.append(("close",))


def test_fit_reports_to_what_it_is_given(tmp_path):
    """Also after an error; a checkpoint is saved all the same, and nothing else written."""
    sff = made()
    trainer, data, reports = Trainer(sff, sgd), batches(sff, 3), Reports()
    trainer.fit(data, 2, out=tmp_path, progress=reports)
    first, second = ([("update", step) for step in steps] for steps in ((1, 2, 3), (4, 5, 6)))
    start = ("start", trainer.names, 2, 3)
    assert reports.calls == [start, *first, ("epoch", 1), *second, ("epoch", 2), ("close",)]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    data[0][0].fill_(float("nan"))
    again = Reports()
    with pytest.raises(Diverged):
        trainer.fit(data, 3, progress=again)
    assert again.calls == [("start", trainer.names, 3, 3), ("close",)]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_readout_is_evaluated_in_16_bits(amp):
    sff = made(dtype=torch.float32, readout=True)
    data = batches(sff, 2, dtype=torch.float32)
    trainer = Trainer(sff, sgd, amp=amp)
    train(trainer, data)
    assert 0 <= trainer.evaluate(data)["readout"] <= 1


# --- minibatches


FORMS = {
    "triples": lambda x, y: (x, y, torch.arange(len(y))),
    "lists": lambda x, y: [x, y],
    "dicts": lambda x, y: {"label": y, "image": x, "index": torch.arange(len(y))},
    "dicts of a processor": lambda x, y: {"pixel_values": x, "labels": y},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_minibatches(form):
    plain, sff = small(), small()
    data = data_of(sff)
    expected = Trainer(plain, sgd).fit(data, 1, validation=data, progress=False)
    loader = [FORMS[form](*batch) for batch in data]
    history = Trainer(sff, sgd).fit(loader, 1, validation=loader, progress=False)
    assert torch.equal(vector(sff), vector(plain))
    assert history[0] | {"seconds": 0} == expected[0] | {"seconds": 0}


@pytest.mark.parametrize("key", IMAGES)
@pytest.mark.parametrize("label", LABELS)
def test_keys_of_dicts(key, label):
    assert unpack({label: 2, "other": 3, key: 1}) == (1, 2)


def generator(data):
    yield from data


class Unsized(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([(torch.randn(3, 8, 8), 1)] * 4)


X, Y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
PAIR = r"loader: expected minibatches \(images, target, \.\.\.\), or dicts with images \(image, .*\) and labels \(label, .*\), got "
REFUSED = {
    "tensors": ([X], TypeError, PAIR + "Tensor"),
    "images alone": ([(X,)], TypeError, PAIR + "a tuple of 1"),
    "another dict": ([{"image": X, "class": Y}], TypeError, PAIR + "a dict of image, class"),
    "numbers": ([3], TypeError, PAIR + "int"),
    "columns": ([(X, Y[:, None])], ValueError, r"target: expected one label for each of 4 images, got \[4, 1\]"),
    "one-hot": ([(X, torch.eye(4))], TypeError, "target: expected int64 labels, got torch.float32"),
    "labels out of range": ([(X, Y + 2)], ValueError, "target: expected labels in 0..4, got 5"),
    "other images": ([(X[:, :2], Y)], ValueError, "images: expected 3 channels, got 2"),
    "a list of samples": ([[(X[0], 1), (X[1], 2)]], TypeError, "images: expected a floating-point tensor, got tuple"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_minibatches_are_refused(name):
    loader, kind, says = REFUSED[name]
    for use in (lambda t: t.fit(loader, 1, progress=False), lambda t: t.evaluate(loader)):
        with pytest.raises(kind, match=says):
            use(Trainer(small(), sgd))


@pytest.mark.parametrize(
    "loader", [generator([(X, Y)]), torch.utils.data.DataLoader(Unsized())], ids=["generator", "unsized"]
)
def test_a_loader_without_a_length(loader):
    with pytest.raises(
        TypeError, match=r"loader: expected a number of minibatches, len\(loader\), .* got \w+ without one"
    ):
        Trainer(small()).fit(loader, 1, progress=False)


def test_evaluate_needs_no_length():
    trainer, data = Trainer(small()), data_of(small())
    assert trainer.evaluate(generator(data)) == trainer.evaluate(data)


# --- blocks that are not trained


def test_untrained_blocks_show_nothing(tmp_path, capsys):
    sff = small()
    data = data_of(sff)
    trainer = Trainer(sff, sgd, schedule="greedy", window=1, frozen=1)
    history = trainer.fit(data, 1, out=tmp_path, progress=True)
    names = trainer.names
    for row, trained in zip(history, names[1:], strict=True):
        for name in names:
            for kind in ("loss", "accuracy"):
                assert math.isnan(row[f"train {kind} {name}"]) == (name != trained)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    known = [[name for name in names if row[f"train loss {name}"]] for row in rows]
    assert known == [[name] for name in names[1:]]
    lines = capsys.readouterr().err.splitlines()
    shown = [f"loss {row[f'train loss {name}']:.3f}" for row, name in zip(history, names[1:], strict=True)]
    assert all(text in line and "nan" not in line for text, line in zip(shown, lines, strict=True))


def test_frozen_blocks_whose_heads_learn_have_a_loss():
    sff = small()
    row = Trainer(sff, sgd, frozen=2, train_frozen_heads=True).fit(data_of(sff), 1, progress=False)[0]
    assert all(value == value for value in row.values())


# --- modes


class Normed(Plain):
    def __init__(self):
        super().__init__()
        for index, block in enumerate(self.features):
            self.features[index] = nn.Sequential(block[0], nn.BatchNorm2d(6), block[1])


def normed(**options):
    torch.manual_seed(0)
    return SFF(Normed(), CLASSES, input_shape=(3, 8, 8), granularity="block", **options)


@pytest.mark.parametrize("make", [Trainer, Backprop])
def test_fit_keeps_the_modes_that_the_user_set(make):
    sff = normed(readout=True)
    data, norm = data_of(sff), sff.model.features[1][1]
    norm.eval()
    before = {module: module.training for module in sff.modules()}
    make(sff).fit(data, 2, validation=data, progress=False)
    assert {module: module.training for module in sff.modules()} == before
    assert norm.num_batches_tracked == 0 and sff.model.features[2][1].num_batches_tracked == 4
    sff.eval()
    make(sff).fit(data, 1, progress=False)
    assert all(module.training for module in sff.modules()), "a network in evaluation mode is put into training mode"


def test_a_greedy_trainer_that_goes_back_trains_its_first_block_again(tmp_path):
    sff = normed()
    trainer, data = Trainer(sff, sgd, schedule="greedy", window=1), data_of(sff)
    trainer.save(tmp_path / "start.pt")
    trainer.fit(data, 1, progress=False)
    assert [block[1].training for block in sff.model.features] == [False, False, False, True]
    first = vector(sff)
    trainer.load(tmp_path / "start.pt")
    trainer.fit(data, 1, progress=False)
    assert torch.equal(vector(sff), first)


def test_another_trainer_of_the_same_network_trains_what_the_first_let_rest():
    """Fine-tuning: blocks that a former trainer had frozen, or had finished with, are put back into training mode."""
    for options in ({"schedule": "greedy", "window": 1}, {"frozen": 2}):
        sff = normed()
        data = data_of(sff)
        Trainer(sff, sgd, **options).fit(data, 1, progress=False)
        for parameter in sff.parameters():
            parameter.requires_grad_(True)
        norms = [block[1] for block in sff.model.features]
        before = [int(norm.num_batches_tracked) for norm in norms]
        Trainer(sff, sgd).fit(data, 1, progress=False)
        after = [int(norm.num_batches_tracked) for norm in norms]
        assert (
            all(norm.training for norm in norms)
            and [b - a for a, b in zip(before, after, strict=True)] == [len(data)] * 4
        )


# --- goodness without labels


def doubled(sff, steps=3, size=4):
    """Positive images, then negative ones."""
    return [images for images, _ in batches(sff, steps, 2 * size)]


@pytest.mark.parametrize("goodness", ["sum_of_squares", "mean_of_squares", "position"])
@pytest.mark.parametrize(("window", "parts"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_goodness_without_labels(goodness, window, parts):
    sff = made(goodness=goodness)
    naive, data = copy.deepcopy(sff), doubled(sff)
    trainer = Trainer(sff, sgd, window=window, micro_batches=parts)
    losses = train(trainer, [(images,) for images in data])
    optimizers = [sgd(grouped(block.parameters())) for block in naive.model.features]
    for images, row in zip(data, losses, strict=True):
        expected = train_step(
            [lambda x, block=block: (block(x),) for block in naive.model.features], list(naive.heads), optimizers,
            images, None, plans.window(window, len(optimizers)).at(0), loss=lambda g, _: naive.heads[0].loss(g),
        )  # fmt: skip
        torch.testing.assert_close(torch.tensor(row), expected, rtol=1e-7, atol=1e-7, check_dtype=False)
    assert_same_training(sff, naive, 1e-7)
    assert trainer.correct.isnan().all()


@pytest.mark.parametrize("form", [lambda x: x, lambda x: [x], lambda x: (x, torch.zeros(len(x))), lambda x: {"x": x}])
def test_fit_without_labels(form):
    sff = small(goodness="sum_of_squares")
    data = [images.float() for images in doubled(sff)]
    row = Trainer(sff, sgd).fit([form(images) for images in data], 1, progress=False)[0]
    assert math.isfinite(row["train loss features.3.0"]) and math.isnan(row["train accuracy features.3.0"])


def test_what_needs_labels_is_refused():
    sff = small(goodness="sum_of_squares")
    trainer = Trainer(sff, sgd)
    with pytest.raises(TypeError, match="target: expected None for goodness 'sum_of_squares' .* got torch.int64"):
        trainer.step(X, Y)
    with pytest.raises(ValueError, match="images: expected positive ones and as many negative ones after them, got 3"):
        trainer.step(X[:3])
    with pytest.raises(ValueError, match="loader: expected a goodness with classes, .* got 'sum_of_squares'"):
        trainer.evaluate([(X, Y)])
    with pytest.raises(ValueError, match="validation: expected a goodness with classes"):
        trainer.fit([X], 1, validation=[(X, Y)], progress=False)
    with pytest.raises(ValueError, match="readout: expected False with a loss of positive and negative images"):
        Trainer(small(goodness="sum_of_squares", readout=True))
    with pytest.raises(TypeError, match="target: expected int64 labels, got NoneType"):
        Trainer(small()).step(X)


# --- arguments


@pytest.mark.parametrize("number", [np.int64, np.int32, torch.tensor, lambda n: torch.tensor([n])])
def test_whole_numbers_of_numpy_and_torch(number):
    torch.manual_seed(0)
    shape = (number(3), number(8), number(8))
    sff = SFF(Plain(), number(CLASSES), input_shape=shape, window=number(2), grid=number(2), kernel_size=number(3))
    assert (sff.num_classes, sff.window, sff.input_shape, sff.heads[0].grid) == (CLASSES, 2, (3, 8, 8), (2, 2))
    trainer, data = Trainer(sff, sgd, window=number(1), frozen=number(1), micro_batches=number(2)), data_of(sff)
    history = trainer.fit(
        data, number(2), validation=data, evaluate_every=number(2), save_every=number(1), progress=False
    )
    assert [("test vote" in row) for row in history] == [False, True]


@pytest.mark.parametrize("number", [np.float64, np.float32, torch.tensor])
def test_numbers_of_numpy_and_torch(number):
    sff = small(tau=number(0.5), margin=number(0.25), label_smoothing=number(0.125), scale=number(2.0))
    plain = small(tau=0.5, margin=0.25, label_smoothing=0.125, scale=2.0)
    train(Trainer(sff, sgd, clip_grad_norm=number(0.5)), data_of(sff))
    train(Trainer(plain, sgd, clip_grad_norm=0.5), data_of(sff))
    assert torch.equal(vector(sff), vector(plain))


@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True, None, np.float64(2), torch.tensor([1, 2])])
@pytest.mark.parametrize("name", ["epochs", "evaluate_every", "save_every"])
def test_other_numbers_are_refused(name, value):
    if (name, value) == ("save_every", None):
        return
    with pytest.raises(ValueError, match=f"{name}: expected a whole number of at least 1, got"):
        Trainer(small()).fit([(X, Y)], **{"epochs": 1, "progress": False} | {name: value})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [Trainer, Backprop])
def test_a_step_without_gradients_is_refused(make, mode):
    trainer = make(small(readout=True))
    with mode(), pytest.raises(RuntimeError, match="step: expected gradients to be on"):
        trainer.step(X, Y)


def assigned(model):
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def another_bias(model):
    module = next(m for m in model.modules() if getattr(m, "bias", None) is not None)
    module.bias = torch.nn.Parameter(module.bias.detach().clone())


@pytest.mark.parametrize("replace", [assigned, another_bias])
@pytest.mark.parametrize("make", [Trainer, Backprop])
def test_parameters_replaced_behind_the_optimizer_are_refused(make, replace):
    trainer = make(small(readout=True))
    trainer.step(X, Y)
    replace(trainer.sff.model)
    with pytest.raises(
        RuntimeError, match=f"step: expected the parameters that the optimizers were made for.* {make.__name__} after"
    ):
        trainer.step(X, Y)


def test_nothing_left_to_train_is_said():
    trainer, data = Trainer(small(), sgd), data_of(small())
    first = trainer.fit(data, 2, progress=False)
    with pytest.warns(UserWarning, match="epochs: nothing to train, all 2 epochs are done already"):
        assert trainer.fit(data, 2, progress=False) == first
    assert len(trainer.fit(data, 3, progress=False)) == 3


def test_optimizers_that_need_a_closure_are_refused():
    def make(groups):
        return torch.optim.LBFGS([p for group in groups for p in group["params"]])

    for trainer in (Trainer, Backprop):
        with pytest.raises(TypeError, match="optimizer: expected one whose step needs no closure, .* got LBFGS"):
            trainer(small(readout=True), make)


def test_an_optimizer_that_is_made_already_is_refused():
    made = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    for trainer in (Trainer, Backprop):
        with pytest.raises(
            TypeError, match="optimizer: expected a function that makes one for each block, .* got AdamW"
        ):
            trainer(small(readout=True), made)


# --- copies


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("make", [Trainer, Backprop, lambda sff: sff])
def test_copies_go_on_to_the_same_bits(make, copied):
    sff = made("mobilenet_v3_small", dtype=torch.float32, readout=True)
    first, data = make(sff), data_of(sff)
    if first is not sff:
        train(first, data)  # the optimisers have their states
    results = []
    for value in (first, copied(first)):
        torch.manual_seed(1)
        trainer = Trainer(value, sgd) if isinstance(value, SFF) else value
        losses = train(trainer, data)
        trainer.fit(data, 1, progress=False)
        results.append((losses, vector(trainer.sff)))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])
