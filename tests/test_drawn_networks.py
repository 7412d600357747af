"""Drawn networks: steps of the Trainer are those of fastff/reference.py::train_step, whatever blocks are made of.

FASTFF_NETWORKS is the number of networks (make fuzz: 10,000), FASTFF_FIRST the seed of the first."""

import copy
import os
import random

import pytest
import torch
import torch.nn.functional as F
from test_plain import NormAct
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_oracle import CLASSES, Plain, assert_same_training, batches, naive_training, sgd, train, vector

from fastff import SFF, Trainer
from fastff.graph.recording import WARM_UP

NETWORKS, FIRST = int(os.environ.get("FASTFF_NETWORKS", 200)), int(os.environ.get("FASTFF_FIRST", 0))
PARTS = 10
ACTIVATIONS = {
    "relu": nn.ReLU, "relu_": lambda: nn.ReLU(inplace=True), "relu6": nn.ReLU6, "silu": nn.SiLU, "hardswish": nn.Hardswish, "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"), "prelu": nn.PReLU, "identity": nn.Identity, "leaky": nn.LeakyReLU,
}  # fmt: skip


def convolution(draw, inputs, outputs, stride=1):
    mode, kernel = draw.choice(["zeros", "zeros", "zeros", "reflect", "circular"]), draw.choice([1, 3, 3])
    dilation = draw.choice([1, 1, 2]) if kernel == 3 and mode == "zeros" else 1
    groups = draw.choice([1, 1, 2, outputs]) if inputs == outputs else 1
    padding = draw.choice([dilation * (kernel // 2)] * 3 + ["same"]) if stride == 1 else kernel // 2 * dilation
    bias = draw.random() < 0.5
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias, mode)


def norm(draw, channels):
    kind = draw.choice(["batch"] * 3 + ["group", "none", "subclass", "instance"])
    if kind == "group":
        return nn.GroupNorm(2, channels)
    if kind == "none":
        return nn.Identity()
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True, track_running_stats=draw.random() < 0.5)
    options = {
        "affine": draw.random() < 0.8,
        "track_running_stats": draw.random() < 0.8,
        "eps": draw.choice([1e-5, 1e-2]),
    }
    options["momentum"] = draw.choice([0.1, 0.1, 0.5, None])
    return (
        NormAct(channels, draw.choice([nn.ReLU, nn.SiLU]), **options)
        if kind == "subclass"
        else nn.BatchNorm2d(channels, **options)
    )


PLAIN = ["plain"] * 3 + ["residual"] * 3 + ["residual_", "shared", "halves", "gate", "functions"]
KINDS = [*PLAIN, "statistics", "drawn", "no_grad", "counts"]  # the others' Python does more than compute with tensors


class Part(nn.Module):
    """Convolution, norm and activation, and one of many other things."""

    def __init__(self, draw, channels, kinds):
        super().__init__()
        self.conv, self.norm = convolution(draw, channels, channels), norm(draw, channels)
        self.act = ACTIVATIONS[draw.choice(list(ACTIVATIONS))]()
        self.drop, self.gate = nn.Dropout(0.0), nn.Conv2d(channels, channels, 1)
        self.kind = draw.choice(kinds)
        self.residual_first = draw.random() < 0.5
        self.calls = 0
        self.register_buffer("mean", torch.zeros(channels, 1, 1))

    def forward(self, x):
        y = self.norm(self.conv(x))
        if self.kind == "residual":
            y = x + y if self.residual_first else y + x
        elif self.kind == "residual_":
            y = y + 0
            y += x
        elif self.kind == "shared":
            y = self.norm(self.conv(y))
        elif self.kind == "statistics" and self.training:
            self.mean.mul_(0.9).add_(y.detach().mean((0, 2, 3))[:, None, None], alpha=0.1)
            y = y - self.mean
        elif (
            self.kind == "drawn"
            and self.training
            and (torch.rand(1).item() if self.residual_first else random.random()) < 0.5
        ):
            return x * 1.5
        elif self.kind == "halves":
            first, second = y.chunk(2, 1)
            y = torch.cat([second, first * torch.sigmoid(second)], 1)
        elif self.kind == "gate":
            y = y * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(y, 1)))
        elif self.kind == "no_grad":
            with torch.no_grad():
                scale = torch.sigmoid(self.gate(x))
            y = y * scale
        elif self.kind == "functions":
            y = F.relu(F.conv2d(y, self.gate.weight, self.gate.bias) + self.mean)
        elif self.kind == "counts":
            self.calls += 1
            y = y * (1 + self.calls % 2)
        return self.drop(self.act(y))


class Parts(nn.Module):
    def __init__(self, draw, inputs, channels, kinds):
        super().__init__()
        self.first = convolution(draw, inputs, channels, stride=draw.choice([1, 2]))
        self.parts = nn.Sequential(*(Part(draw, channels, kinds) for _ in range(draw.choice([1, 1, 2]))))
        self.last = draw.random() < 0.5

    def forward(self, x):
        x = self.parts(self.first(x))
        return F.relu(x) if self.last else x


def network(seed, kinds=KINDS):
    """(model, options of SFF, whether the images are channels_last)."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    channels = draw.choice([4, 6, 8])
    model = Plain(2, channels)
    model.features = nn.Sequential(
        *(Parts(draw, 3 if i == 0 else channels, channels, kinds) for i in range(draw.choice([2, 3])))
    )
    paths = [f"features.{i}" for i in range(len(model.features))]
    options = {
        "granularity": paths,
        "window": draw.choice([1, 2, 3]),
        "grid": draw.choice([0, 4]),
        "input_shape": (3, 12, 11),
    }
    return model.double(), options, draw.random() < 0.5


def seeded(function, *args):
    torch.manual_seed(1)
    random.seed(1)
    return function(*args)


class Kinks(TorchDispatchMode):
    """Whether a value lies so near to where an activation's derivative jumps that the rounding of float32 may carry it across."""

    places = {
        "relu": (0,), "leaky_relu": (0,), "_prelu_kernel": (0,), "hardtanh": (0, 6), "hardswish": (-3, 3), "clamp_min": (0,),
    }  # fmt: skip
    near = False

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        for place in self.places.get(op._schema.name.removeprefix("aten::").rstrip("_"), ()):
            off = (args[0] - place).abs()  # zeros of an activation before this one are zeros in every dtype
            self.near |= bool((off[off > 0] < 1e-6 * args[0].abs().max()).any())
        return op(*args, **(kwargs or {}))


# PyTorch's batch norm loses some digits in channels_last where means are large: 200 times as many in one of these networks.
LAYOUTS = (torch.contiguous_format, torch.channels_last)


def check(seed):
    """In float64; every second network in float32, too, about as far from float64 as naive training in float32 is,
    unless a value is so near to a kink that rounding chooses its derivative (one network in twenty)."""
    model, options, channels_last = network(seed)
    sff = SFF(model, CLASSES, **options)
    copies = [copy.deepcopy(sff) for _ in range(3)]
    data, window = batches(sff, 2, 4), options["window"]
    if channels_last:
        data = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in data]
        for module in (sff, *copies):
            module.to(memory_format=torch.channels_last)
    naive, single, naive_single = copies
    try:
        expected = seeded(naive_training, naive, data, sgd, window)
    except RuntimeError as error:  # an activation in place that PyTorch refuses, too
        assert "modified by an inplace operation" in str(error)
        return
    losses = seeded(train, Trainer(sff, sgd), data)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-7, atol=1e-7)
    assert_same_training(sff, naive, 1e-7)
    if seed % 2:
        return
    narrow = [(x.float(), y) for x, y in data[:1]]
    exact = copy.deepcopy(SFF(network(seed)[0], CLASSES, **options))
    exact.load_state_dict(single.state_dict())
    with Kinks() as kinks:
        seeded(naive_training, exact, data[:1], sgd, window)
    seeded(train, Trainer(single.float(), sgd), narrow)
    naively = [copy.deepcopy(naive_single).float() for _ in LAYOUTS]
    for other, layout in zip(naively, LAYOUTS, strict=True):
        laid_out = lambda m, args, layout=layout: (args[0].contiguous(memory_format=layout),)  # noqa: E731
        for norm in (m for m in other.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.register_forward_pre_hook(laid_out)
        seeded(naive_training, other, narrow, sgd, window)
    error, *allowed = ((vector(s) - vector(exact)).norm() for s in (single, *naively))
    allowed = max(allowed)
    assert kinks.near or error <= 8 * allowed + 1e-6 * vector(exact).norm(), (
        f"{error:.3g} from the float64 weights, naive training is {allowed:.3g}"
    )


def check_recorded(seed):
    """In float32: training with recorded steps, where the network allows it, has the bits of training without."""
    model, options, channels_last = network(seed, PLAIN if seed % 4 else KINDS)
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.2
    sff = SFF(model.float(), CLASSES, **options)
    data = batches(sff, WARM_UP + 3, 4, torch.float32)
    if channels_last:
        data = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in data]
        sff.to(memory_format=torch.channels_last)
    found = []
    for record in ("auto", False):
        trainer = Trainer(copy.deepcopy(sff), sgd, record_steps=record)
        try:
            found.append((torch.tensor(seeded(train, trainer, data)), vector(trainer.sff)))
        except RuntimeError as error:
            found.append(str(error))
    if isinstance(found[1], str):
        assert found[0] == found[1]
    else:  # the same bits, NaN of a network that diverged included
        torch.testing.assert_close(*found, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("part", range(PARTS))
def test_recorded_steps_of_drawn_networks_have_the_bits_of_ordinary_ones(part):
    for seed in range(FIRST + part, FIRST + NETWORKS // 2, PARTS):
        try:
            check_recorded(seed)
        except Exception as error:
            raise AssertionError(f"network {seed}: {error}") from error


@pytest.mark.parametrize("part", range(PARTS))
def test_drawn_networks_train_as_the_reference_step_does(part):
    for seed in range(FIRST + part, FIRST + NETWORKS, PARTS):
        try:
            check(seed)
        except Exception as error:
            raise AssertionError(f"network {seed}: {error}") from error
