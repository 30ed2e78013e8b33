"""Small networks from scratch: the architectures without the pruning.

`thin`: every width, the residual stream included, times one factor. `thin_plan`: the architecture that a finished run
exported, with fresh weights (Liu et al., ICLR 2019, "Rethinking the Value of Network Pruning").
"""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from experiments import models
from experiments.runs.done import refuse_damage
from experiments.schema import Config, ModelConfig, PackageModelConfig, TargetConfig, ThinPlanConfig
from psap_core import InputError, macs
from psap_core.checks import require_cut


def starting_network(cfg: Config, channels: int, classes: int, image_size: int) -> ModelConfig:
    """The network that a run trains: its model, or the small one of `thin` and `thin_plan`.

    Raises:
        InputError: a small network is to start from weights, the target is unreachable, or the run is not done.
    """
    match cfg.method:
        case ThinPlanConfig(run=run):
            _refuse_weights(cfg)
            if not (Path(run) / "done").exists():
                raise InputError(
                    f"method.run={run} is not the folder of a finished run, whose network is to be trained"
                )
            refuse_damage(Path(run))
            if Path(run).name != f"seed{cfg.seed}":
                raise InputError(f"method.run={run} must be of the same seed, {cfg.seed}")
            return replace(cfg.model, weights=str(Path(run) / "export"))
        case TargetConfig(name="thin", target_macs_cut=target):
            _refuse_weights(cfg)
            return thin_model(cfg.model, target, channels, classes, image_size)
        case _:
            return cfg.model


def _refuse_weights(cfg: Config) -> None:
    if cfg.model.weights is not None:
        raise InputError(
            f"a thin network is trained from scratch: method={cfg.method.name} takes no model.weights"
        )


def thin_model(
    cfg: ModelConfig, target_macs_cut: float, channels: int, classes: int, image_size: int
) -> ModelConfig:
    """`cfg` with the largest width that lacks at least `target_macs_cut` of the MACs of `cfg` itself.

    Raises:
        InputError: the target is outside [0, 1) or unreachable.
    """
    require_cut("target_macs_cut", target_macs_cut)
    if isinstance(cfg, PackageModelConfig):
        raise InputError(
            f"method=thin needs a network of any width, as model=resnet50; {cfg.name} of {cfg.package} has one"
        )
    step = 0.5 / models.widest(cfg.name)
    cost = network_macs(channels, classes, image_size)
    budget = (1 - target_macs_cut) * cost(cfg)
    steps = range(1, int(cfg.width / step) + 1)
    fitting = bisect_right(steps, budget, key=lambda k: cost(replace(cfg, width=k * step)))
    if not fitting:
        raise InputError(
            f"target_macs_cut={target_macs_cut} is unreachable by a thinner {cfg.name}"
        )
    return replace(cfg, width=fitting * step)


def network_macs(channels: int, classes: int, image_size: int) -> Callable[[ModelConfig], int]:
    """MACs of a configured network, counted without allocating it."""

    def cost(cfg: ModelConfig) -> int:
        with torch.device("meta"):
            return macs(
                models.build(cfg, channels, classes, image_size),
                torch.empty(1, channels, image_size, image_size),
            )

    return cost
