"""What the suite costs, section by section; `python -m experiments.benchmark` runs them."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from experiments.models.cifar import RESNET_BLOCKS, RESNET_WIDTHS, ResNet
from experiments.schema import Shortcut

Figures = dict[str, dict[str, Any]]


def seconds(function: Callable[[], object]) -> float:
    """Duration of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def figure(values: list[float]) -> dict[str, Any]:
    """Median, smallest and largest value, and their number."""
    return {
        "median": statistics.median(values),
        "spread": [min(values), max(values)],
        "n": len(values),
    }


@contextmanager
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def cifar_resnet(depth: int) -> ResNet:
    """Randomly initialised, in the memory layout in which the suite trains."""
    model = ResNet(
        RESNET_BLOCKS[f"resnet{depth}"], RESNET_WIDTHS, Shortcut.option_a, channels=3, classes=10
    )
    return model.to(memory_format=torch.channels_last)


def sgd(model: nn.Module) -> torch.optim.SGD:
    """As the recipes train."""
    return torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
