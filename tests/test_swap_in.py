"""The six recipes of examples/swap_in: the program after learns what the one before learns, for ten lines or fewer."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.swap_in import RECIPES, VERSIONS, lines_changed, module
from examples.swap_in import digits

# The program before passes on what a layer gives after its update, the one after what it gave before: only their first layers learn the same.
PASSED_ON_LATER = ("layers", "suite")


@pytest.fixture(scope="module")
def images():
    pytest.importorskip("sklearn")
    (x, label), (test, _) = digits.images()
    return x[:8].double(), label[:8], test[:32].double()


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def blocks(name, net):
    """The locally trained parts of a program, in order."""
    owner = {"config": "model", "heads": "network"}.get(name)
    owner = getattr(net, owner) if owner else net
    found = list(next(getattr(owner, a) for a in ("layers", "blocks", "suite") if hasattr(owner, a)))
    return [nn.ModuleList(both) for both in zip(found, owner.heads, strict=True)] if hasattr(owner, "heads") else found


def parameters(block):
    """In order of creation, those that learn."""
    return [p for p in block.parameters() if p.requires_grad]


def take(net_after, net_before, name):
    """The parameters and running statistics of the one before into the one after."""
    with torch.no_grad():
        for after, before in zip(blocks(name, net_after), blocks(name, net_before), strict=True):
            for p, q in zip(parameters(after), parameters(before), strict=True):
                p.copy_(q.view(p.shape))
            for p, q in zip(after.buffers(), before.buffers(), strict=True):
                p.copy_(q)


def by_gradient_descent(name, net):
    """Its optimisers replaced by plain ones: the first step of Adam is the sign of a gradient, zeros' too."""
    for owner in (net, getattr(net, "model", None), *blocks(name, net)):
        if hasattr(owner, "optimizer"):
            owner.optimizer = torch.optim.SGD(owner.optimizer.param_groups[0]["params"], lr=0.1)
    if hasattr(net, "optimizers"):
        net.optimizers = [torch.optim.SGD(o.param_groups[0]["params"], lr=0.1) for o in net.optimizers]


def pair(name):
    """(the program before, the one after) with the same parameters, those of batch norm away from ones and zeros."""
    nets = []
    for version in VERSIONS:
        torch.manual_seed(0)
        nets.append(module(name, version).Net())
    before, after = nets
    if name == "heads":  # the local classifiers of fastff have no bias
        for head in before.network.heads:
            nn.init.zeros_(head.bias)
            head.bias.requires_grad_(False)
    for block in blocks(name, before):
        for layer in block.modules():
            if isinstance(layer, nn.BatchNorm2d):
                nn.init.uniform_(layer.weight, 0.5, 1.5)
                nn.init.normal_(layer.bias, std=0.1)
    take(after, before, name)
    for net in nets:
        by_gradient_descent(name, net)
    return before, after


@pytest.mark.parametrize("name", RECIPES)
def test_lines_changed(name):
    assert 0 < lines_changed(name) <= 10


@pytest.mark.parametrize("name", RECIPES)
def test_one_step(name, images, float64):
    """The same parameters and running statistics after a minibatch; of layers and suite the first layer's."""
    x, label, _ = images
    before, after = pair(name)
    start = [[p.detach().clone() for p in parameters(block)] for block in blocks(name, before)]
    for net in (before, after):
        torch.manual_seed(1)
        net.train_batch(x, label)
    compared = list(zip(blocks(name, before), blocks(name, after), start, strict=True))
    for wanted, found, initial in compared[:1] if name in PASSED_ON_LATER else compared:
        for p, q, r in zip(parameters(found), parameters(wanted), initial, strict=True):
            p, q = p.detach().reshape(q.shape), q.detach()
            moved = (q - r).abs().max()
            assert moved > 0
            assert (p - q).abs().max() < 1e-7 * moved
        for p, q in zip(found.buffers(), wanted.buffers(), strict=True):
            torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", RECIPES)
def test_predict(name, images, float64, monkeypatch):
    """The same labels from the same parameters, and the same scores before argmax, at the start and after a step."""
    x, label, test = images
    before, after = pair(name)
    scores, argmax = [], torch.Tensor.argmax
    monkeypatch.setattr(torch.Tensor, "argmax", lambda s, *dim: (scores.append(s), argmax(s, *dim))[1])
    for _ in range(2):
        assert torch.equal(before.predict(test), after.predict(test))
        before.train_batch(x, label)
        take(after, before, name)
    assert len(scores) == 4
    for a, b in zip(scores[::2], scores[1::2], strict=True):
        assert a.shape == (len(test), digits.CLASSES)
        torch.testing.assert_close(a, b)
