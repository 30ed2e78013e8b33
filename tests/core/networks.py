"""Networks of every topology the analysis must know, and a small one that has them all."""

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
import torchvision
from _pytest.mark import ParameterSet
from torch import Tensor, nn

from experiments.harness.models import RESNET_BLOCKS, RESNET_WIDTHS, VGG, VGG16_WIDTHS, ResNet
from experiments.schema import Shortcut


class Small(nn.Module):
    """Stem and residual block, a depthwise-separable part, a projection shortcut, a flattened linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 8, 3, padding=1)
        self.inner_bn = nn.BatchNorm2d(8)
        self.outer = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.outer_bn = nn.BatchNorm2d(6)
        self.expand = nn.Conv2d(6, 10, 1, bias=False)
        self.expand_bn = nn.BatchNorm2d(10)
        self.depthwise = nn.Conv2d(10, 10, 3, stride=2, padding=1, groups=10, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(10)
        self.project = nn.Conv2d(10, 7, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(7)
        self.shortcut = nn.Conv2d(6, 7, 1, stride=2, bias=False)
        self.shortcut_bn = nn.BatchNorm2d(7)
        self.last = nn.Conv2d(7, 5, 3, padding=1, bias=False)
        self.last_bn = nn.BatchNorm2d(5)
        self.linear = nn.Linear(5 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        x = F.relu(x + self.outer_bn(self.outer(F.relu(self.inner_bn(self.inner(x))))))
        branch = F.relu6(self.depthwise_bn(self.depthwise(F.relu6(self.expand_bn(self.expand(x))))))
        x = self.project_bn(self.project(branch)) + self.shortcut_bn(self.shortcut(x))
        x = F.max_pool2d(F.relu(self.last_bn(self.last(x))), 2)
        logits: Tensor = self.linear(x.view(x.size(0), -1))
        return logits


SMALL_LAYERS = {
    "stem": "residual",
    "inner": "inner",
    "outer": "residual",
    "expand": "inner",
    "project": "residual",
    "last": "inner",
}


def small_example() -> Tensor:
    return torch.zeros(1, 3, 8, 8)


def cifar_resnet(name: str, shortcut: Shortcut = Shortcut.option_a) -> nn.Module:
    return ResNet(RESNET_BLOCKS[name], RESNET_WIDTHS, shortcut, channels=3, classes=10)


# name: (maker, input side, prunable layers, inner layers)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int, int]] = {
    **{
        f"cifar_{name}": (lambda name=name: cifar_resnet(name), 32, 6 * blocks + 1, 3 * blocks)  # type: ignore[misc]
        for name, blocks in RESNET_BLOCKS.items()
    },
    "cifar_resnet20_projection": (lambda: cifar_resnet("resnet20", Shortcut.projection), 32, 19, 9),
    "cifar_vgg16_bn": (lambda: VGG(VGG16_WIDTHS, 3, 10), 32, 13, 13),
    "vgg16_bn": (
        lambda: torchvision.models.vgg16_bn(num_classes=10, init_weights=False),
        32,
        13,
        13,
    ),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=10), 64, 17, 8),
    "resnet34": (lambda: torchvision.models.resnet34(num_classes=10), 64, 33, 16),
    "resnet50": (lambda: torchvision.models.resnet50(num_classes=10), 64, 49, 33),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=10), 64, 35, 20),
}
# One network per topology: option A, projections and bottlenecks, flattened, depthwise.
TOPOLOGIES = [
    "cifar_resnet20",
    "cifar_resnet20_projection",
    "resnet50",
    "cifar_vgg16_bn",
    "mobilenet_v2",
]


def by_topology(names: Iterable[str] = NETWORKS) -> list[ParameterSet]:
    """The networks as test parameters: one per topology in the quick tests, the others in the long ones."""
    return [
        pytest.param(name, marks=() if name in TOPOLOGIES else pytest.mark.long) for name in names
    ]


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)


def loss_on(
    model: nn.Module, side: int, batch: int = 8, classes: int = 3, seed: int | None = None
) -> Tensor:
    """Cross entropy on random images; `seed` fixes the batch whatever the default generator's state is."""
    generator = torch.default_generator if seed is None else torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, side, side, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    dtype = next(model.parameters()).dtype
    return F.cross_entropy(model(images.to(dtype)), labels)


def train_(
    model: nn.Module, optimizer: torch.optim.Optimizer, side: int, steps: int, classes=3, batch=8
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_on(model, side, batch, classes).backward()
        optimizer.step()
