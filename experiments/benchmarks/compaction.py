"""Whole trainings that get cheaper: in scope coupled, small at the freeze. Epoch by epoch in turns with a dense one.

freeze_half   PSAP's default schedule: the ramp ends at 0.4 of the epochs, the plan is final at 0.5
freeze_third  the ramp ends at 0.25, the plan is final at a third

train_seconds_ratio_<schedule>: seconds of PSAP's training, pruning steps and compaction included, over the dense one's.
train_macs_ratio_<schedule>: the same of forward MACs.
    ResNet-50, 52 % of its MACs cut. Batches of 16 random images, 64x64. Without pulses, whose share depends on an
    epoch's length; the section pruning has it.
train_seconds_ratio_small_<cut>_<schedule>, train_macs_ratio_small_<cut>_<schedule>:
    ResNet-20, 54 and 85 % cut, as the studies of docs/results.md train it: 79 batches of 128 images, 16x16, an epoch,
    one thread, a pulse of ten batches in every pruning step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import models
from experiments.benchmarks import Figures, cifar_resnet, figure, one_thread, seconds, sgd
from experiments.schema import Fan, ModelConfig
from psap_core import PSAP, macs

EPOCHS = 12
REPETITIONS = 3
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shares:
    """When the ramp ends and the plan is final, as shares of the epochs."""

    ramp_end: float
    freeze: float


SCHEDULES = {
    "freeze_half": Shares(ramp_end=0.4, freeze=0.5),
    "freeze_third": Shares(ramp_end=0.25, freeze=1 / 3),
}


@dataclass
class Training:
    """One network in training; `pruner` is None for the dense one."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    pruner: PSAP | None
    seconds: float = 0.0
    macs: list[int] = field(default_factory=list)

    def epoch(self, batches: Batches) -> None:
        self.macs.append(macs(self.model, batches[0][0][:1]))
        self.seconds += seconds(lambda: self._epoch(batches))

    def _epoch(self, batches: Batches) -> None:
        self.model.train()
        for batch in batches:
            self.optimizer.zero_grad()
            self._loss(batch).backward()
            self.optimizer.step()
        if self.pruner is not None:
            self.pruner.end_epoch(batches, self._loss)
            if self.pruner.epochs_done == self.pruner.schedule.freeze:
                self.pruner.compact_()

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)


def compaction() -> Figures:
    batches = _batches(8, torch.Size((16, 3, 64, 64)), classes=1000)

    def dense() -> Training:
        model = models.build(ModelConfig("resnet50", 1.0, None, Fan("out")), 3, 1000)
        return _training(model.to(memory_format=torch.channels_last))

    def pruned(shares: Shares) -> Training:
        return _pruned(dense(), batches, 0.52, shares, pulse=False)

    makers = {name: lambda shares=shares: pruned(shares) for name, shares in SCHEDULES.items()}
    return _beside(dense, makers, batches)


def compaction_small() -> Figures:
    batches = _batches(79, torch.Size((128, 3, 16, 16)), classes=10)

    def dense() -> Training:
        return _training(cifar_resnet(20))

    def pruned(cut: float, shares: Shares) -> Training:
        return _pruned(dense(), batches, cut, shares, pulse=True)

    makers = {
        f"small_{100 * cut:.0f}_{name}": lambda cut=cut, shares=shares: pruned(cut, shares)
        for cut in (0.54, 0.85)
        for name, shares in SCHEDULES.items()
    }
    with one_thread():
        return _beside(dense, makers, batches)


def _beside(
    make_dense: Callable[[], Training],
    makers: Mapping[str, Callable[[], Training]],
    batches: Batches,
) -> Figures:
    """What the trainings take beside the dense one; all of a repetition go epoch by epoch in turns."""
    seconds_ratios: dict[str, list[float]] = {name: [] for name in makers}
    macs_ratios: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(REPETITIONS):
        dense = make_dense()
        pruned = {name: make() for name, make in makers.items()}
        for _ in range(EPOCHS):
            for training in (dense, *pruned.values()):
                training.epoch(batches)
        for name, training in pruned.items():
            seconds_ratios[name].append(training.seconds / dense.seconds)
            macs_ratios[name].append(sum(training.macs) / sum(dense.macs))
    figures: Figures = {}
    for name in makers:
        figures[f"train_seconds_ratio_{name}"] = figure(seconds_ratios[name])
        figures[f"train_macs_ratio_{name}"] = figure(macs_ratios[name])
    return figures


def _batches(number: int, shape: torch.Size, classes: int) -> Batches:
    """The same random images, so many times."""
    images = torch.randn(shape).to(memory_format=torch.channels_last)
    return [(images, torch.randint(classes, shape[:1]))] * number


def _training(model: nn.Module) -> Training:
    return Training(model, sgd(model), None)


def _pruned(
    training: Training, batches: Batches, cut: float, shares: Shares, *, pulse: bool
) -> Training:
    """The training, with PSAP in scope coupled."""
    training.pruner = PSAP(
        training.model,
        training.optimizer,
        torch.zeros_like(batches[0][0][:1]),
        target_macs_cut=cut,
        total_epochs=EPOCHS,
        scope="coupled",
        protection=pulse,
        ramp_end=shares.ramp_end,
        freeze=shares.freeze,
    )
    return training
