"""Networks of seven kinds learn the handwritten digits from scratch while 60 % of their MACs go.

Each meets its budget, exports what it computes, and stays within reach of the dense network of the same training:
`pytest -m long -s tests/core/test_learning.py` prints the figures.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from psap_core import PSAP, export, export_error, macs
from psap_core.inputs import call

EPOCHS, BATCH, TEST, CUT = 20, 64, 360, 0.6
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 0.05, 0.9, nesterov=True, weight_decay=5e-4),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01),
}  # fmt: skip


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(nn.Module):
    """Stem, body, head over the mean: [N, 1, 8, 8] -> [N, 10]."""

    def __init__(self, body: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.stem, self.body, self.head = conv(1, width), body, nn.Linear(outputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class Dense(nn.Module):
    """DenseNet's layer: BatchNorm before the convolution, its output beside its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = (
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(conv(width, width), conv(width, width))
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, width, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return F.relu(x + y * self.gate(y))


class ResNeXt(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            conv(width, width, 1), conv(width, width, groups=8),
            nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.block(x))


class ConvNeXt(nn.Module):
    """Depthwise, LayerNorm over channels, a hidden layer, layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


class UNet(nn.Module):
    """[N, 1, 8, 8] -> [N, 1, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.bottom = conv(1, 24), nn.Sequential(conv(24, 48), conv(48, 48))
        self.up = nn.ConvTranspose2d(48, 24, 2, stride=2)
        self.out = nn.Sequential(conv(48, 24), nn.Conv2d(24, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        top = self.top(x)
        return self.out(torch.cat([top, self.up(self.bottom(F.max_pool2d(top, 2)))], 1))


class Halves(nn.Module):
    """The upper and the lower half of a digit through one backbone, named inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(1, 24), conv(24, 32), conv(32, 32))
        self.head = nn.Linear(64, 10)

    def forward(self, upper: Tensor, lower: Tensor) -> dict[str, Tensor]:
        features = [self.backbone(half).mean((2, 3)) for half in (upper, lower)]
        return {"logits": self.head(torch.cat(features, 1))}


def plain_vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 24), (24, 24), (24, 48), (48, 48)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(
        *layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48 * 16, 64), nn.ReLU(), nn.Linear(64, 10)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "DenseNet-like": lambda: Classifier(
        nn.Sequential(*[Dense(24 + 12 * i, 12) for i in range(4)], conv(72, 48)), 24, 48
    ),
    "SE-like": lambda: Classifier(nn.Sequential(SqueezeExcite(32), SqueezeExcite(32)), 32, 32),
    "ResNeXt-like": lambda: Classifier(nn.Sequential(*[ResNeXt(64) for _ in range(3)]), 64, 64),
    "VGG without BatchNorm": plain_vgg,
    "ConvNeXt-like": lambda: Classifier(nn.Sequential(*[ConvNeXt(32) for _ in range(3)]), 32, 32),
    "U-Net": UNet,
    "two inputs, dict output": Halves,
}  # fmt: skip


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797, 1, 8, 8] in [0, 1] and labels, shuffled by a fixed seed."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    return images, torch.tensor(data.target)[order]


def inputs_of(model: nn.Module, images: Tensor) -> Any:
    if isinstance(model, Halves):
        return {"upper": images[:, :, :4], "lower": images[:, :, 4:]}
    if isinstance(model, UNet):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(len(images)))
        return images + 0.3 * noise
    return images


def loss_and_hits(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the share of right answers: classes, or pixels of the clean image's ink."""
    output = call(model, inputs_of(model, images))
    logits = output["logits"] if isinstance(output, dict) else output
    if isinstance(model, UNet):
        ink = (images > 0.5).float()
        return F.binary_cross_entropy_with_logits(logits, ink), (
            (logits > 0) == (ink > 0)
        ).float().mean()
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


def train(name: str, optimizer_name: str, cut: float) -> tuple[nn.Module, PSAP, float]:
    """The trained network, its pruner, and the share of right answers on the test images, in percent."""
    torch.manual_seed(1)
    model = NETWORKS[name]()
    images, labels = digits()
    optimizer = OPTIMIZERS[optimizer_name](model)
    example = inputs_of(model, images[:2])
    pruner = PSAP(
        model,
        optimizer,
        example,
        target_macs_cut=cut,
        total_epochs=EPOCHS,
        scope="coupled",
        pulse_batches=5,
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)

    def loss_of_batch(rows: Tensor) -> Tensor:
        return loss_and_hits(model, images[rows], labels[rows])[0]

    for epoch in range(EPOCHS):
        model.train()
        generator = torch.Generator().manual_seed(epoch)
        batches = (TEST + torch.randperm(len(images) - TEST, generator=generator)).split(BATCH)
        for rows in batches:
            optimizer.zero_grad()
            loss_of_batch(rows).backward()
            optimizer.step()
        pruner.end_epoch(batches, loss_of_batch)
        scheduler.step()
        if epoch + 1 == pruner.schedule.freeze and cut > 0:
            pruner.compact_()
    model.eval()
    with torch.no_grad():
        _, hits = loss_and_hits(model, images[:TEST], labels[:TEST])
    return model, pruner, 100 * hits.item()


@pytest.mark.long
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_kind_of_network_learns_while_it_is_pruned(name: str, optimizer: str) -> None:
    model, pruner, pruned = train(name, optimizer, CUT)
    _, _, dense = train(name, optimizer, 0.0)
    example = inputs_of(model, digits()[0][:2])
    assert macs(model, example) == pruner.plan.macs
    assert pruner.plan.macs <= (1 - CUT) * pruner.plan.dense_macs
    print(
        f"\n{name}, {optimizer}: dense {dense:.2f} %, pruned by {pruner.plan.macs_cut:.1%} {pruned:.2f} %"
    )
    assert dense > 90
    assert pruned > dense - 4


@pytest.mark.parametrize("name", NETWORKS)
def test_its_masked_network_is_the_exported_one(name: str) -> None:
    torch.manual_seed(1)
    model = NETWORKS[name]()
    images, labels = digits()
    optimizer = OPTIMIZERS["adamw"](model)
    example = inputs_of(model, images[:2])
    pruner = PSAP(
        model,
        optimizer,
        example,
        target_macs_cut=CUT,
        total_epochs=2,
        scope="coupled",
        pulse_batches=2,
    )
    for epoch in range(2):
        optimizer.zero_grad()
        loss_and_hits(model, images[:64], labels[:64])[0].backward()
        optimizer.step()
        pruner.end_epoch([0, 1], lambda _: loss_and_hits(model, images[:64], labels[:64])[0])
        assert pruner.epochs_done == epoch + 1
    small = export(model, pruner.plan)
    assert export_error(model, small, pruner.plan) <= 1e-9
    assert macs(small, example) == pruner.plan.macs <= (1 - CUT) * pruner.plan.dense_macs
