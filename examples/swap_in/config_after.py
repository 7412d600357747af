"""A model built from a configuration, whose forward returns a loss for each layer; one optimiser for their sum."""

import math

import torch
from torch import nn

import fastff
from examples.swap_in import digits

CONFIG = {"channels": [1, 32, 32, 64, 64], "strides": [1, 1, 2, 1], "learning_rate": 1e-3}
OPTIONS = {"norm": None, "goodness": "sum_of_squares", "normalize": "rms"}


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList()
        for i, stride in enumerate(config["strides"]):
            a, b = config["channels"][i : i + 2]
            units = b * (32 // math.prod(config["strides"][: i + 1])) ** 2
            self.layers.append(fastff.nn.FFConv2d(a, b, 3, stride, theta=units, **OPTIONS))

    def normalize(self, z):
        return z / (z.pow(2).mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()

    def forward(self, inputs):
        output = {"loss": 0.0}
        z = self.normalize(inputs)
        for i, layer in enumerate(self.layers):
            z, output[f"loss_{i}"] = layer.local_step(z)
            output["loss"] = output["loss"] + output[f"loss_{i}"]
        return output


class Net:
    def __init__(self, config=CONFIG):
        self.model = Model(config)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config["learning_rate"])

    def train_batch(self, x, label):
        inputs = torch.cat(digits.positive_and_negative(x, label))
        output = self.model(inputs)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def predict(self, x):
        scores = []
        for label in range(digits.CLASSES):
            z, score = self.model.normalize(digits.overlay(x, torch.full((len(x),), label))), 0
            for layer in self.model.layers:
                z, g = layer(z)
                score = score + g[:, 0] / z[0].numel()
                z = self.model.normalize(z)
            scores.append(score)
        return torch.stack(scores, 1).argmax(1)


if __name__ == "__main__":
    digits.fit(Net())
