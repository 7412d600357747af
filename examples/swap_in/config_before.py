"""A model built from a configuration, whose forward returns a loss for each layer; one optimiser for their sum."""

import torch
import torch.nn.functional as F
from torch import nn

from examples.swap_in import digits

CONFIG = {"sizes": [1024, 1000, 1000, 1000], "learning_rate": 1e-3}


class Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.layers = nn.ModuleList()
        for inputs, outputs in zip(config["sizes"], config["sizes"][1:], strict=False):
            self.layers.append(nn.Linear(inputs, outputs))

    def normalize(self, z):
        return z / (z.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()

    def forward(self, inputs, labels):
        output = {"loss": 0.0}
        z = self.normalize(inputs)
        for i, layer in enumerate(self.layers):
            z = torch.relu(layer(z))
            logits = z.pow(2).sum(1) - z.shape[1]
            output[f"loss_{i}"] = F.binary_cross_entropy_with_logits(logits, labels)
            output["loss"] = output["loss"] + output[f"loss_{i}"]
            z = self.normalize(z.detach())
        return output


class Net:
    def __init__(self, config=CONFIG):
        self.model = Model(config)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config["learning_rate"])

    def train_batch(self, x, label):
        inputs = torch.cat(digits.positive_and_negative(x, label, digits.squares)).flatten(1)
        labels = torch.cat([torch.ones(len(x)), torch.zeros(len(x))])
        output = self.model(inputs, labels)
        self.optimizer.zero_grad()
        output["loss"].backward()
        self.optimizer.step()

    @torch.no_grad()
    def predict(self, x):
        scores = []
        for label in range(digits.CLASSES):
            z, score = self.model.normalize(digits.squares(x, torch.full((len(x),), label)).flatten(1)), 0
            for layer in self.model.layers:
                z = torch.relu(layer(z))
                score = score + z.pow(2).sum(1)
                z = self.model.normalize(z)
            scores.append(score)
        return torch.stack(scores, 1).argmax(1)


if __name__ == "__main__":
    digits.fit(Net())
