"""Layers that are convolutions themselves. The goodness of a class is that of its share of the channels, in a loop over torch.split."""

import torch
import torch.nn.functional as F
from torch import nn

SHAPE, BATCH, CLASSES = (3, 32, 32), 16, 10


class Layer(nn.Conv2d):
    def __init__(self, inputs, outputs, pool):
        super().__init__(inputs, outputs, 3, padding=1)
        self.activation, self.pool = nn.ReLU(), nn.MaxPool2d(2) if pool else nn.Identity()
        self.norm = nn.BatchNorm2d(outputs)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)

    def forward(self, x):
        return self.norm(self.pool(self.activation(self._conv_forward(x, self.weight, self.bias))))

    def goodness(self, y):
        shares = torch.split(y, y.shape[1] // CLASSES, dim=1)
        return torch.stack([share.pow(2).mean((1, 2, 3)) for share in shares], dim=1)

    def train_(self, x, label):
        y = self.forward(x)
        loss = F.cross_entropy(self.goodness(y), label)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return y.detach()


class Net(nn.Module):
    def __init__(self, channels=(3, 20, 80, 240, 480), pools=(False, True, False, True)):
        super().__init__()
        self.layers = nn.ModuleList(
            Layer(a, b, pool) for a, b, pool in zip(channels, channels[1:], pools, strict=False)
        )

    def train_batch(self, x, label):
        for layer in self.layers:
            x = layer.train_(x, label)
        return x

    def predict(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.layers[-1].goodness(x).argmax(1)
