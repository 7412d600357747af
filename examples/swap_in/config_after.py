"""A model built from a configuration, whose forward returns a loss for each layer; one optimiser for their sum."""

import torch
from torch import nn

import fastff
from examples.swap_in import digits

CONFIG = {"sizes": [1024, 1000, 1000, 1000], "learning_rate": 1e-3}


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList()
        for inputs, outputs in zip(config["sizes"], config["sizes"][1:], strict=False):
            layer = fastff.nn.FFLinear(inputs, outputs, goodness="sum_of_squares", theta=outputs, normalize="rms")
            layer.optimizer = torch.optim.Adam(layer.parameters(), config["learning_rate"], fused=True)
            self.layers.append(layer)

    def normalize(self, z):
        return z / (z.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()

    def forward(self, inputs, labels):
        output = {"loss": 0.0}
        z = self.normalize(inputs)
        for i, layer in enumerate(self.layers):
            z, output[f"loss_{i}"] = layer.local_step(z)
            output["loss"] = output["loss"] + output[f"loss_{i}"]
            layer.optimizer.step()
            layer.optimizer.zero_grad()
        return output


class Net:
    def __init__(self, config=CONFIG):
        self.model = Model(config)

    def train_batch(self, x, label):
        inputs = torch.cat(digits.positive_and_negative(x, label, digits.squares)).flatten(1)
        labels = torch.cat([torch.ones(len(x)), torch.zeros(len(x))])
        self.model(inputs, labels)

    @torch.no_grad()
    def predict(self, x):
        scores = []
        for label in range(digits.CLASSES):
            z, score = self.model.normalize(digits.squares(x, torch.full((len(x),), label)).flatten(1)), 0
            for layer in self.model.layers:
                z, g = layer(z)
                score = score + g[:, 0]
                z = self.model.normalize(z)
            scores.append(score)
        return torch.stack(scores, 1).argmax(1)


if __name__ == "__main__":
    digits.fit(Net())
