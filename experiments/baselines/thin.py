"""The thin network: every width, the residual stream included, times one factor; trained from scratch."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

import torch

from experiments.harness import models
from experiments.schema import ModelConfig
from psap_core import InputError, macs


def thin_model(cfg: ModelConfig, target_macs_cut: float, channels: int, classes: int, image_size: int) -> ModelConfig:
    """`cfg` with the largest width that lacks at least `target_macs_cut` of the MACs of `cfg` itself.

    Raises:
        InputError: the target is outside [0, 1) or unreachable, or pretrained weights are given.
    """
    if not 0 <= target_macs_cut < 1:
        raise InputError(f"target_macs_cut must be a share in [0, 1), not {target_macs_cut}")
    if cfg.weights is not None:
        raise InputError("a thin network is trained from scratch: method=thin takes no model.weights")
    step = 1 / models.widest(cfg.name)
    cost = network_macs(channels, classes, image_size)
    budget = (1 - target_macs_cut) * cost(cfg)
    steps = range(1, int(cfg.width / step) + 1)
    fitting = bisect_right(steps, budget, key=lambda k: cost(replace(cfg, width=k * step)))
    if not fitting:
        raise InputError(f"target_macs_cut={target_macs_cut} is unreachable by a thinner {cfg.name}")
    return replace(cfg, width=fitting * step)


def network_macs(channels: int, classes: int, image_size: int) -> Callable[[ModelConfig], int]:
    """MACs of a configured network, counted without allocating it."""

    def cost(cfg: ModelConfig) -> int:
        with torch.device("meta"):
            return macs(models.build(cfg, channels, classes), torch.empty(1, channels, image_size, image_size))

    return cost
