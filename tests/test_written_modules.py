"""Modules as people write them, in place or called twice, train as in plain PyTorch; what cannot is refused when the SFF is made."""

import copy

import pytest
import torch
from torch import nn
from training_oracle import CLASSES, assert_same_training, batches, naive_training, sgd, train

from fastff import SFF, Trainer


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        return self.conv(self.relu(x))


class Multiplied(InPlace):
    def forward(self, x):
        return self.conv(x.mul_(2))


class Subtracted(InPlace):
    """Changes which of the inputs are positive, on which the gradient of a ReLU before it depends."""

    def forward(self, x):
        return torch.relu(self.conv(x.sub_(0.3)))


class NormTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        return torch.relu(self.norm(self.second(torch.relu(self.norm(self.first(x))))))


class ConvolutionTwice(NormTwice):
    def forward(self, x):
        return torch.relu(self.norm(self.first(torch.relu(self.first(x)))))


class AllTwice(NormTwice):
    """The same three layers again, so that fused stand-ins for pairs of them run twice as well."""

    def forward(self, x):
        for _ in range(2):
            x = torch.relu(self.norm(self.first(x)))
        return x


def network(middle, first=nn.ReLU):
    layers = [nn.Conv2d(3, 6, 3, padding=1), first(), middle, nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))


def made(middle, dtype=torch.float64, first=nn.ReLU, **options):
    torch.manual_seed(0)
    return SFF(network(middle(), first).to(dtype), CLASSES, input_shape=(3, 8, 8), granularity="block", **options)


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("middle", [InPlace, Multiplied, Subtracted, NormTwice, ConvolutionTwice, AllTwice])
def test_trains_as_in_plain_pytorch(middle, window):
    sff = made(middle)
    naive, data = copy.deepcopy(sff), batches(sff, 4)
    losses = train(Trainer(sff, sgd, window=window), data)
    expected = naive_training(naive, data, sgd, window)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-9, atol=1e-9)
    assert_same_training(sff, naive)


@pytest.mark.parametrize("middle", [InPlace, NormTwice, AllTwice])
def test_trains_in_float32(middle):
    """With the compiled kernels, which float64 does not have: as near to float64 as four steps in float32 are."""
    sff = made(middle, torch.float32)
    naive, data = copy.deepcopy(sff).double(), batches(sff, 4)
    train(Trainer(sff, sgd, window=2), [(images.float(), target) for images, target in data])
    naive_training(naive, data, sgd, 2)
    assert_same_training(sff.double(), naive, 1e-3)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("middle", [InPlace, Subtracted])
def test_in_place_on_what_is_not_normalized(middle, window):
    """The next block's input is then the memory of the block's own output."""
    results = []
    for first in (nn.ReLU, nn.Identity):
        for fuse in (True, False):
            sff = made(middle, first=first, normalize=None, fuse=fuse)
            train(Trainer(sff, sgd, window=window), batches(sff, 3))
            results.append(sff)
    assert_same_training(*results[:2])
    assert_same_training(*results[2:])


def shared():
    convolution = nn.Conv2d(6, 6, 3, padding=1)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), convolution, nn.ReLU(), convolution, nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES))


def test_a_parameter_of_two_blocks_is_refused():
    says = r"model: expected no parameter that two blocks share, got 2.weight in block 1 \(2\) and block 2 \(2\)"
    with pytest.raises(ValueError, match=says):
        SFF(shared(), CLASSES, input_shape=(3, 8, 8))
    net = shared()
    net[8].weight = nn.Parameter(torch.randn(CLASSES, 6))
    net[2].weight.requires_grad_(False)
    net[2].bias.requires_grad_(False)
    assert len(SFF(net, CLASSES, input_shape=(3, 8, 8)).blocks) == 3, "nobody trains it"


def test_a_parameter_called_twice_in_one_block_is_trained():
    torch.manual_seed(0)
    sff = SFF(shared().double(), CLASSES, input_shape=(3, 8, 8), granularity="model", window=1)
    naive, data = copy.deepcopy(sff), batches(sff, 3)
    train(Trainer(sff, sgd), data)
    naive_training(naive, data, sgd)
    assert_same_training(sff, naive)
