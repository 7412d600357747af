"""Backprop, on the Trainer's loop, against plain PyTorch."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from oracle import peak_memory
from training_oracle import adamw, assert_same_training, batches, by_hand, grouped, local_loss, made, sgd, train

from fastff import Backprop


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("model", ["resnet18", "plain"])
def test_backprop_is_plain_training(model, optimizer):
    sff = made(model, readout=True)
    net, data = copy.deepcopy(sff.model), batches(sff)
    losses = train(Backprop(sff, optimizer), data)
    plain = optimizer(grouped(net.parameters()))
    net.train()
    for (images, target), (loss,) in zip(data, losses, strict=True):
        expected = F.cross_entropy(net(images), target)
        assert loss == pytest.approx(float(expected), rel=1e-5)
        plain.zero_grad()
        expected.backward()
        plain.step()
    assert_same_training(sff.model, net, rtol=1e-12)


@pytest.mark.parametrize(
    "options", [{"checkpointing": True}, {"micro_batches": 3}, {"checkpointing": True, "micro_batches": 2}]
)
def test_backprop_that_saves_memory_trains_the_same(options):
    sff = made(readout=True)
    other, data = copy.deepcopy(sff), batches(sff, 5, size=7)
    train(Backprop(sff, adamw), data)
    train(Backprop(other, adamw, **options), data)
    assert_same_training(other, sff)


def test_checkpointing_saves_memory_and_keeps_weights_with_batch_norm():
    sff = made("resnet18", dtype=torch.float32, readout=True)
    other = copy.deepcopy(sff)
    data = batches(sff, 3, size=8, dtype=torch.float32)
    loops = Backprop(sff, sgd), Backprop(other, sgd, checkpointing=True)
    for loop in loops:
        train(loop, data)
    for a, b in zip(sff.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for a, b in zip(sff.model.buffers(), other.model.buffers(), strict=True):  # of batch norm, which counts a step once
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    plain, checkpointed = (peak_memory(functools.partial(loop.step, *data[0])) for loop in loops)
    assert checkpointed < 0.9 * plain  # of a network as narrow as this; oneDNN's scratch differs by processor


def test_deep_supervision():
    """Cross-entropy of the classifier plus every head's loss, all through the whole network."""
    sff = made("resnet18", readout=True)
    naive, data = copy.deepcopy(sff), batches(sff, 5)
    train(Backprop(sff, sgd, deep_supervision=True), data)
    optimizer = sgd(grouped(naive.parameters()))
    naive.train()
    for images, target in data:
        x, total = images, 0
        for (function, _), head in zip(by_hand(naive), naive.heads, strict=True):
            (x,) = function(x)
            total = total + local_loss(head, x, target)
        total = total + F.cross_entropy(naive.model.fc(x.mean((2, 3))), target)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert_same_training(sff, naive)
