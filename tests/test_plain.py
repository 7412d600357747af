"""Blocks whose Python does more than compute with tensors: they train as plain PyTorch trains them, and SFF leaves the model as it was."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training_oracle import CLASSES, Plain, assert_same_training, batches, naive_training, sgd, train
from vision import import_torchvision

from fastff import SFF, Trainer
from fastff.graph.cut import cut
from fastff.graph.trace import CutError
from fastff.graph.training import TrainingGraph

SEEN = []


class Base(nn.Module):
    """Convolution, batch norm and ReLU, with something added to it in subclasses."""

    def __init__(self, inputs, outputs=4):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.BatchNorm2d(outputs)
        self.register_buffer("mean", torch.zeros(outputs))
        self.register_buffer("count", torch.zeros(()))
        self.gate = nn.Conv2d(outputs, outputs, 1)

    def forward(self, x):
        return F.relu(self.more(self.norm(self.conv(x))))


class StatisticsByHand(Base):
    def more(self, x):
        if self.training:
            mean = x.mean((0, 2, 3))
            self.mean.mul_(0.9).add_(0.1 * mean.detach())
            self.count += 1
        return x + self.mean[:, None, None]


class StatisticsUsed(Base):
    """The result of the update is used, so that it cannot be left out as dead code."""

    def more(self, x):
        return x - self.mean.mul_(0.5).add_(x.detach().mean((0, 2, 3)))[:, None, None]


class StatisticsThroughData(Base):
    def more(self, x):
        self.mean.data[:2].add_(1)
        return x + self.mean[:, None, None]


class StatisticsReplaced(Base):
    def more(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean((0, 2, 3))
        return x + self.mean[:, None, None]


class GateWithoutGradient(Base):
    def more(self, x):
        with torch.no_grad():
            gate = torch.sigmoid(self.gate(x))
        return x * gate


class DrawnByTorch(Base):
    def more(self, x):
        return x * 2 if self.training and torch.rand(1).item() < 0.5 else x


class DrawnByPython(Base):
    def more(self, x):
        return x * 2 if self.training and random.random() < 0.5 else x


class DrawnByNumPy(Base):
    def more(self, x):
        return x * 2 if self.training and np.random.rand() < 0.5 else x


class DrawnByItsOwnGenerator(Base):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.draw = random.Random(3)
        self.numpy = np.random.default_rng(3)

    def more(self, x):
        return x * (1 + self.numpy.random()) if self.training and self.draw.random() < 0.5 else x


class NoiseOfItsOwn(Base):
    def more(self, x):
        return x + torch.randn(x.shape[1], 1, 1, dtype=x.dtype) if self.training else x


class NoiseOfFixedSize(Base):
    def more(self, x):
        return x + torch.randn(4, 1, 1, dtype=torch.float64)


class NumPyNoise(Base):
    def more(self, x):
        return x + torch.from_numpy(np.random.rand(4, 1, 1))


class Counts(Base):
    calls = 0

    def more(self, x):
        self.calls += 1
        return x * self.calls


class CountsInItsClass(Base):
    calls = 0

    def more(self, x):
        type(self).calls += 1
        return x


class Appends(Base):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.seen = []

    def more(self, x):
        self.seen.append(len(self.seen))
        return x * len(self.seen)


class AppendsToAGlobal(Base):
    def more(self, x):
        SEEN.append(1)
        return x * (1 + len(SEEN) % 2)


class KeepsATensor(Base):
    def more(self, x):
        self.last = x
        return x


class ChangesItsChild(Base):
    def more(self, x):
        self.norm.momentum = 0.5 * self.norm.momentum
        return x


class Prints(Base):
    def more(self, x):
        print("here")
        return x


class LooksAtValues(Base):
    def more(self, x):
        return x * float(x.detach().abs().mean())


class CatchesTheError(Base):
    def more(self, x):
        try:
            return x * 2 if float(x.detach().mean()) < 0 else x * 3
        except TypeError:
            return x


class Autocast(Base):
    def more(self, x):
        with torch.autocast("cpu", enabled=False):
            return x * 2


class CallsForTheStatistics(Base):
    """Calls a batch norm, and does not use the result."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.other = nn.BatchNorm2d(4)

    def more(self, x):
        self.other(x)
        return x


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad


class StraightThrough(Base):
    def more(self, x):
        return Straight.apply(x)


class IsInstance(Base):
    def more(self, x):
        return 2 * x if isinstance(x, torch.Tensor) else x


KINDS = list(Base.__subclasses__())


class NormAct(nn.BatchNorm2d):
    """Batch norm with an activation, as libraries of models write it."""

    def __init__(self, channels, act=nn.ReLU, **options):
        super().__init__(channels, **options)
        self.drop, self.act = nn.Identity(), act()

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected images")
        rate = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        by_batch = self.training or (self.running_mean is None and self.running_var is None)
        own = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if own else (None, None)
        x = F.batch_norm(x, mean, var, self.weight, self.bias, by_batch, rate, self.eps)
        return self.act(self.drop(x))


class NormTwice(NormAct):
    """Looks like batch norm, and is not."""

    def forward(self, x):
        return super().forward(super().forward(x))


class WithNorm(nn.Module):
    def __init__(self, inputs, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, 4, 3, padding=1, bias=False), norm(4)
        self.second, self.last = nn.Conv2d(4, 4, 3, padding=1), norm(4)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.last(self.second(x))


def network(make, seed=0):
    torch.manual_seed(seed)
    model = Plain(2, 4)
    model.features = nn.Sequential(make(3), make(4))
    return model.double()


def seed():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    SEEN.clear()


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_what_python_does_in_a_block_is_done_in_every_step(kind, window):
    sff = SFF(network(kind), CLASSES, input_shape=(3, 8, 8), window=window)
    naive, data = copy.deepcopy(sff), batches(sff, 4)
    seed()
    losses = train(Trainer(sff, sgd), data)
    seed()
    expected = naive_training(naive, data, sgd, window)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-8, atol=1e-8)
    assert_same_training(sff, naive, 1e-8)
    for a, b in zip(sff.model.modules(), naive.model.modules(), strict=True):
        assert getattr(a, "calls", 0) == getattr(b, "calls", 0) and getattr(a, "seen", 0) == getattr(b, "seen", 0)


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.Identity])
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"eps": 0.1, "momentum": 0.3}],
)
@pytest.mark.parametrize("norm", [NormAct, NormTwice])
def test_subclasses_of_batch_norm(norm, options, act):
    net = network(lambda c: WithNorm(c, lambda n: norm(n, act, **options)))
    sff = SFF(net, CLASSES, "block", (3, 8, 8))
    assert all(int(b) == 0 for n, b in sff.named_buffers() if n.endswith("num_batches_tracked"))
    naive, data = copy.deepcopy(sff), batches(sff, 3)
    train(Trainer(sff, sgd), data)
    naive_training(naive, data, sgd, 2)
    assert_same_training(sff, naive, 1e-8)
    fused = norm is NormAct and options != {"momentum": None}
    assert all((block.epilogue is not None) == fused for block in sff.local_blocks)
    if fused:
        assert str(sff.local_blocks[0].epilogue) == " + ".join(
            ["batch norm", *{"Identity": []}.get(act.__name__, [act.__name__.lower()])]
        )


@pytest.mark.parametrize("kind", [*KINDS, lambda c: WithNorm(c, NormAct)])
def test_sff_leaves_the_model_as_it_was(kind):
    model = network(kind)
    model.features[0].eval()
    SEEN.clear()
    calls = getattr(kind, "calls", 0)
    before, states = copy.deepcopy(model), (torch.get_rng_state(), random.getstate(), repr(np.random.get_state()))
    attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
    tensors = {n: (t, t._version) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    SFF(model, CLASSES, input_shape=(3, 8, 8))
    assert random.getstate() == states[1] and repr(np.random.get_state()) == states[2]
    assert SEEN == [] and getattr(kind, "calls", 0) == calls
    for name, module in model.named_modules():
        assert vars(module) == attributes[name]
        assert module.training == before.get_submodule(name).training
        assert getattr(module, "seen", []) == []
        if hasattr(module, "draw"):
            assert module.draw.getstate() == before.get_submodule(name).draw.getstate()
            assert module.numpy.bit_generator.state == before.get_submodule(name).numpy.bit_generator.state
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor is tensors[name][0] and tensor.grad is None
        assert torch.equal(tensor, before.state_dict()[name])


class ReadsItsConvolution(Base):
    def more(self, x):
        assert self.gate.in_channels == self.gate.weight.shape[1]
        return self.gate(x.to(self.gate.weight.dtype)) + self.gate.bias[:, None, None]


def test_a_replaced_convolution_still_has_its_tensors():
    test_what_python_does_in_a_block_is_done_in_every_step(ReadsItsConvolution, 2)


class ReadsInBothGraphs(Plain):
    """The cut's graph and the training graph of its first block both read parameters by themselves."""

    def __init__(self):
        super().__init__(2, 4)
        self.features[0] = Filters()
        self.shift = nn.Parameter(torch.arange(4.0))

    def forward(self, x):
        x = self.features[0](x) + self.shift[:, None, None]
        return self.fc(self.pool(self.features[1](x)).flatten(1))


class Filters(nn.Module):
    """A convolution of its own, with two parameters."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, padding=1)


def test_parameters_that_two_graphs_read_are_not_mixed_up():
    sffs = []
    for fuse in (True, False):
        torch.manual_seed(0)
        sffs.append(SFF(ReadsInBothGraphs().double(), CLASSES, input_shape=(3, 8, 8), fuse=fuse))
        train(Trainer(sffs[-1], sgd), batches(sffs[-1], 2))
    assert_same_training(*sffs, 1e-8)


def test_print_names_what_is_not_opened():
    text = repr(SFF(network(StatisticsByHand), CLASSES, input_shape=(3, 8, 8)))
    assert text.splitlines()[-1] == "called as they are: features.0, features.1: writes to mean in place"


class CutThrough(Plain):
    """The cut runs through what is drawn."""

    def forward(self, x):
        for block in self.features:
            x = block(x) if torch.rand(1).item() < 0.5 else x
        return self.fc(self.pool(x).flatten(1))


class Drawn(Plain):
    def forward(self, x):
        with torch.no_grad():
            x = self.features[0](x)
        return self.fc(self.pool(self.features[1:](x)).flatten(1))


@pytest.mark.parametrize(("kind", "reason"), [(CutThrough, "tensors of its own"), (Drawn, "torch.no_grad")])
def test_a_cut_through_such_python_is_refused(kind, reason):
    with pytest.raises(CutError, match=f"the model itself.*{reason}.*granularity="):
        SFF(kind(), CLASSES, input_shape=(3, 8, 8))


class DropsInPlace(Base):
    """The results of writes in place are not used, but what was written to is."""

    def more(self, x):
        mask = x.new_empty(len(x), 1, 1, 1).bernoulli_(0.5)
        mask.div_(0.5)
        y = x * mask
        y.add_(1)
        return y


class WritesBehindTheNorm(nn.Module):
    """What an epilogue at the end would read is written to between batch norm and the block's end."""

    def __init__(self, inputs):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        z = y + 0
        h = self.norm(y) + z
        z.mul_(3)
        return F.relu(h)


@pytest.mark.parametrize("kind", [DropsInPlace, WritesBehindTheNorm])
def test_writes_in_place_keep_their_order(kind):
    test_what_python_does_in_a_block_is_done_in_every_step(kind, 2)


class ShortcutFirst(nn.Module):
    """The batch norm of the shortcut runs first, and the branch writes in place before both are added."""

    def __init__(self, inputs):
        super().__init__()
        self.short, self.norm = nn.Conv2d(inputs, 4, 1), nn.BatchNorm2d(4)
        self.branch = nn.Sequential(
            nn.Conv2d(inputs, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
        )

    def forward(self, x):
        return F.relu(self.norm(self.short(x)) + self.branch(x), inplace=True)


def test_the_later_of_two_batch_norms_ends_a_block_that_writes_in_place():
    test_what_python_does_in_a_block_is_done_in_every_step(ShortcutFirst, 2)
    sff = SFF(network(ShortcutFirst), CLASSES, input_shape=(3, 8, 8))
    assert [str(block.epilogue) for block in sff.local_blocks] == ["batch norm + residual + relu"] * 2


class DropsBetweenBlocks(Plain):
    def forward(self, x):
        x = F.dropout(self.features[0](x), 0.5, self.training)
        return self.fc(self.pool(self.features[1](x)).flatten(1))


def test_frozen_blocks_run_in_evaluation_mode_where_the_model_s_own_forward_is_cut():
    torch.manual_seed(0)
    sff = SFF(DropsBetweenBlocks(2, 4), CLASSES, input_shape=(3, 8, 8))
    Trainer(sff, sgd, frozen=1).train_mode()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(sff.blocks[0](images)[0], sff.model.features[0](images))
    Trainer(sff, sgd).train_mode()
    assert not torch.equal(sff.blocks[0](images)[0], sff.model.features[0](images))


# --- models of libraries


MODELS = {
    "torchvision": ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "mnasnet0_5", "shufflenet_v2_x0_5"],
    "timm": ["mobilenetv3_small_050", "regnetx_002", "edgenext_xx_small", "lcnet_050", "dla34", "selecsls42"],
}


def library_model(library, name):
    torchvision = import_torchvision()
    torch.manual_seed(0)
    if library == "torchvision":
        return getattr(torchvision.models, name)(num_classes=CLASSES)
    return pytest.importorskip("timm").create_model(name, num_classes=CLASSES)


@pytest.mark.parametrize(("library", "name"), [(library, name) for library, names in MODELS.items() for name in names])
def test_models_of_libraries_are_left_as_they_were(library, name):
    model = library_model(library, name)
    before, states = (
        copy.deepcopy(model.state_dict()),
        (torch.get_rng_state(), random.getstate(), repr(np.random.get_state())),
    )
    attributes = {n: dict(vars(m)) for n, m in model.named_modules()}
    blocks, _ = cut(model, "block", (3, 64, 64))
    for block in blocks:
        TrainingGraph(block.training_module, True)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and repr(np.random.get_state()) == states[2]
    assert {n: dict(vars(m)) for n, m in model.named_modules()} == attributes
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "regnetx_002", "edgenext_xx_small"])
def test_models_with_their_own_batch_norm_train_fused_as_unfused(name):
    sffs = []
    for fuse in (True, False):
        model = library_model("timm", name).double()
        torch.manual_seed(1)
        sffs.append(SFF(model, CLASSES, input_shape=(3, 64, 64), fuse=fuse))
    for sff in sffs:
        torch.manual_seed(2)
        train(Trainer(sff, sgd), batches(sff, 1, 4))
    assert_same_training(*sffs, 1e-8)
    if name != "edgenext_xx_small":
        assert sum(block.epilogue is not None for block in sffs[0].local_blocks) >= 5
