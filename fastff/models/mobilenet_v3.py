"""MobileNetV3 small and large (Howard et al. 2019, https://arxiv.org/abs/1905.02244).

The network is a convolution, 11 or 15 inverted residuals (expand 1x1, depthwise, squeeze-excite, project 1x1), a 1x1
convolution, the global average and a classifier of two linear layers. Parameter names are those of torchvision.
"""

from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from fastff.arguments import check_member, number_between, whole_number

ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish}

# Epsilon and momentum are those of the paper. Momentum 0.01 averages statistics over about 100 minibatches.
_norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)


class Row(NamedTuple):
    """One inverted residual, a row of the tables in the paper (numbers of channels for width_mult=1)."""

    kernel: int
    expanded: int
    out: int
    squeeze: bool
    activation: str
    stride: int


RE, HS = "relu", "hardswish"

LARGE = [
    Row(3, 16, 16, False, RE, 1), Row(3, 64, 24, False, RE, 2), Row(3, 72, 24, False, RE, 1),
    Row(5, 72, 40, True, RE, 2), Row(5, 120, 40, True, RE, 1), Row(5, 120, 40, True, RE, 1),
    Row(3, 240, 80, False, HS, 2), Row(3, 200, 80, False, HS, 1), Row(3, 184, 80, False, HS, 1),
    Row(3, 184, 80, False, HS, 1), Row(3, 480, 112, True, HS, 1), Row(3, 672, 112, True, HS, 1),
    Row(5, 672, 160, True, HS, 2), Row(5, 960, 160, True, HS, 1), Row(5, 960, 160, True, HS, 1),
]  # fmt: skip

SMALL = [
    Row(3, 16, 16, True, RE, 2), Row(3, 72, 24, False, RE, 2), Row(3, 88, 24, False, RE, 1),
    Row(5, 96, 40, True, HS, 2), Row(5, 240, 40, True, HS, 1), Row(5, 240, 40, True, HS, 1),
    Row(5, 120, 48, True, HS, 1), Row(5, 144, 48, True, HS, 1), Row(5, 288, 96, True, HS, 2),
    Row(5, 576, 96, True, HS, 1), Row(5, 576, 96, True, HS, 1),
]  # fmt: skip


def round_channels(channels: float) -> int:
    """Round `channels` to the nearest multiple of 8, but to at least 8 and to no less than 90 % of `channels`."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class ConvNormActivation(nn.Sequential):
    """Convolution without bias (padded to keep the resolution), batch norm, and an activation if one is named."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, activation: str | None = None
    ):  # fmt: skip
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        layers = [conv, _norm(out_channels)]
        if activation is not None:
            layers.append(ACTIVATIONS[activation](inplace=True))
        super().__init__(*layers)


class SqueezeExcite(nn.Module):
    """Scales each channel by a gate in [0, 1] that is computed from the channels' means: [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.activation = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.scale_activation = nn.Hardsigmoid(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc1(self.avgpool(x))
        return x * self.scale_activation(self.fc2(self.activation(gate)))


class InvertedResidual(nn.Module):
    """Inverted residual: expansion, depthwise convolution, squeeze-excite, projection: [B, C, H, W] -> [B, K, H / stride, W / stride].

    The input is added to the output if both have the same shape. The expansion is left out if it would add no channels."""

    def __init__(self, in_channels: int, expanded: int, out_channels: int, row: Row, activation: str):
        super().__init__()
        layers: list[nn.Module] = []
        if expanded != in_channels:
            layers.append(ConvNormActivation(in_channels, expanded, 1, activation=activation))
        layers.append(ConvNormActivation(expanded, expanded, row.kernel, row.stride, expanded, activation))
        if row.squeeze:
            layers.append(SqueezeExcite(expanded, round_channels(expanded / 4)))
        layers.append(ConvNormActivation(expanded, out_channels, 1))
        self.block = nn.Sequential(*layers)
        self.residual = row.stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


class MobileNetV3(nn.Module):
    """MobileNetV3 from a table of inverted residuals: images [B, in_channels, H, W] -> logits [B, num_classes].

    `rows` is the table and `hidden` the number of outputs of the classifier's first layer. The other arguments and the
    errors are those of `mobilenet_v3_small`."""

    def __init__(
        self, rows: list[Row], hidden: int, num_classes: int = 1000, stem: str = "imagenet", width_mult: float = 1.0,
        in_channels: int = 3, dropout: float = 0.2, activation: str | None = None,
    ):  # fmt: skip
        super().__init__()
        whole_number("num_classes", num_classes)
        whole_number("in_channels", in_channels)
        number_between("width_mult", width_mult, 0, float("inf"), low_allowed=False)
        number_between("dropout", dropout, 0, 1, low_allowed=True)
        check_member("stem", stem, ("imagenet", "cifar"))
        check_member("activation", activation, (None, *ACTIVATIONS))
        hard = activation or HS

        channels = round_channels(16 * width_mult)
        stride = 2 if stem == "imagenet" else 1
        features: list[nn.Module] = [ConvNormActivation(in_channels, channels, 3, stride, activation=hard)]
        for row in rows:
            expanded, out = round_channels(row.expanded * width_mult), round_channels(row.out * width_mult)
            features.append(InvertedResidual(channels, expanded, out, row, activation or row.activation))
            channels = out
        features.append(ConvNormActivation(channels, 6 * channels, 1, activation=hard))
        hidden = round_channels(hidden * width_mult)

        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(6 * channels, hidden), ACTIVATIONS[hard](inplace=True), nn.Dropout(dropout, inplace=True),
            nn.Linear(hidden, num_classes),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.flatten(self.avgpool(self.features(x))))


def mobilenet_v3_small(
    num_classes: int = 1000, stem: str = "imagenet", width_mult: float = 1.0, in_channels: int = 3, dropout: float = 0.2,
    activation: str | None = None,
) -> MobileNetV3:  # fmt: skip
    """MobileNetV3-small: images [B, in_channels, H, W] of any floating dtype -> logits [B, num_classes].

    Args:
        num_classes: number of outputs of the classifier, at least 1.
        stem: "imagenet" has stride 2 in the first convolution (output resolution H / 32). "cifar" has stride 1 there
            and stride 2 in inverted residuals 1, 2, 4 and 9, counted from 1 (H / 16).
        width_mult: factor that all numbers of channels are multiplied by; the results are rounded to multiples of 8.
        in_channels: number of channels of the images, 1 for grey images.
        dropout: probability of dropout before the last layer, in [0, 1).
        activation: "relu", "relu6" or "hardswish" for all activations except the gates. None is the choice of the
            paper: ReLU in the first blocks and hard-swish in the later ones.

    Raises ValueError for an argument out of range."""
    return MobileNetV3(SMALL, 1024, num_classes, stem, width_mult, in_channels, dropout, activation)


def mobilenet_v3_large(
    num_classes: int = 1000, stem: str = "imagenet", width_mult: float = 1.0, in_channels: int = 3, dropout: float = 0.2,
    activation: str | None = None,
) -> MobileNetV3:  # fmt: skip
    """MobileNetV3-large. It differs from `mobilenet_v3_small` in its 15 inverted residuals.

    With stem="cifar", inverted residuals 2, 4, 7 and 13, counted from 1, have stride 2 (output resolution H / 16)."""
    return MobileNetV3(LARGE, 1280, num_classes, stem, width_mult, in_channels, dropout, activation)
