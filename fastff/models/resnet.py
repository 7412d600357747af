"""ResNet-18 and ResNet-34 (He et al. 2015, https://arxiv.org/abs/1512.03385).

The network is a stem, four stages of residual blocks with `width`, 2, 4 and 8 times `width` channels, the global average
and a linear classifier. Stages 2 to 4 halve the resolution in their first block. Parameter names are those of torchvision.
"""

from torch import Tensor, nn

from fastff.arguments import check_member, whole_number

ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6}


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions: [B, C, H, W] -> [B, K, H / stride, W / stride].

       The shortcut is the identity, or a strided 1x1 convolution if the number of channels or the resolution changes.
    `stride` is that of
       the first convolution and of the shortcut, `activation` is nn.ReLU or nn.ReLU6."""

    def __init__(self, in_channels: int, channels: int, stride: int, activation: type[nn.Module]):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = activation(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))
        self.relu2 = activation(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        return self.relu2(x + shortcut)


class ResNet(nn.Module):
    """Residual network of basic blocks: images [B, in_channels, H, W] -> logits [B, num_classes].

    `depths` is the number of blocks in each of the four stages. The other arguments and the errors are those of `resnet18`."""

    def __init__(
        self, depths: tuple[int, int, int, int], num_classes: int = 1000, stem: str = "imagenet", width: int = 64,
        in_channels: int = 3, activation: str = "relu",
    ):  # fmt: skip
        super().__init__()
        whole_number("num_classes", num_classes)
        whole_number("width", width)
        whole_number("in_channels", in_channels)
        check_member("stem", stem, ("imagenet", "cifar"))
        check_member("activation", activation, ACTIVATIONS)
        act = ACTIVATIONS[activation]

        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(in_channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = act(inplace=True)
        # None and not nn.Identity: SFF would count a module that does nothing as a layer when it cuts the network.
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "imagenet" else None

        self.layer1 = _stage(width, width, depths[0], 1, act)
        self.layer2 = _stage(width, 2 * width, depths[1], 2, act)
        self.layer3 = _stage(2 * width, 4 * width, depths[2], 2, act)
        self.layer4 = _stage(4 * width, 8 * width, depths[3], 2, act)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(8 * width, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.flatten(self.avgpool(x)))


def _stage(in_channels: int, channels: int, depth: int, stride: int, activation: type[nn.Module]) -> nn.Sequential:
    blocks = [BasicBlock(in_channels, channels, stride, activation)]
    blocks += [BasicBlock(channels, channels, 1, activation) for _ in range(depth - 1)]
    return nn.Sequential(*blocks)


def resnet18(
    num_classes: int = 1000, stem: str = "imagenet", width: int = 64, in_channels: int = 3, activation: str = "relu"
) -> ResNet:
    """ResNet-18: images [B, in_channels, H, W] of any floating dtype -> logits [B, num_classes].

    Args:
        num_classes: number of outputs of the classifier, at least 1.
        stem: "imagenet" starts with a 7x7 convolution and max pooling, both with stride 2 (output resolution H / 32).
            "cifar" starts with a 3x3 convolution of stride 1 and has no pooling (H / 8), for images of 8 to about 96
            pixels. Stages 2 to 4 have stride 2 in both cases.
        width: number of channels of the stem and the first stage; the paper has 64. The last stage has 8 times as many.
        in_channels: number of channels of the images, 1 for grey images.
        activation: "relu" as in the paper, or "relu6".

    Raises ValueError for an argument out of range."""
    return ResNet((2, 2, 2, 2), num_classes, stem, width, in_channels, activation)


def resnet34(
    num_classes: int = 1000, stem: str = "imagenet", width: int = 64, in_channels: int = 3, activation: str = "relu"
) -> ResNet:
    """ResNet-34. It differs from `resnet18` in the number of blocks in its stages: 3, 4, 6 and 3."""
    return ResNet((3, 4, 6, 3), num_classes, stem, width, in_channels, activation)
