"""verify: what two modules return and leave behind, compared."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastff


class Returns(nn.Module):
    """A linear layer and a function of its output."""

    def __init__(self, function, detached=False):
        super().__init__()
        self.linear, self.function, self.detached = nn.Linear(4, 6), function, detached

    def forward(self, x):
        return self.function(self.linear(x.detach() if self.detached else x))


def test_verify_finds_differences():
    torch.manual_seed(0)
    before, off, x = Returns(lambda y: y), Returns(lambda y: 1.001 * y), torch.randn(3, 4)
    found = fastff.verify(before, off, x)
    assert not found
    assert "differs" in str(found)
    assert "not the same" in str(found)
    assert fastff.verify(before, off, x, tolerance=1e-2)
    state = [p.clone() for p in before.parameters()]
    assert fastff.verify(before, Returns(lambda y: y), (x,), loss=lambda y: y.square().sum())
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), state, strict=True))
    assert all(p.grad is None for p in before.parameters())


class Trains(nn.Module):
    """Trains itself in its forward and returns a detached loss."""

    def __init__(self, lr):
        super().__init__()
        self.l, self.lr = nn.Linear(4, 2), lr

    def forward(self, x):
        loss = self.l(x).pow(2).mean()
        (grad,) = torch.autograd.grad(loss, self.l.weight)
        with torch.no_grad():
            self.l.weight -= self.lr * grad
        return loss.detach()

    def train_(self, x):
        self.forward(x)


def test_verify_compares_what_training_leaves_behind():
    x = torch.rand(3, 4)
    found = fastff.verify(Trains(0.1), Trains(10.0), x)
    assert not found
    assert [row.name for row in found.rows if row.difference > row.allowed] == ["parameter l.weight"]
    assert fastff.verify(Trains(0.1), Trains(0.1), x)
    for lr, same in ((0.1, True), (10.0, False)):
        assert bool(fastff.verify(Trains(0.1), Trains(lr), x, call=lambda m, x: m.train_(x))) == same


def test_verify_says_what_only_one_has():
    """A gradient that is None, an output too many, another size, a normalised output."""
    torch.manual_seed(0)
    x = torch.rand(3, 4)
    found = fastff.verify(Returns(lambda y: y, detached=True), Returns(lambda y: y), x)
    assert [(r.name, r.note) for r in found.rows if r.difference > r.allowed] == [
        ("gradient of input 0", "none before")
    ]
    pair = Returns(lambda y: (y, y.pow(2).mean(1)))
    found = fastff.verify(Returns(lambda y: y), pair, x)
    assert ("output 1", "none before") in [(r.name, r.note) for r in found.rows]
    assert fastff.verify(Returns(lambda y: y), pair, x, outputs=(None, lambda returned: returned[0]))
    found = fastff.verify(Returns(lambda y: y[:, :2]), Returns(lambda y: y), x)
    assert found.rows[0].note == "[3, 2] before, [3, 6] after"
    found = fastff.verify(Returns(lambda y: F.layer_norm(y, y.shape[1:])), Returns(lambda y: y), x)
    assert found.rows[0].note == "the same if that of after is normalized by layer_norm"
    assert fastff.verify(Returns(lambda y: None), Returns(lambda y: None), x)


def test_verify_bad_input():
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="after: expected the parameters of before"):
        fastff.verify(Returns(lambda y: y), Trains(0.1), x)
    with pytest.raises(TypeError, match=r"before, after: expected nn\.Modules, got function"):
        fastff.verify(lambda x: x, Trains(0.1), x)
    with pytest.raises(TypeError, match="outputs: expected a function or a pair of functions, got 1"):
        fastff.verify(Trains(0.1), Trains(0.1), x, outputs=1)
