"""The most copied program: fully connected layers in a plain list that normalise by length, with softplus written by hand."""

import torch
from torch import nn

SHAPE, BATCH = (784,), 256


class Layer(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.relu, self.threshold = nn.ReLU(), 2.0
        self.optimizer = torch.optim.Adam(self.parameters(), lr=0.03)

    def forward(self, x):
        direction = x / (x.norm(2, 1, keepdim=True) + 1e-4)
        return self.relu(torch.mm(direction, self.weight.T) + self.bias.unsqueeze(0))

    def train(self, x_pos, x_neg):
        g_pos = self.forward(x_pos).pow(2).mean(1)
        g_neg = self.forward(x_neg).pow(2).mean(1)
        loss = torch.log(1 + torch.exp(torch.cat([-g_pos + self.threshold, g_neg - self.threshold]))).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return self.forward(x_pos).detach(), self.forward(x_neg).detach()


class Net(nn.Module):
    def __init__(self, sizes=(784, 500, 500)):
        super().__init__()
        self.layers = [Layer(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]

    def train_batch(self, x, label):
        x_pos, x_neg = x, x.roll(1, 1)
        for layer in self.layers:
            x_pos, x_neg = layer.train(x_pos, x_neg)
