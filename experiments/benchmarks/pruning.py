"""What pruning costs.

psap_epoch_overhead_pct: ResNet-20 on CIFAR-10-sized images, batch 128: a pruning step, pulse included, over the
    391 training steps of its epoch (their median time 391 times; a whole epoch takes minutes on a CPU).
pulse_overhead_pct: the pulse's share of that.
psap_between_steps_pct: the optimiser step hook over a training step, half of the filters suspended.
psap_between_steps_vgg16_pct: the same for torchvision's VGG-16 without BatchNorm, batch 16 at 128x128, scope coupled:
    no affine silences a filter there, so the hook holds the rows of convolutions and linear layers at zero.
prune_step_resnet50_ms: one step of torchvision's ResNet-50 without pulse and without eq. 1's count: norms,
    allocation, suspension with snapshots; the step at which pruning starts, at most 5 % of the filters chosen.
weight_sparsity_resnet50_ms: eq. 1's count alone.
prune_step_vs_loop_ratio: how many times longer than that step it takes to prune the same share of the filters as the
    official codes of SFP and FPGM do: numpy masks in double precision, filled filter by filter, made float tensors, and
    multiplied with the weights.
"""

import copy
import gc
import pkgutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.benchmarks import Figures, cifar_resnet, figure, seconds, sgd
from psap_core import PSAP
from psap_core.scoring import filter_norms

BATCH, CIFAR10_STEPS = 128, 391
PRUNING_EPOCHS, STEPS_BETWEEN = 4, 6
VGG_BATCH, VGG_SIZE, VGG_STEPS = 16, 128, 5
REPETITIONS = 11
CHURN = 0.05


def pruning() -> Figures:
    return overhead() | hook_without_norm() | resnet50_step()


def overhead() -> Figures:
    model = cifar_resnet(20)
    optimizer = sgd(model)
    images, labels = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    pruner = PSAP(
        model,
        optimizer,
        images[:1],
        scope="all",
        target_macs_cut=0.54,
        total_epochs=2 * PRUNING_EPOCHS,
        start=1,
        ramp_end=PRUNING_EPOCHS,
        freeze=PRUNING_EPOCHS + 1,
    )

    def loss_of_batch(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    def step() -> None:
        optimizer.zero_grad()
        loss_of_batch((images, labels)).backward()
        optimizer.step()

    step()
    overheads, pulses, hooks = [], [], []
    with timed("psap_core.pruner.pulse") as pulsed:
        for _ in range(PRUNING_EPOCHS):
            training = statistics.median(seconds(step) for _ in range(STEPS_BETWEEN))
            batches = [(images, labels)] * pruner.settings.pulse_batches
            pruning = seconds(partial(pruner.end_epoch, batches, loss_of_batch))
            overheads.append(100 * pruning / (CIFAR10_STEPS * training))
            pulses.append(100 * pulsed[-1] / (CIFAR10_STEPS * training))
            hook = statistics.median(seconds(pruner._mask.hold_) for _ in range(50))
            hooks.append(100 * hook / training)
    return {
        "psap_epoch_overhead_pct": figure(overheads),
        "pulse_overhead_pct": figure(pulses),
        "psap_between_steps_pct": figure(hooks),
    }


def hook_without_norm() -> Figures:
    from torchvision.models import vgg16

    model = vgg16().to(memory_format=torch.channels_last)
    optimizer = sgd(model)
    images = torch.randn(VGG_BATCH, 3, VGG_SIZE, VGG_SIZE)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (VGG_BATCH,))
    pruner = PSAP(
        model,
        optimizer,
        images[:1],
        scope="coupled",
        target_macs_cut=0.5,
        total_epochs=8,
        protection=False,
        start=1,
        ramp_end=1,
        freeze=4,
    )
    pruner.end_epoch([], lambda batch: torch.zeros(()))

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    step()
    hooks = []
    for _ in range(VGG_STEPS):
        training = seconds(step)
        hook = statistics.median(seconds(pruner._mask.hold_) for _ in range(5))
        hooks.append(100 * hook / training)
    return {"psap_between_steps_vgg16_pct": figure(hooks)}


def resnet50_step() -> Figures:
    from torchvision.models import resnet50

    theirs = resnet50()
    model = copy.deepcopy(theirs).to(memory_format=torch.channels_last)  # as the suite trains it
    optimizer = sgd(model)
    images = torch.randn(2, 3, 64, 64)
    F.cross_entropy(model(images), torch.tensor([0, 1])).backward()
    optimizer.step()
    steps, ratios = [], []
    with timed("psap_core.pruner.weight_sparsity_ratio") as counts:
        for _ in range(REPETITIONS):
            fresh = sgd(model)
            fresh.load_state_dict(optimizer.state_dict())
            pruner = PSAP(
                model,
                fresh,
                images[:1],
                scope="all",
                target_macs_cut=0.5,
                total_epochs=100,
                fan="out",
                protection=False,
                start=1,
                ramp_end=40,
                freeze=50,
            )
            gc.collect()
            step = pruner.end_epoch([], lambda batch: torch.zeros(()))
            assert step is not None
            assert 0 < step.mask_churn <= CHURN
            steps.append(step.seconds - counts[-1])
            ratios.append(seconds(partial(loop_step, theirs, step.mask_churn)) / steps[-1])
    return {
        "prune_step_resnet50_ms": figure([1000 * step for step in steps]),
        "weight_sparsity_resnet50_ms": figure([1000 * count for count in counts]),
        "prune_step_vs_loop_ratio": figure(ratios),
    }


def loop_step(model: nn.Module, share: float) -> None:
    """That share of every convolution's filters, those of smallest norm, zeroed in copies."""
    masks = {}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            norms = filter_norms(module.weight).numpy()
            mask = np.ones(module.weight.numel())
            length = mask.size // len(norms)
            for f in norms.argsort()[: round(share * len(norms))]:
                mask[f * length : (f + 1) * length] = 0
            masks[module.weight] = torch.from_numpy(mask).float()
    for weight, multiplier in masks.items():
        _ = weight.detach().view(-1) * multiplier


@contextmanager
def timed(function: str) -> Iterator[list[float]]:
    """While entered, the seconds of every call of a function, which goes by the place where it is looked up."""
    durations: list[float] = []
    original = pkgutil.resolve_name(function)

    def measured(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = original(*args, **kwargs)
        durations.append(time.perf_counter() - began)
        return result

    with patch(function, measured):
        yield durations
