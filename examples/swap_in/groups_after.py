"""Convolution blocks whose channels are groups, one for each class: forward_forward(x, y) trains, ff_infer(x) predicts."""

import torch

import fastff
from examples.swap_in import digits


class Block(fastff.nn.FFConv2d):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__(inputs, outputs, 3, stride, num_classes=digits.CLASSES, goodness="class_group")
        self.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)

    def forward_forward(self, x, label):
        y, loss = self.local_step(x, label)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return y

    def ff_infer(self, x):
        y, g = self.forward(x)
        return self.next_input(y), g


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
