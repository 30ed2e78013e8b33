"""What pruning costs.

psap_epoch_overhead_pct: ResNet-20 on CIFAR-10-sized images, batch 128: a pruning step, pulse included, over the
    391 training steps of its epoch (their median time 391 times; a whole epoch takes minutes on a CPU).
psap_between_steps_pct: the optimiser step hook over a training step, half of the filters suspended.
prune_step_resnet50_ms: one step of torchvision's ResNet-50 without pulse and without eq. 1's count: norms,
    allocation, suspension with snapshots; the step at which pruning starts, at most 5 % of the filters chosen.
weight_sparsity_resnet50_ms: eq. 1's count alone.
"""

import gc
import statistics
import time
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.benchmarks import Figures, figure, seconds
from experiments.harness.models import RESNET_BLOCKS, RESNET_WIDTHS, ResNet
from experiments.schema import Shortcut
from psap_core import PSAP, weight_sparsity_ratio

BATCH, CIFAR10_STEPS = 128, 391
PRUNING_EPOCHS, STEPS_BETWEEN = 6, 8
REPETITIONS = 15


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)


def pruning() -> Figures:
    return overhead() | resnet50_step()


def overhead() -> Figures:
    model = ResNet(RESNET_BLOCKS["resnet20"], RESNET_WIDTHS, Shortcut.option_a, channels=3, classes=10)
    optimizer = sgd(model)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    pruner = PSAP(
        model, optimizer, images[:1], target_macs_cut=0.54,
        total_epochs=2 * PRUNING_EPOCHS, start=1, ramp_end=PRUNING_EPOCHS, freeze=PRUNING_EPOCHS + 1,
    )

    def loss() -> Tensor:
        return F.cross_entropy(model(images), labels)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    step()
    overheads, hooks = [], []
    for _ in range(PRUNING_EPOCHS):
        training = statistics.median(seconds(step) for _ in range(STEPS_BETWEEN))
        pruning = seconds(lambda: pruner.end_epoch(lambda: (loss() for _ in range(pruner.pulse_batches))))
        overheads.append(100 * pruning / (CIFAR10_STEPS * training))
        hooks.append(100 * statistics.median(seconds(pruner._silence.hold_) for _ in range(50)) / training)
    return {"psap_epoch_overhead_pct": figure(overheads), "psap_between_steps_pct": figure(hooks)}


def resnet50_step() -> Figures:
    from torchvision.models import resnet50

    model = resnet50()
    optimizer = sgd(model)
    images = torch.randn(2, 3, 64, 64)
    F.cross_entropy(model(images), torch.tensor([0, 1])).backward()
    optimizer.step()
    steps: list[float] = []
    counts: list[float] = []

    def counted(*args: Any, **kwargs: Any) -> dict[str, float]:
        began = time.perf_counter()
        sparsity = weight_sparsity_ratio(*args, **kwargs)
        counts.append(1000 * (time.perf_counter() - began))
        return sparsity

    with patch("psap_core.pruner.weight_sparsity_ratio", counted):
        for _ in range(REPETITIONS):
            pruner = PSAP(
                model, optimizer, images[:1], target_macs_cut=0.5, total_epochs=100, fan="out", protection=False,
                start=1, ramp_end=40, freeze=50,
            )
            gc.collect()
            step = pruner.end_epoch(lambda: ())
            assert step is not None
            assert 0 < step.mask_churn <= 0.05
            steps.append(1000 * step.seconds - counts[-1])
    return {"prune_step_resnet50_ms": figure(steps), "weight_sparsity_resnet50_ms": figure(counts)}
