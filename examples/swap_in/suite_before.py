"""A suite of convolution layers trained by run_train(x_pos, x_neg), with a loss on the difference of the two goodnesses."""

import torch
import torch.nn.functional as F
from torch import nn

from examples.swap_in import digits


class Layer(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 5, stride, padding=2)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        self.alpha = 4.0

    def forward(self, x):
        return torch.relu(self.convolution(x))

    def goodness(self, y):
        return y.pow(2).mean((1, 2, 3))

    def run_train(self, x_pos, x_neg):
        y_pos, y_neg = self.forward(x_pos), self.forward(x_neg)
        loss = F.softplus(-self.alpha * (self.goodness(y_pos) - self.goodness(y_neg))).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return self.run(x_pos)[0], self.run(x_neg)[0]

    @torch.no_grad()
    def run(self, x):
        y = self.forward(x)
        return F.layer_norm(y, y.shape[1:]), self.goodness(y)


class Net:
    def __init__(self, channels=(1, 32, 64, 64), strides=(2, 1, 2)):
        self.suite = [Layer(a, b, s) for a, b, s in zip(channels, channels[1:], strides, strict=False)]

    def train_batch(self, x, label):
        x_pos, x_neg = digits.positive_and_negative(x, label, digits.waves)
        for layer in self.suite:
            x_pos, x_neg = layer.run_train(x_pos, x_neg)

    def predict(self, x):
        scores = []
        for label in range(digits.CLASSES):
            h, score = digits.waves(x, torch.full((len(x),), label)), 0
            for layer in self.suite:
                h, g = layer.run(h)
                score = score + g.flatten()
            scores.append(score)
        return torch.stack(scores, 1).argmax(1)


if __name__ == "__main__":
    digits.fit(Net())
