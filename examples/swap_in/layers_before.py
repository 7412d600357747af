"""A list of fully connected layers, each with its own optimiser, trained by train(x_pos, x_neg)."""

import torch
import torch.nn.functional as F
from torch import nn

from examples.swap_in import digits


class Layer(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.threshold = 2.0
        self.optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)

    def forward(self, x):
        x = x / (x.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
        return torch.relu(super().forward(x))

    def goodness(self, x):
        y = self.forward(x)
        return y, y.pow(2).mean(1)

    def train(self, x_pos, x_neg):
        g_pos = self.forward(x_pos).pow(2).mean(1)
        g_neg = self.forward(x_neg).pow(2).mean(1)
        loss = F.softplus(torch.cat([self.threshold - g_pos, g_neg - self.threshold])).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return self.forward(x_pos).detach(), self.forward(x_neg).detach()


class Net:
    def __init__(self, sizes=(1024, 1000, 1000, 1000)):
        self.layers = [Layer(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]

    def train_batch(self, x, label):
        x_pos, x_neg = (h.flatten(1) for h in digits.positive_and_negative(x, label, digits.squares))
        for layer in self.layers:
            x_pos, x_neg = layer.train(x_pos, x_neg)

    @torch.no_grad()
    def predict(self, x):
        scores = []
        for label in range(digits.CLASSES):
            h, score = digits.squares(x, torch.full((len(x),), label)).flatten(1), 0
            for layer in self.layers:
                h, g = layer.goodness(h)
                score = score + g
            scores.append(score)
        return torch.stack(scores, 1).argmax(1)


if __name__ == "__main__":
    digits.fit(Net())
