"""Blocks that return (output, goodness), with a loop around them that trains each."""

import torch
import torch.nn.functional as F

import fastff
from examples.swap_in import digits


class Block(fastff.nn.FFConv2d):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__(inputs, outputs, 3, stride, num_classes=digits.CLASSES)
        self.to(memory_format=torch.channels_last)


class Net:
    def __init__(self, channels=(1, 32, 32, 64, 64), strides=(1, 1, 2, 1)):
        self.blocks = [Block(a, b, s) for a, b, s in zip(channels, channels[1:], strides, strict=False)]
        self.optimizers = [torch.optim.AdamW(block.parameters(), lr=1e-3) for block in self.blocks]

    def train_batch(self, x, label):
        for block, optimizer in zip(self.blocks, self.optimizers, strict=True):
            x, loss = block.local_step(x, label)
            optimizer.step()
            optimizer.zero_grad()

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
