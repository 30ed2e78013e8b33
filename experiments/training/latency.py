"""How long networks take for a forward pass, in eager PyTorch."""

import statistics
import time
from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

ROUNDS = 30
Name = TypeVar("Name", bound=Hashable)


def latencies_ms(networks: Mapping[Name, nn.Module], images: Tensor) -> dict[Name, float]:
    """Median milliseconds of a forward pass of `images` [N, C, H, W], over ROUNDS; a GPU's work is waited for.

    The networks take turns, in alternating order, so that a machine that slows down slows all of them.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for number in range(-3, ROUNDS):  # the first three warm up
            for name in reversed([*networks]) if number % 2 else networks:
                began = time.perf_counter()
                networks[name](images)
                if images.is_cuda:
                    torch.cuda.synchronize(images.device)
                if number >= 0:
                    seconds[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}
