"""Unsupervised layers trained by a plain function: two images each, standardised; goodness at each position, two thresholds, a norm penalty."""

import torch
import torch.nn.functional as F
from torch import nn

SHAPE, BATCH = (3, 32, 32), 16


def standardise(x):
    flat = x.view(x.shape[0], -1)
    return (x - flat.mean(1)[:, None, None, None]) / (flat.std(1)[:, None, None, None] + 1e-10)


class Layer(nn.Module):
    def __init__(self, inputs, outputs, theta):
        super().__init__()
        self.theta, self.pool = theta, nn.AvgPool2d(2)
        self.pad = nn.ReflectionPad2d(1)
        self.one, self.two = (nn.Conv2d(inputs, outputs, 3, bias=True) for _ in range(2))

    def forward(self, x, y):
        return torch.relu(self.one(self.pad(standardise(x))) + self.two(self.pad(standardise(y))))


def train(layers, optimizers, x, label):
    """One step of each layer: the same image twice is positive, two different ones are negative."""
    pairs = [(x, x), (x, x.roll(1, 0))]
    for layer, optimizer in zip(layers, optimizers, strict=True):
        low, high = layer.theta
        positive, negative = (layer(*pair) for pair in pairs)
        g_positive, g_negative = positive.pow(2).mean(1), negative.pow(2).mean(1)
        loss = F.softplus(low - g_positive).mean() + F.softplus(g_negative - high).mean()
        loss = loss + 1e-3 * positive.view(len(x), -1).norm(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pairs = [(layer.pool(h.detach()),) * 2 for h in (positive, negative)]
    return loss


class Net(nn.Module):
    def __init__(self, channels=(3, 48, 96), thetas=((1.0, 0.5), (2.0, 1.0))):
        super().__init__()
        self.layers = [Layer(a, b, t) for a, b, t in zip(channels, channels[1:], thetas, strict=False)]
        self.optimizers = [torch.optim.AdamW(layer.parameters(), lr=1e-3) for layer in self.layers]

    def train_batch(self, x, label):
        return train(self.layers, self.optimizers, x, label)
