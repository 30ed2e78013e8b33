"""Whole trainings that get cheaper: ResNet-50, 52 % of its MACs cut in scope coupled, small at the freeze.

freeze_half   PSAP's default schedule: the ramp ends at 0.4 of the epochs, the plan is final at 0.5
freeze_third  the ramp ends at 0.25, the plan is final at a third

Batches of 16 random images, 64x64. The trainings go epoch by epoch in turns with a dense one, so that all see the same
machine. Without pulses, whose share depends on an epoch's length; the section pruning has it.

train_seconds_ratio_<schedule>: seconds of PSAP's training, pruning steps and compaction included, over the dense one's.
train_macs_ratio_<schedule>: the same of forward MACs.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import models
from experiments.benchmarks import Figures, figure, seconds, sgd
from experiments.schema import Fan, ModelConfig
from psap_core import PSAP, macs

CUT = 0.52
EPOCHS, STEPS, BATCH, SIZE = 12, 8, 16, 64
REPETITIONS = 3


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

    def epoch(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.macs.append(macs(self.model, batches[0][0][:1]))
        self.seconds += seconds(lambda: self._epoch(batches))

    def _epoch(self, batches: list[tuple[Tensor, Tensor]]) -> None:
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
    images = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    batches = [(images, torch.randint(1000, (BATCH,)))] * STEPS
    seconds_ratios: dict[str, list[float]] = {name: [] for name in SCHEDULES}
    macs_ratios: dict[str, list[float]] = {name: [] for name in SCHEDULES}
    for _ in range(REPETITIONS):
        dense = _training(None)
        pruned = {name: _training(schedule) for name, schedule in SCHEDULES.items()}
        for _ in range(EPOCHS):
            for training in (dense, *pruned.values()):
                training.epoch(batches)
        for name, training in pruned.items():
            seconds_ratios[name].append(training.seconds / dense.seconds)
            macs_ratios[name].append(sum(training.macs) / sum(dense.macs))
    figures: Figures = {}
    for name in SCHEDULES:
        figures[f"train_seconds_ratio_{name}"] = figure(seconds_ratios[name])
        figures[f"train_macs_ratio_{name}"] = figure(macs_ratios[name])
    return figures


def _training(schedule: Shares | None) -> Training:
    model = models.build(ModelConfig("resnet50", 1.0, None, Fan("out")), 3, 1000)
    model = model.to(memory_format=torch.channels_last)
    optimizer = sgd(model)
    if schedule is None:
        return Training(model, optimizer, None)
    pruner = PSAP(
        model,
        optimizer,
        torch.zeros(1, 3, SIZE, SIZE),
        target_macs_cut=CUT,
        total_epochs=EPOCHS,
        scope="coupled",
        protection=False,
        ramp_end=schedule.ramp_end,
        freeze=schedule.freeze,
    )
    return Training(model, optimizer, pruner)
