"""A plain list of convolution layers, each with train(x_pos, x_neg); goodness is the mean of squares of a sample, softplus by hand."""

import torch
from torch import nn

SHAPE, BATCH = (3, 32, 32), 16


class Layer(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.pool, self.threshold = nn.MaxPool2d(2), 2.0
        self.optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)

    def forward(self, x):
        x = x / (x.norm(2, dim=(1, 2, 3), keepdim=True) / x[0].numel() ** 0.5 + 1e-4)
        return self.pool(torch.relu(self.convolution(x)))

    def train(self, x_pos, x_neg):
        g_pos = self.forward(x_pos).pow(2).mean(dim=(1, 2, 3))
        g_neg = torch.mean(torch.square(self.forward(x_neg)), dim=(1, 2, 3))
        loss = torch.log(1 + torch.exp(torch.cat([-g_pos + self.threshold, g_neg - self.threshold]))).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            return self.forward(x_pos), self.forward(x_neg)


class Net(nn.Module):
    def __init__(self, channels=(3, 32, 64, 128)):
        super().__init__()
        self.layers = [Layer(a, b) for a, b in zip(channels, channels[1:], strict=False)]

    def train_batch(self, x, label):
        x_pos, x_neg = x, x.flip(3)
        for layer in self.layers:
            x_pos, x_neg = layer.train(x_pos, x_neg)
