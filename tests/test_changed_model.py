"""What is changed in a model after SFF(...): attributes, modules and parameters count, or an error says that they cannot."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_plain import network, seed
from torch import nn
from training_oracle import CLASSES, Plain, assert_same_training, batches, naive_training, sgd, train

from fastff import SFF, Trainer

# --- attributes changed after SFF(...)


class DropBlock(nn.Module):
    """A residual block that is left out for drawn samples, with a number that schedules change."""

    def __init__(self, inputs):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.drop, self.scales = nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.0), [1.0, 2.0]
        self.drop_prob, self.act, self.options = 0.0, nn.GELU(), {"gain": 1.0}

    def forward(self, x):
        x = self.act(self.norm(self.conv(x))) * self.options["gain"]
        y = self.drop(self.second(x)) * self.scales[0]
        if self.drop_prob > 0 and self.training:
            y = y * y.new_empty(len(y), 1, 1, 1).bernoulli_(1 - self.drop_prob)
        return F.relu(x + y)


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).tanh()


def replace_conv(b):
    b.second = nn.Conv2d(4, 4, 1).to(b.second.weight)
    with torch.no_grad():
        b.second.weight.fill_(0.2), b.second.bias.fill_(0.1)


class Doubled(DropBlock):
    factor = 1.0  # of the class

    def forward(self, x):
        return super().forward(x) * self.factor


CHANGES = {
    "default of the class": lambda b: setattr(b, "factor", 3.0),
    "drop_prob": lambda b: setattr(b, "drop_prob", 0.5),
    "list": lambda b: b.scales.__setitem__(0, 3.0),
    "dict": lambda b: b.options.__setitem__("gain", 3.0),
    "forward of an instance": lambda b: setattr(b.norm, "forward", lambda x: 2 * x),
    "no running statistics": lambda b: (setattr(b.norm, "running_mean", None), setattr(b.norm, "running_var", None)),
    "dropout": lambda b: setattr(b.drop, "p", 0.5),
    "momentum": lambda b: setattr(b.norm, "momentum", 0.7),
    "no momentum": lambda b: setattr(b.norm, "momentum", None),
    "eps": lambda b: setattr(b.norm, "eps", 0.5),
    "dilation": lambda b: (setattr(b.second, "dilation", (2, 2)), setattr(b.second, "padding", (2, 2))),
    "padding_mode": lambda b: (
        setattr(b.second, "padding_mode", "circular"),
        setattr(b.second, "_reversed_padding_repeated_twice", (1,) * 4),
    ),
    "class": lambda b: setattr(b.second, "__class__", OwnConv),
    "gelu": lambda b: setattr(b.act, "approximate", "tanh"),
    "module": replace_conv,
    "statistics": lambda b: setattr(b.norm, "track_running_stats", False),
    "mode": lambda b: b.norm.register_forward_hook(lambda m, x, y: 2 * y),
    "parametrization": lambda b: nn.utils.parametrizations.weight_norm(b.second),
    "parameter": lambda b: setattr(b.second, "weight", nn.Parameter(torch.full_like(b.second.weight, 0.1))),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_after_sff_counts(name):
    sff = SFF(network(Doubled), CLASSES, "block", (3, 8, 8))
    data = batches(sff, 2)
    train(Trainer(sff, sgd), data)
    for module in sff.model.features:
        CHANGES[name](module)
    naive = copy.deepcopy(sff)
    seed()
    losses = train(Trainer(sff, sgd), data)
    seed()
    expected = naive_training(naive, data, sgd, 2)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-8, atol=1e-8)
    assert_same_training(sff, naive, 1e-8)


class Scaled(Plain):
    """The cut runs through its own forward."""

    def __init__(self, depth=2, channels=4):
        super().__init__(depth, channels)
        self.scale, self.name, self.shift = 2.0, "a", nn.Parameter(torch.zeros(4, 1, 1))
        self.register_buffer("offset", torch.ones(3, 1, 1))

    def forward(self, x):
        x = self.features[0](x * self.offset) * self.scale
        return self.fc(self.pool(self.features[1](x + self.shift)).flatten(1))


def test_a_change_that_the_cut_depends_on_is_an_error():
    torch.manual_seed(0)
    sff = SFF(Scaled(), CLASSES, input_shape=(3, 8, 8))
    trainer, batch = Trainer(sff), batches(sff, 1, dtype=torch.float32)[0]
    sff.model.name = "b"  # nothing reads it
    trainer.step(*batch)
    sff.model.scale = 3.0
    for run in (lambda: trainer.step(*batch), lambda: sff(batch[0])):
        with pytest.raises(RuntimeError, match="before a change of scale of a Scaled from 2.0 to 3.0"):
            run()


# --- parameters assigned after SFF(...)


def assign(model):
    model.load_state_dict({k: v.detach() * 0.5 for k, v in model.state_dict().items()}, assign=True)


def swap(model):
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 0.5))


def to_empty(model):
    values = copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu")
    model.load_state_dict(values)


@pytest.mark.parametrize("change", [assign, swap, to_empty, lambda model: model.float()])
@pytest.mark.parametrize("make", [lambda: network(DropBlock), lambda: Scaled().double()])
def test_the_model_s_present_parameters_train(change, make):
    torch.manual_seed(0)
    sff = SFF(make(), CLASSES, input_shape=(3, 8, 8))
    change(sff.model)
    dtype = next(sff.model.parameters()).dtype
    sff.heads.to(dtype)
    kept = {id(p) for p in sff.model.parameters()}
    used = {id(p) for block in sff.blocks for p in block.parameters()}
    assert used == {id(p) for n, p in sff.model.named_parameters() if not n.startswith("fc")} and used <= kept
    before = {n: p.detach().clone() for n, p in sff.model.named_parameters()}
    fresh = SFF(copy.deepcopy(sff.model), CLASSES, input_shape=(3, 8, 8))
    fresh.heads = copy.deepcopy(sff.heads)
    for block, head in zip(fresh.local_blocks, fresh.heads, strict=True):
        block.head = head
    data = batches(sff, 2, dtype=dtype)
    train(Trainer(sff, sgd), data)
    train(Trainer(fresh, sgd), data)
    assert_same_training(sff, fresh, 0)
    still = {n for n, p in sff.model.named_parameters() if torch.equal(p, before[n])}
    assert all(n.startswith("fc") or n.endswith(".conv.bias") for n in still), (
        "biases in front of batch norm have no gradient"
    )


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda sff: pickle.loads(pickle.dumps(sff))])
def test_the_blocks_of_a_copy_read_the_copy_s_parameters(copied):
    torch.manual_seed(0)
    sff = SFF(Scaled(), CLASSES, input_shape=(3, 8, 8), fuse=False)
    twin = copied(sff)
    used = {id(p) for block in twin.blocks for p in block.parameters()}
    assert used == {id(p) for n, p in twin.model.named_parameters() if not n.startswith("fc")}
    with torch.no_grad():
        twin.model.shift.fill_(5)
    images = torch.randn(2, 3, 8, 8)
    assert torch.allclose(twin.blocks[0](images)[0], sff.blocks[0](images)[0] + 5)
