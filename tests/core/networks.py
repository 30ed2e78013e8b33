"""Networks of every topology the analysis must know, small ones of every kind, and one that has many of them."""

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import torchvision
from _pytest.mark import ParameterSet
from torch import Tensor, nn

from experiments.models.cifar import RESNET_BLOCKS, RESNET_WIDTHS, VGG, VGG16_WIDTHS, ResNet
from experiments.schema import Shortcut
from psap_core.groups import ChannelGroup, Scope

SCOPES: tuple[Scope, ...] = ("coupled", "all", "inner")


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


# Filters of Small's groups.
SMALL_FILTERS: dict[Scope, dict[str, int]] = {
    "coupled": {"stem": 6, "inner": 8, "expand": 10, "project": 7, "last": 5},
    "all": {"stem": 6, "inner": 8, "outer": 6, "expand": 10, "project": 7, "last": 5},
    "inner": {"inner": 8, "expand": 10, "last": 5},
}


def small_example() -> Tensor:
    return torch.zeros(1, 3, 8, 8)


# ---------------------------------------------------------------------------- one network a kind of silencer


def chain(**parts: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(parts))


def conv(inputs: int, outputs: int, kernel: int = 3, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)


def conv_norm(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    return chain(conv=conv(inputs, outputs, kernel), norm=nn.BatchNorm2d(outputs))


def head(width: int) -> nn.Sequential:
    return chain(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), linear=nn.Linear(width, 3))


def own_batch_norm() -> nn.Module:
    return chain(
        conv=conv(3, 8),
        norm=nn.BatchNorm2d(8),
        act=nn.ReLU(),
        reader=conv(8, 6),
        reader_norm=nn.BatchNorm2d(6),
        reader_act=nn.ReLU(),
        head=head(6),
    )


def depthwise_followed() -> nn.Module:
    return chain(
        conv=conv(3, 8),
        norm=nn.BatchNorm2d(8),
        act=nn.ReLU6(),
        depthwise=nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        depthwise_norm=nn.BatchNorm2d(8),
        depthwise_act=nn.ReLU6(),
        head=head(8),
    )


def grouped() -> nn.Module:
    """A filter is a group: two rows of the first convolution, three of the grouped one."""
    return chain(
        conv=conv(3, 10),
        norm=nn.BatchNorm2d(10),
        act=nn.ReLU(),
        grouped=nn.Conv2d(10, 15, 3, padding=1, groups=5, bias=False),
        grouped_norm=nn.BatchNorm2d(15),
        grouped_act=nn.ReLU(),
        head=head(15),
    )


class DenselyConnected(nn.Module):
    """DenseNet's order: every layer normalises all that came before, and adds its channels to it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 6)
        self.norm1, self.conv1 = nn.BatchNorm2d(6), conv(6, 4)
        self.norm2, self.conv2 = nn.BatchNorm2d(10), conv(10, 4)
        self.norm3 = nn.BatchNorm2d(14)
        self.head = head(14)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(F.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(F.relu(self.norm2(x)))], 1)
        logits: Tensor = self.head(F.relu(self.norm3(x)))
        return logits


def group_norm() -> nn.Module:
    """A filter is a group of two channels."""
    return chain(
        conv=conv(3, 10),
        norm=nn.GroupNorm(5, 10),
        act=nn.ReLU(),
        reader=conv(10, 6, bias=True),
        reader_act=nn.ReLU(),
        head=head(6),
    )


def no_norm() -> nn.Module:
    return chain(
        conv=conv(3, 8, bias=True),
        act=nn.ReLU(),
        reader=conv(8, 6),
        reader_act=nn.ReLU(),
        head=head(6),
    )


def hidden_linear() -> nn.Module:
    return chain(
        flatten=nn.Flatten(),
        hidden=nn.Linear(3 * 8 * 8, 10),
        act=nn.GELU(),
        second=nn.Linear(10, 8, bias=False),
        second_act=nn.ReLU(),
        linear=nn.Linear(8, 3),
    )


class Stream(nn.Module):
    """Four layers write the residual stream, and two of them read it too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 6)
        self.first = conv_norm(6, 6)
        self.inner = conv_norm(6, 8)
        self.second = conv_norm(8, 6)
        self.third = conv_norm(6, 6, kernel=1)
        self.head = head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.first(x))
        x = F.relu(x + self.second(F.relu(self.inner(x))))
        logits: Tensor = self.head(F.relu(x + self.third(x)))
        return logits


class SqueezeAndExcite(nn.Module):
    """The gate is written by another layer than what it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(3, 8), nn.BatchNorm2d(8)
        self.squeeze, self.excite = conv(8, 4, 1, bias=True), conv(4, 8, 1, bias=True)
        self.reader, self.reader_norm = conv(8, 6), nn.BatchNorm2d(6)
        self.head = head(6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.conv(x)))
        gate = F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))
        x = x * torch.sigmoid(self.excite(gate))
        logits: Tensor = self.head(F.relu(self.reader_norm(self.reader(x))))
        return logits


def transposed() -> nn.Module:
    return chain(
        conv=conv(3, 8, bias=True),
        act=nn.ReLU(),
        up=nn.ConvTranspose2d(8, 6, 2, stride=2),
        up_norm=nn.BatchNorm2d(6),
        up_act=nn.ReLU(),
        head=head(6),
    )


@dataclass(frozen=True)
class Kind:
    """A small network for images [N, 3, 8, 8] and three classes.

    Attributes:
        group: the group in question, in scope `coupled`.
        filters: how many it has.
        writers, silencers: names of the weights that write it, and of what silences its filters.
        scopes: in which it has groups of its own; without a sum they are the same in all scopes.
    """

    make: Callable[[], nn.Module]
    group: str
    filters: int
    writers: tuple[str, ...]
    silencers: tuple[str, ...]
    scopes: tuple[Scope, ...] = ("coupled",)


def affine(*norms: str) -> tuple[str, ...]:
    return tuple(f"{norm}.{part}" for norm in norms for part in ("weight", "bias"))


KINDS = {
    "own_batch_norm": Kind(own_batch_norm, "conv", 8, ("conv.weight",), affine("norm")),
    "depthwise_followed": Kind(
        depthwise_followed, "conv", 8, ("conv.weight",), affine("depthwise_norm")
    ),
    "grouped": Kind(grouped, "conv", 5, ("conv.weight",), affine("grouped_norm")),
    "densely_connected": Kind(
        DenselyConnected, "stem", 6, ("stem.weight",), affine("norm1", "norm2", "norm3")
    ),
    "group_norm": Kind(group_norm, "conv", 5, ("conv.weight",), affine("norm")),
    "no_norm": Kind(no_norm, "conv", 8, ("conv.weight",), affine("conv")),
    "hidden_linear": Kind(
        hidden_linear,
        "hidden",
        10,
        ("hidden.weight",),
        affine("hidden"),
    ),
    "stream": Kind(
        Stream,
        "stem.conv",
        6,
        ("stem.conv.weight", "first.conv.weight", "second.conv.weight", "third.conv.weight"),
        affine("stem.norm", "first.norm", "second.norm", "third.norm"),
        scopes=("coupled", "all"),
    ),
    "squeeze_and_excite": Kind(
        SqueezeAndExcite, "conv", 8, ("conv.weight", "excite.weight"), affine("norm")
    ),
    "transposed": Kind(transposed, "up", 6, ("up.weight",), affine("up_norm")),
}
SMALL_NETWORKS = {"small": Small, **{name: kind.make for name, kind in KINDS.items()}}
KINDS_AND_SCOPES = [(name, scope) for name, kind in KINDS.items() for scope in kind.scopes]
SMALL_NETWORKS_AND_SCOPES = [*(("small", scope) for scope in SCOPES), *KINDS_AND_SCOPES]


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 0) -> None:
    """He's weights, random affines, biases and statistics: no signal fades, and nothing is 0 or 1 by chance."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
        if tensor.ndim > 1:
            nn.init.kaiming_normal_(tensor, generator=generator)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.sub_(1.0)


def draw_filters(
    groups: Sequence[ChannelGroup], share: float = 0.3, seed: int = 0
) -> dict[str, list[int]]:
    """A random share of every group's filters, at least one."""
    generator = random.Random(seed)
    return {
        group.name: sorted(
            generator.sample(range(group.filters), max(1, int(share * group.filters)))
        )
        for group in groups
    }


# ---------------------------------------------------------------------------- real networks


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
