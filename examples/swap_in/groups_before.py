"""Convolution blocks whose channels are groups, one for each class: forward_forward(x, y) trains, ff_infer(x) predicts."""

import torch
import torch.nn.functional as F
from torch import nn

from examples.swap_in import digits


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)

    def forward(self, x):
        return torch.relu(self.norm(self.convolution(x)))

    def goodness(self, y):
        batch, channels, height, width = y.shape
        return y.view(batch, digits.CLASSES, channels // digits.CLASSES, height, width).pow(2).mean((2, 3, 4))

    def forward_forward(self, x, label):
        y = self.forward(x)
        loss = F.cross_entropy(self.goodness(y), label)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return F.layer_norm(y.detach(), y.shape[1:])

    def ff_infer(self, x):
        y = self.forward(x)
        return F.layer_norm(y, y.shape[1:]), self.goodness(y)


class Net:
    def __init__(self, channels=(1, 40, 40, 80, 80), strides=(1, 1, 2, 1)):
        self.blocks = [Block(a, b, s) for a, b, s in zip(channels, channels[1:], strides, strict=False)]

    def train_batch(self, x, label):
        for block in self.blocks:
            x = block.forward_forward(x, label)

    @torch.no_grad()
    def predict(self, x):
        for block in self.blocks:
            block.eval()
            x, g = block.ff_infer(x)
            block.train()
        return g.argmax(1)


if __name__ == "__main__":
    digits.fit(Net())
