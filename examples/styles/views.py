"""Convolution layers whose goodness is a mean over classes' shares of the channels, by view; group norm between layers."""

import torch
import torch.nn.functional as F
from torch import nn

SHAPE, BATCH, CLASSES = (3, 32, 32), 8, 10


class Layer(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)

    def forward(self, x):
        return torch.relu(self.convolution(x))

    def goodness(self, y):
        g = y.view(y.size(0), CLASSES, -1)
        g = g.mean(dim=2)
        return g / 1.0

    def update(self, x, label):
        y = self.forward(x)
        loss = F.cross_entropy(self.goodness(y), label)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return F.group_norm(y.detach(), CLASSES)


class Net(nn.Module):
    def __init__(self, planes=(40, 80, 160, 320), depth=2):
        super().__init__()
        self.layers, inputs = nn.ModuleList(), 3
        for stage, outputs in enumerate(planes):
            for i in range(depth):
                self.layers.append(Layer(inputs, outputs, 2 if i == 0 and stage else 1))
                inputs = outputs

    def train_batch(self, x, label):
        for layer in self.layers:
            x = layer.update(x, label)

    def predict(self, x):
        for layer in self.layers:
            y = layer(x)
            x = F.group_norm(y, CLASSES)
        return layer.goodness(y).argmax(1)
