"""Blocks that return (output, goodness), with a loop around them that trains each."""

import torch
import torch.nn.functional as F
from torch import nn

from examples.swap_in import digits


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.head = nn.Conv2d(outputs, digits.CLASSES, 1, bias=False)

    def forward(self, x):
        y = torch.relu(self.norm(self.convolution(x)))
        return y, self.head(y).pow(2).mean((2, 3))


class Net:
    def __init__(self, channels=(1, 32, 32, 64, 64), strides=(1, 1, 2, 1)):
        self.blocks = [Block(a, b, s) for a, b, s in zip(channels, channels[1:], strides, strict=False)]
        self.optimizers = [torch.optim.AdamW(block.parameters(), lr=1e-3) for block in self.blocks]

    def train_batch(self, x, label):
        for block, optimizer in zip(self.blocks, self.optimizers, strict=True):
            y, g = block(x)
            loss = F.cross_entropy(g, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            x = F.layer_norm(y.detach(), y.shape[1:])

    @torch.no_grad()
    def predict(self, x):
        for block in self.blocks:
            block.eval()
            y, g = block(x)
            block.train()
            x = F.layer_norm(y, y.shape[1:])
        return g.argmax(1)


if __name__ == "__main__":
    digits.fit(Net())
