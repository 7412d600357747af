"""A list of fully connected layers, each with its own optimiser, trained by train(x_pos, x_neg)."""

import torch

import fastff
from examples.swap_in import digits


class Layer(fastff.nn.FFLinear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, goodness="mean_of_squares", theta=2.0, normalize=None)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=3e-3, fused=True)

    def goodness(self, x):
        y, g = self.forward(fastff.functional.normalize(x, "rms"))
        return y, g[:, 0]

    def train(self, x_pos, x_neg):
        y, loss = self.local_step(fastff.functional.normalize(torch.cat([x_pos, x_neg]), "rms"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return y.chunk(2)


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
