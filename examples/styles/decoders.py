"""Residual blocks whose local losses are small networks: one reconstructs the image, one classifies. backward runs inside forward."""

import torch
import torch.nn.functional as F
from torch import nn

SHAPE, BATCH, CLASSES = (3, 32, 32), 16, 10


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2, self.relu = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else None

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Decoder(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 3, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, x, image):
        x = F.interpolate(x, size=image.shape[2:], mode="bilinear", align_corners=True)
        return F.binary_cross_entropy(self.layers(x), image)


class Classifier(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 2 * channels, 3, 2, padding=1), nn.BatchNorm2d(2 * channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
            nn.Flatten(), nn.Linear(2 * channels, 64), nn.ReLU(), nn.Linear(64, CLASSES),
        )  # fmt: skip

    def forward(self, x, label):
        return F.cross_entropy(self.layers(x), label)


class Net(nn.Module):
    def __init__(self, width=16, blocks=5):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks, self.decoders, self.classifiers, inputs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList(), width
        for stage in range(3):
            for i in range(blocks):
                outputs = width << stage
                self.blocks.append(Residual(inputs, outputs, 2 if i == 0 and stage else 1))
                self.decoders.append(Decoder(outputs))
                self.classifiers.append(Classifier(outputs))
                inputs = outputs
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)

    def forward(self, x, label):
        image, x = x.sigmoid(), self.stem(x)
        for block, decoder, classifier in zip(self.blocks, self.decoders, self.classifiers, strict=True):
            x = block(x)
            loss = 0.3 * decoder(x, image) + classifier(x, label)
            loss.backward()
            x = x.detach()
        return loss.detach()

    def train_batch(self, x, label):
        self.optimizer.zero_grad()
        loss = self(x, label)
        self.optimizer.step()
        return loss
