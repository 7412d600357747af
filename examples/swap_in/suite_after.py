"""A suite of convolution layers trained by run_train(x_pos, x_neg), with a loss on the difference of the two goodnesses."""

import torch

import fastff
from examples.swap_in import digits


class Layer(fastff.nn.FFConv2d):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__(inputs, outputs, 5, stride, norm=None, goodness="mean_of_squares", loss="symba", alpha=4.0)
        self.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)

    def run_train(self, x_pos, x_neg):
        y, loss = self.local_step(torch.cat([x_pos, x_neg]))
        self.optimizer.step()
        self.optimizer.zero_grad()
        return y.chunk(2)

    @torch.no_grad()
    def run(self, x):
        y, g = self.forward(x)
        return self.next_input(y), g


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
