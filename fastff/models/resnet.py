"""ResNet-18 and ResNet-34 (He et al. 2015, https://arxiv.org/abs/1512.03385).

A stem, four stages of residual blocks with `width`, 2, 4 and 8 times `width` channels, the global average and a linear
classifier. Stages 2 to 4 halve the resolution in their first block. Parameter names are torchvision's.
"""

from torch import Tensor, nn

from fastff.models.arguments import one_of, positive_int

ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [B, C, H, W] -> [B, K, H / stride, W / stride].

    The shortcut is the identity, or a strided 1x1 convolution where channels or resolution change.
    """

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
    """A residual network of basic blocks: images [B, in_channels, H, W] -> logits [B, num_classes].

    `depths` is the number of blocks of each of the four stages; for the rest see `resnet18`.
    """

    def __init__(
        self,
        depths: tuple[int, int, int, int],
        num_classes: int = 1000,
        stem: str = "imagenet",
        width: int = 64,
        in_channels: int = 3,
        activation: str = "relu",
    ):
        super().__init__()
        positive_int("num_classes", num_classes)
        positive_int("width", width)
        positive_int("in_channels", in_channels)
        one_of("stem", stem, ["imagenet", "cifar"])
        one_of("activation", activation, ACTIVATIONS)
        act = ACTIVATIONS[activation]

        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = act(inplace=True)
        # None rather than an Identity: a module that does nothing would show up as a layer of its own when cut.
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
    num_classes: int = 1000,
    stem: str = "imagenet",
    width: int = 64,
    in_channels: int = 3,
    activation: str = "relu",
) -> ResNet:
    """ResNet-18: images [B, in_channels, H, W] of any floating dtype -> logits [B, num_classes].

    Args:
        num_classes: outputs of the classifier, at least 1.
        stem: "imagenet" starts with a 7x7 convolution and a max pool, both of stride 2 (output resolution H / 32);
            "cifar" with a 3x3 convolution of stride 1 and no pool (H / 8), for images of 8 to about 96 pixels. Either
            way stages 2 to 4 keep their strides of 2.
        width: channels of the stem and the first stage; 64 as published. The last stage has 8 times as many.
        in_channels: channels of the images, 1 for grey ones.
        activation: "relu" as published, or "relu6".

    Raises:
        ValueError: an argument is out of range; the text names it, what was expected and what came.
    """
    return ResNet((2, 2, 2, 2), num_classes, stem, width, in_channels, activation)


def resnet34(
    num_classes: int = 1000,
    stem: str = "imagenet",
    width: int = 64,
    in_channels: int = 3,
    activation: str = "relu",
) -> ResNet:
    """ResNet-34: as `resnet18`, with 3, 4, 6 and 3 blocks in its stages."""
    return ResNet((3, 4, 6, 3), num_classes, stem, width, in_channels, activation)
