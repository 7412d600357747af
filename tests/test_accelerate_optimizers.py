"""Optimizers in accelerated code: the same parameters, states and settings, by a quicker step."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from accelerated import Conv, equal
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fastff
from fastff.swap_in import calls


def test_fused_updates_only_of_what_lies_alike(everywhere):
    """The fused kernel goes through memory in its order: a state or gradient in another layout is left to PyTorch's loop."""
    torch.manual_seed(0)
    layers = [Conv(3, 8), Conv(3, 8)]
    layers[1].load_state_dict(layers[0].state_dict())
    fastff.accelerate(layers[1])
    for layer in layers:
        layer.weight.grad = torch.ones(8, 3, 3, 3).cumsum(0).contiguous(memory_format=torch.channels_last)
        layer.step = lambda optimizer=layer.optimizer: optimizer.step()
    with calls.Faster(lambda *_: None):
        layers[1].optimizer.step()
    layers[0].optimizer.step()
    torch.testing.assert_close(layers[0].weight, layers[1].weight)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_filters_of_one_position_lie_alike_in_any_layout(kind):
    """The gradient of 1 x 1 filters may have other strides where it has one element: the fused step is taken, with the same values."""
    torch.manual_seed(0)
    options = {"lr": 0.1, "momentum": 0.9} if kind is torch.optim.SGD else {"lr": 0.1}
    values, grads = torch.randn(8, 4, 1, 1, dtype=torch.float64), torch.randn(3, 8, 4, 1, 1, dtype=torch.float64)
    entries, stepped = [], []
    for fused in (False, True):
        weight = nn.Parameter(values.clone())
        optimizer = kind([weight], **options)
        with calls.Faster(lambda *entry: entries.append(entry)) if fused else nullcontext():
            for grad in grads:
                weight.grad = grad.as_strided((8, 4, 1, 1), (4, 1, 4, 4))
                optimizer.step()
        stepped.append(weight)
    assert [entry[:2] for entry in entries] == [(f"{kind.__name__}.step", "replaced")] * len(grads)
    torch.testing.assert_close(*stepped)


class Two(nn.Module):
    """Two convolutions, one of which learns from the second step on only."""

    def __init__(self, kind, options):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.optimizer = kind(self.parameters(), **options)

    def train_batch(self, x):
        self.optimizer.zero_grad()
        y = self.one(x)
        (self.two(y) if self.optimizer.state else y).pow(2).mean().backward()
        self.optimizer.step()


OPTIMIZERS = [
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True}),
    (torch.optim.RMSprop, {"lr": 0.01}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_optimizers(kind, options, everywhere):
    """The same parameters and settings after four steps in float64, also where some parameters have no gradient at first."""
    torch.manual_seed(0)
    one = Two(kind, options).double()
    other, x = copy.deepcopy(one), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    report = fastff.accelerate(one)
    for _ in range(4):
        one.train_batch(x)
        other.train_batch(x)
    equal(one.parameters(), other.parameters())
    assert one.optimizer.state_dict()["param_groups"] == other.optimizer.state_dict()["param_groups"]
    assert any(e.pattern.endswith(".step") for e in report.replaced) == (kind is not torch.optim.RMSprop)


def test_a_step_that_fails(everywhere):
    """An optimizer's step that raises an error leaves its settings as they were, and the calls after it are looked at again."""

    class Net(Two):
        def train_batch(self, x):
            self.one(x).sum().backward()
            self.optimizer.state[self.one.weight] = {"step": "wrong"}
            with pytest.raises(Exception, match=r"."):
                self.optimizer.step()
            return self.again(x)

        def again(self, x):
            y = self.one(x)
            return y.view(len(y), -1)

    net = Net(torch.optim.Adam, {"lr": 0.01})
    report = fastff.accelerate(net)
    assert net.train_batch(torch.randn(2, 3, 8, 8)).shape == (2, 288)
    assert net.optimizer.param_groups[0]["fused"] is None
    assert sum(e.calls for e in report.replaced if e.pattern == "convolution") == 2
    with calls.Faster(lambda *_: None) as mode:
        assert mode.step.unseen is None


def doubled(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        group["lr"] *= 2


@pytest.mark.parametrize(
    "extra", ["nothing", "hook", "hook of all", "scheduler", "closure", "state_dict", "copy", "pickle"]
)
def test_what_else_an_optimizer_has(extra):
    """Hooks, schedulers, closures, states that are loaded, copies and pickles work as with PyTorch's own step, and undo() gives that back."""
    torch.manual_seed(0)
    one = Two(torch.optim.Adam, {"lr": 0.01}).double()
    other, x = copy.deepcopy(one), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    report = fastff.accelerate(one)
    for net in (one, other):
        net.train_batch(x)
        if extra == "hook":
            net.optimizer.register_step_pre_hook(doubled)
        elif extra == "scheduler":
            net.scheduler = torch.optim.lr_scheduler.ExponentialLR(net.optimizer, 0.5)
        elif extra == "state_dict":
            net.optimizer.load_state_dict(copy.deepcopy(net.optimizer.state_dict()))
        elif extra == "closure":
            net.optimizer.step(lambda: 1.0)
    everywhere = [register_optimizer_step_pre_hook(doubled)] if extra == "hook of all" else []
    if extra == "copy":
        one = copy.deepcopy(one)
    elif extra == "pickle":
        loaded = pickle.loads(pickle.dumps(one.optimizer))
        assert type(loaded) is torch.optim.Adam
        assert loaded.state_dict().keys() == one.optimizer.state_dict().keys()
    for net in (one, other):
        net.train_batch(x)
        if extra == "scheduler":
            net.scheduler.step()
        net.train_batch(x)
    for hook in everywhere:
        hook.remove()
    equal(one.parameters(), other.parameters())
    groups, wanted = (net.optimizer.state_dict()["param_groups"] for net in (one, other))
    assert groups == wanted
    assert isinstance(one.optimizer, torch.optim.Adam)
    report.undo()
    assert extra == "copy" or type(one.optimizer) is torch.optim.Adam


def test_the_quick_step_is_taken(monkeypatch):
    """An optimizer that accelerate finds does not make PyTorch's whole step: neither its profiler's record nor that of zero_grad."""
    net, names, record = Two(torch.optim.Adam, {"lr": 0.01}), [], torch.autograd.profiler.record_function
    fastff.accelerate(net)
    monkeypatch.setattr(
        torch.autograd.profiler, "record_function", lambda name, *a: names.append(name) or record(name, *a)
    )
    net.train_batch(torch.randn(2, 3, 8, 8))
    assert not names
    net.optimizer.step()  # outside accelerated code it is PyTorch's
    assert names == ["Optimizer.step#Adam.step"]


def test_a_pytorch_that_does_not_know_the_quick_step(monkeypatch):
    """Where PyTorch no longer looks for what marks a step as complete, it puts its hooks around the quick one: they run once, as without it."""
    torch.manual_seed(0)
    one, x = Two(torch.optim.Adam, {"lr": 0.01}).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    other = copy.deepcopy(one)
    fastff.accelerate(one)
    quick, calls = type(one.optimizer).step, []
    del quick.hooked
    for net in (one, other):
        net.optimizer.load_state_dict(copy.deepcopy(net.optimizer.state_dict()))
        net.optimizer.register_step_pre_hook(doubled)
    one.optimizer.register_step_post_hook(lambda *_: calls.append(0))
    assert type(one.optimizer).step is not quick
    for net in (one, other):
        for _ in range(3):
            net.train_batch(x)
    one.optimizer.step(lambda: 1.0)
    other.optimizer.step(lambda: 1.0)
    equal(one.parameters(), other.parameters())
    assert len(calls) == 4


def test_an_optimizer_of_two_objects():
    """Objects that share an optimizer can be accelerated one after the other."""
    one, other = Two(torch.optim.Adam, {"lr": 0.01}), nn.Module()
    other.optimizer, other.layer = one.optimizer, nn.Linear(2, 2)
    reports = fastff.accelerate(one), fastff.accelerate(other)
    one.train_batch(torch.randn(2, 3, 8, 8))
    for report in reports:
        report.undo()
    assert type(one.optimizer) is torch.optim.Adam
