"""He et al.'s CIFAR ResNets, and VGG-16 with BatchNorm, for any image size; initialised as by He et al., fan in."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models.initialisation import initialise_
from experiments.schema import Fan, Shortcut

# Blocks of each stage.
RESNET_BLOCKS = {
    "resnet20": 3,
    "resnet32": 5,
    "resnet44": 7,
    "resnet56": 9,
    "resnet110": 18,
}
RESNET_WIDTHS = (16, 32, 64)
VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class OptionA(nn.Module):
    """Shortcut without parameters: every stride-th pixel; missing channels are zeros, half on each side.

    Channels go to their places by a constant matrix [width, inputs] of ones and zeros, which is exact. So channels of
    either side can be pruned: a column or a row of it goes.
    """

    weight: Tensor

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        before = (width - inputs) // 2
        places = F.pad(torch.eye(inputs), (0, 0, before, width - inputs - before))
        self.register_buffer("weight", places, persistent=False)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        pixels = x[:, :, :: self.stride, :: self.stride].movedim(1, -1)
        return F.linear(pixels, self.weight).movedim(-1, 1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [N, inputs, H, W] -> [N, width, H / stride, W / stride]."""

    def __init__(self, inputs: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module
        if stride == 1 and inputs == width:
            self.shortcut = nn.Identity()
        elif shortcut is Shortcut.option_a:
            self.shortcut = OptionA(inputs, width, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet (He et al. 2016): a stem and three stages of `blocks` basic blocks."""

    def __init__(
        self, blocks: int, widths: tuple[int, ...], shortcut: Shortcut, channels: int, classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs, stages = widths[0], []
        for stage, width in enumerate(widths):
            strides = [2 if stage else 1] + [1] * (blocks - 1)
            stages.append(
                nn.Sequential(
                    *(
                        BasicBlock(width if i else inputs, width, stride, shortcut)
                        for i, stride in enumerate(strides)
                    )
                )
            )
            inputs = width
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(inputs, classes)
        initialise_(self, Fan("in"))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean([2, 3]))
        return logits


class VGG(nn.Module):
    """VGG-16 with BatchNorm for CIFAR: 13 convolutions, max-pooling between the stages, one linear layer."""

    def __init__(self, widths: tuple[tuple[int, ...], ...], channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage, stage_widths in enumerate(widths):
            if stage:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            for width in stage_widths:
                layers += [
                    nn.Conv2d(channels, width, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, classes)
        initialise_(self, Fan("in"))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.features(x).mean([2, 3]))
        return logits
