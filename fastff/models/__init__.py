"""Convolutional networks to train: ordinary nn.Modules, written to be read, with the parameter names of torchvision."""

from fastff.models.mobilenet_v3 import MobileNetV3, mobilenet_v3_large, mobilenet_v3_small
from fastff.models.resnet import ResNet, resnet18, resnet34

__all__ = ["MobileNetV3", "ResNet", "mobilenet_v3_large", "mobilenet_v3_small", "resnet18", "resnet34"]
