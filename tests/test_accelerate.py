"""accelerate runs code as it is written and gets the same: what can be given; layouts; reports; programs of public styles."""

import copy
import io
import pickle
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerated import Around, Conv, equal
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fastff
from benchmarks.strangers import CONVOLUTIONAL, STYLES, difference
from fastff.ops import table
from fastff.ops.convolution import PYTORCH, ROWS, WINOGRAD
from fastff.ops.table import kernel_for
from fastff.swap_in import calls, layouts, optimizers


def train(layers, x):
    for layer in layers:
        x = layer.fit(x)
    return x


class Trainer:
    """Not a module, and its layers are in a list."""

    def __init__(self):
        self.layers = [Conv(3, 8), Conv(8, 8)]

    def train_batch(self, x):
        return train(self.layers, x)


@pytest.mark.parametrize("way", ["object", "list", "function", "net", "each"])
def test_what_can_be_given(way, everywhere):
    """Plain objects, lists, functions, modules whose layers are in a list, and layers alone: the same parameters after three steps."""
    torch.manual_seed(0)
    trainer = Trainer()
    for layer in trainer.layers:
        layer.double()
    other, x = copy.deepcopy(trainer), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    run, report = trainer.train_batch, None
    if way == "object":
        report = fastff.accelerate(trainer)
    elif way == "list":
        report = fastff.accelerate(trainer.layers)
    elif way == "function":
        made = fastff.accelerate(train)
        run, report = lambda x: made(trainer.layers, x), made.report
    elif way == "net":
        net = nn.Module()
        net.layers = trainer.layers
        report = fastff.accelerate(net)
    else:
        report = fastff.accelerate(trainer.layers[0])
    for _ in range(3):
        equal([run(x)], [other.train_batch(x)])
    for one, two in zip(trainer.layers, other.layers, strict=True):
        equal(one.parameters(), two.parameters())
        state, wanted = (layer.optimizer.state_dict() for layer in (one, two))
        assert state["param_groups"] == wanted["param_groups"]
        equal(state["state"][0].values(), wanted["state"][0].values())
        assert one.seen.stride() == two.seen.stride()
    assert {e.pattern for e in report.replaced} >= {"convolution", "goodness", "Adam.step"}, str(report)
    report.undo()
    assert type(trainer) is Trainer
    assert all(type(layer) is Conv for layer in trainer.layers)


def test_statements_stay():
    """Nothing is deleted: the statement before a goodness is its own."""

    class Block(nn.Module):
        def forward(self, x):
            y = x + 1
            g = x.view(len(x), 2, -1).pow(2).mean(2)
            return y, g

    block, x = Block(), torch.rand(4, 6)
    fastff.accelerate(block)
    y, g = block(x)
    assert torch.equal(y, x + 1)
    torch.testing.assert_close(g, x.view(4, 2, 3).pow(2).mean(2))


def test_report_says_what_ran():
    """Replaced is what ran, and the reason where something ran as it was written."""

    class Net(nn.Module):
        def __init__(self, channels=64):
            super().__init__()
            self.wide, self.narrow = nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 4, 3)

        def forward(self, x):
            return self.narrow(self.wide(x))

    net = Net()
    report = fastff.accelerate(net)
    assert not report.entries
    assert "nothing has run yet" in str(report)
    net(torch.randn(8, 3, 16, 16))
    (replaced,), (left,) = report.replaced, report.left
    assert (replaced.path, replaced.pattern, replaced.calls) == ("wide", "convolution", 1)
    assert replaced.place.startswith("forward, test_accelerate.py:")
    assert left.path == "narrow"
    assert left.result == "to 4 channels: pays from 16 on"
    report.measure = False  # else calls take turns
    net.double()(torch.randn(8, 3, 16, 16, dtype=torch.float64))
    assert report.entries[-1].result == "of float64"
    with torch.autocast("cpu", torch.bfloat16):
        net.float()(torch.randn(8, 3, 16, 16))
    assert report.entries[-1].result == "under autocast"
    net(torch.randn(1, 3, 8, 8))
    assert "positions of the batch: pays from 512 on" in str(report)


def test_float32_and_winograd(monkeypatch):
    """Values, gradients and their layouts as without, where 3 x 3 filters need fewer multiplications."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 40, 3), nn.ReLU(), nn.Conv2d(40, 24, 3)
    )
    x, ways, way = torch.randn(4, 3, 18, 18), [], layouts.way
    monkeypatch.setattr(layouts, "way", lambda *args: ways.append(way(*args)) or ways[-1])
    before = copy.deepcopy(net)
    fastff.accelerate(net).measure = False
    found = fastff.verify(before, net, x)
    assert found, found
    assert ways[1:] == [WINOGRAD if kernel_for("convolution", ROWS, x) else PYTORCH] * 2
    for one in (before, net):
        one(x).pow(2).sum().backward()
    for p, q in zip(before.parameters(), net.parameters(), strict=True):
        assert p.grad.stride() == q.grad.stride()


def test_a_gradient_can_be_differentiated(everywhere, monkeypatch):
    """The kernels' gradients are not differentiable: PyTorch's are taken where that is asked for."""
    torch.manual_seed(0)
    monkeypatch.setattr("fastff.ops.convolution.way", lambda *args: "kernel")
    x, weight = torch.randn(2, 16, 5, 5, requires_grad=True), torch.randn(16, 16, 3, 3, requires_grad=True)

    def second(convolution):
        (grad,) = torch.autograd.grad(convolution(x, weight).pow(3).sum(), weight, create_graph=True)
        return torch.autograd.grad(grad.pow(2).sum(), (x, weight))

    from fastff.ops.convolution import convolve

    for got, want in zip(
        second(lambda x, w: convolve(x, w, None, 1, 1, 1)), second(lambda x, w: F.conv2d(x, w, padding=1)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * want.abs().max().item())


def test_hooks_checkpoints_and_own_functions(everywhere):
    """Python code that runs in the backward pass sees tensors that can be viewed."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view(len(x), -1).view(x.shape) * 2

        @staticmethod
        def backward(ctx, grad):
            return grad.view(len(grad), -1).mul(2).view(grad.shape)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            y = self.one(x)
            y.register_hook(lambda grad: grad.view(len(grad), -1).add(1).view(grad.shape))
            y = torch.utils.checkpoint.checkpoint(lambda y: Own.apply(self.two(y)), y, use_reentrant=False)
            loss = y.pow(2).mean()
            loss.backward()
            return loss.detach()

    torch.manual_seed(0)
    net = Net().double()
    before = copy.deepcopy(net)
    fastff.accelerate(net)
    assert fastff.verify(before, net, torch.randn(2, 3, 8, 8, dtype=torch.float64), tolerance=1e-11)


def test_other_objects_files_and_copies():
    """Other objects of the class stay; a deep copy stays accelerated; a pickle is of the own class; a state_dict goes both ways."""
    torch.manual_seed(0)
    module, other = Conv(3, 8), Conv(3, 8)
    del module.optimizer
    fastff.accelerate(module)
    assert type(other) is Conv
    assert isinstance(module, Conv)
    x = torch.randn(2, 3, 4, 4)
    twin = copy.deepcopy(module)
    assert type(twin) is type(module)
    assert twin.weight is not module.weight
    loaded = pickle.loads(pickle.dumps(module))
    assert type(loaded) is Conv
    torch.testing.assert_close(loaded(x), module(x))
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))


MISSING = [
    (layouts, "USES", None),
    (table, "UNSEEN", nullcontext),
    (optimizers, "EVERYWHERE", [None]),
    (table, "TRANSFORMED", lambda: False),
]


@pytest.mark.parametrize(("module", "name", "instead"), MISSING)
def test_without_undocumented_functions(module, name, instead, everywhere, monkeypatch):
    """Where PyTorch lacks a function that it does not document, the same is trained."""
    monkeypatch.setattr(module, name, instead)
    torch.manual_seed(0)
    trainer = Trainer()
    for layer in trainer.layers:
        layer.double()
    other, x = copy.deepcopy(trainer), torch.randn(4, 3, 6, 6, dtype=torch.float64)
    fastff.accelerate(trainer).measure = False
    for _ in range(3):
        equal([trainer.train_batch(x)], [other.train_batch(x)])


def test_under_torch_compile_and_transforms(everywhere):
    torch.manual_seed(0)
    module = Around(lambda y: y.pow(2).mean((1, 2, 3)))
    before = copy.deepcopy(module)
    fastff.accelerate(module)
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager")(x)[0], before(x)[0])
    parameters = dict(before.named_parameters())

    def loss(p, m):
        return torch.func.functional_call(m, p, (x,))[0].sum()

    got, want = (torch.func.grad(loss)(parameters, m) for m in (module, before))
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name])


class Keeps(Around):
    def forward(self, x):
        self.kept = self.first(x)
        raise KeyError


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_what_is_left_behind(mode, everywhere):
    """Layouts, and what shares memory, are as without accelerate: of results in each mode, and of what an exception leaves."""
    torch.manual_seed(0)
    module = Around(lambda y: (y.view(len(y), -1), y.detach()))
    before, x = copy.deepcopy(module), torch.randn(2, 3, 6, 6)
    fastff.accelerate(module).measure = False
    with mode():
        results = [torch.utils._pytree.tree_leaves(m(x)) for m in (module, before)]
        for got, want in zip(*results, strict=True):
            assert got.stride() == want.stride()
            assert got.is_inference() == want.is_inference()
        with torch.no_grad():
            for flat, *_, y in results:
                flat.zero_()
                assert not y.any()
    keeps = Keeps(None)
    fastff.accelerate(keeps)
    with pytest.raises(KeyError):
        keeps(x)
    keeps.kept.view(2, -1).sum().backward()
    assert calls.current() is None


def test_bad_input():
    with pytest.raises(TypeError, match=r"module: expected an nn\.Module, a list of them, .* got str"):
        fastff.accelerate("resnet18")
    with pytest.raises(TypeError, match="got list"):
        fastff.accelerate([])
    module = Around(lambda y: y)
    fastff.accelerate(module)
    with pytest.raises(ValueError, match="module: expected one that is not accelerated yet"):
        fastff.accelerate(module)


@pytest.mark.parametrize("style", STYLES)
def test_styles_in_float64(style):
    """The programs of examples/styles have the same parameters after two steps, with every replacement made that can be."""
    exact, report = difference(style, batch=4)
    assert exact < 1e-7  # Adam divides gradients that are zero but for rounding, 1e-17, by its eps of 1e-8
    replaced = {e.pattern for e in report.replaced}
    assert ("convolution" in replaced) == (style in CONVOLUTIONAL), str(report)


def test_slower_ways_are_left(monkeypatch, everywhere):
    """The first calls take turns, and if those done otherwise take longer, the next ones run as they are written."""
    clock = iter(range(10**6))
    times = {True: 3, False: 1}
    module = Around(lambda y: y)
    report, seen = fastff.accelerate(module), []
    module.expression = lambda y: seen.append(calls.current().calls) or y
    now = [0]

    def counter():
        if next(clock) % 2:
            now[0] += times[seen[-1]]
        return now[0]

    monkeypatch.setattr(sys.modules["fastff.swap_in.accelerate"].time, "perf_counter", counter)
    for _ in range(26):
        module(torch.randn(2, 3, 6, 6))
    assert seen == [True, False] * 11 + [False] * 4
    assert report.left[-1].result.startswith("as written from now on: 1000.00 ms, otherwise 3000.00 ms")
    report.measure = False
    module(torch.randn(2, 3, 6, 6))
    assert seen[-1]
