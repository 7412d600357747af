"""Blocks with auxiliary heads, whose losses the network's forward sums up."""

import torch
import torch.nn.functional as F
from torch import nn

from examples.swap_in import digits


def convolution(inputs, outputs, stride=1):
    return [nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class Network(nn.Module):
    def __init__(self, channels=(1, 16, 16, 16, 32, 32, 32), strides=(1, 1, 1, 2, 1, 1)):
        super().__init__()
        self.blocks, self.heads = nn.ModuleList(), nn.ModuleList()
        for a, b, stride in zip(channels, channels[1:], strides, strict=False):
            self.blocks.append(nn.Sequential(*convolution(a, b, stride), *convolution(b, b)))
            self.heads.append(nn.Linear(16 * b, digits.CLASSES))

    def forward(self, x, label=None):
        loss = 0
        for block, head in zip(self.blocks, self.heads, strict=True):
            x = block(x.detach())
            scores = head(F.adaptive_avg_pool2d(x, 4).flatten(1))
            loss = loss if label is None else loss + F.cross_entropy(scores, label)
        return loss, scores


class Net:
    def __init__(self):
        self.network = Network()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-3)

    def train_batch(self, x, label):
        self.optimizer.zero_grad()
        loss, _ = self.network(x, label)
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def predict(self, x):
        self.network.eval()
        scores = self.network(x)[1]
        self.network.train()
        return scores.argmax(1)


if __name__ == "__main__":
    digits.fit(Net())
