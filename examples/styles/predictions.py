"""VGG whose layers have a local classifier and their own optimizer, and train themselves inside forward."""

import torch
import torch.nn.functional as F
from torch import nn

SHAPE, BATCH, CLASSES = (3, 32, 32), 16, 10


class Layer(nn.Module):
    def __init__(self, inputs, outputs, size, pool):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm, self.pool = nn.BatchNorm2d(outputs), pool
        self.average = nn.AvgPool2d(max(1, size // 4))
        self.classifier = nn.Linear(outputs * min(size, 4) ** 2, CLASSES)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=5e-4)

    def forward(self, x, label):
        h = F.relu(self.norm(self.convolution(x)))
        if self.training:
            flat = self.average(h).view(h.size(0), -1)
            loss = F.cross_entropy(self.classifier(flat), label)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        h = h.detach()
        return F.max_pool2d(h, 2) if self.pool else h


class Net(nn.Module):
    def __init__(self, channels=(32, 64, "pool", 64, 128, "pool", 128, 128, "pool")):
        super().__init__()
        self.layers, inputs, size = nn.ModuleList(), 3, 32
        for i, outputs in enumerate(channels):
            if outputs == "pool":
                size //= 2
                continue
            pool = i + 1 < len(channels) and channels[i + 1] == "pool"
            self.layers.append(Layer(inputs, outputs, size, pool))
            inputs = outputs

    def forward(self, x, label):
        for layer in self.layers:
            x = layer(x, label)
        return x

    def train_batch(self, x, label):
        return self(x, label)
