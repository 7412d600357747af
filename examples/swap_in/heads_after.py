"""Blocks with auxiliary heads, whose losses the network's forward sums up."""

import torch
from torch import nn

import fastff
from examples.swap_in import digits


def convolution(inputs, outputs, stride=1):
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class Network(nn.Module):
    def __init__(self, channels=(1, 16, 16, 16, 32, 32, 32), strides=(1, 1, 1, 2, 1, 1)):
        super().__init__()
        self.blocks = nn.ModuleList()
        for a, b, stride in zip(channels, channels[1:], strides, strict=False):
            block = nn.Sequential(*convolution(a, b, stride), *convolution(b, b))
            options = {"goodness": "projection", "grid": 4, "normalize": None}
            self.blocks.append(fastff.nn.FFBlock(block, b, digits.CLASSES, **options))

    def forward(self, x, label=None):
        loss = 0
        for block in self.blocks:
            x, scores = block(x) if label is None else block.local_step(x, label)
            loss = loss if label is None else loss + scores
        return loss, scores


class Net:
    def __init__(self):
        self.network = Network().to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3)

    def train_batch(self, x, label):
        self.optimizer.zero_grad()
        loss, _ = self.network(x, label)
        self.optimizer.step()

    @torch.no_grad()
    def predict(self, x):
        self.network.eval()
        scores = self.network(x)[1]
        self.network.train()
        return scores.argmax(1)


if __name__ == "__main__":
    digits.fit(Net())
