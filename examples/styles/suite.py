"""A suite of fully connected layers trained together by run_train_combined(x_pos, x_neg): each layer's own optimizer, no detach."""

import torch
from torch import nn

SHAPE, BATCH = (784,), 128


class Goodness(nn.Module):
    def forward(self, z):
        return z.pow(2).mean(1)


class Layer(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.goodness, self.theta = Goodness(), 2.0
        self.optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)

    def forward(self, x):
        x = x / (x.norm(2, 1, keepdim=True) + 1e-4)
        return torch.relu(super().forward(x))

    def run_train(self, x_pos, x_neg):
        g_pos, g_neg = self.goodness(self(x_pos)), self.goodness(self(x_neg))
        loss = torch.log(1 + torch.exp(torch.cat([self.theta - g_pos, g_neg - self.theta]))).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class Net(nn.Module):
    def __init__(self, sizes=(794, 800, 800)):
        super().__init__()
        self.layers = nn.ModuleList(Layer(a, b) for a, b in zip(sizes, sizes[1:], strict=False))

    def train_batch(self, x, label):
        x_pos, x_neg = torch.cat([x, x[:, :10]], 1), torch.cat([x, x[:, 10:20]], 1)
        for layer in self.layers:
            layer.run_train(x_pos, x_neg)
            with torch.no_grad():
                x_pos, x_neg = layer(x_pos), layer(x_neg)
