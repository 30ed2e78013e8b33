"""The optimiser and its learning rate, from epoch to epoch."""

import math
from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from experiments.schema import LRSchedule, OptimConfig, OptimizerName
from psap_core import InputError

ADAMW_SECOND_DECAY = 0.999  # torch's
LARGEST_LR = 1e6  # far beyond what trains


def make_optimizer(model: nn.Module, cfg: OptimConfig) -> Optimizer:
    """SGD or AdamW over all parameters; without decay_all, tensors of one dimension do not decay.

    Raises:
        InputError: a setting is out of its range.
    """
    for name, valid, required in (
        ("lr", 0 < cfg.lr <= LARGEST_LR, f"above 0 and at most {LARGEST_LR:g}"),
        ("lr_batch", cfg.lr_batch is None or cfg.lr_batch >= 1, "at least 1, or null"),
        ("momentum", 0 < cfg.momentum < 1, "inside (0, 1)"),
        ("weight_decay", 0 <= cfg.weight_decay < math.inf, "finite and at least 0"),
        (
            "milestones",
            all(0 <= share <= 1 for share in cfg.milestones),
            "shares of the epochs in [0, 1]",
        ),
        ("lr_factor", 0 < cfg.lr_factor <= 1, "in (0, 1]"),
        ("warmup_epochs", cfg.warmup_epochs >= 0, "at least 0"),
        (
            "warmup_lr",
            not cfg.warmup_epochs or 0 < cfg.warmup_lr <= LARGEST_LR,
            f"above 0 and at most {LARGEST_LR:g}",
        ),
    ):
        if not valid:
            raise InputError(f"optim.{name}={getattr(cfg, name)} must be {required}")
    decayed = [p for p in model.parameters() if cfg.decay_all or p.ndim > 1]
    others = [p for p in model.parameters() if not (cfg.decay_all or p.ndim > 1)]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    if OptimizerName(cfg.optimizer) is OptimizerName.adamw:
        betas = (cfg.momentum, ADAMW_SECOND_DECAY)
        return AdamW(groups, lr=cfg.lr, betas=betas, weight_decay=cfg.weight_decay)
    return SGD(
        groups, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay, nesterov=True
    )


def learning_rate(cfg: OptimConfig, epoch: int, epochs: int) -> float:
    """Learning rate of an epoch (the first is 0) of a training of `epochs`.

    With lr_batch it grows linearly with the batch: lr * batch_size / lr_batch (Goyal et al. 2017).
    """
    scale = cfg.batch_size / cfg.lr_batch if cfg.lr_batch else 1.0
    if epoch < cfg.warmup_epochs:
        return cfg.warmup_lr * scale
    if LRSchedule(cfg.schedule) is LRSchedule.cosine:
        done = (epoch - cfg.warmup_epochs) / (epochs - cfg.warmup_epochs)
        return cfg.lr * scale * (1 + math.cos(math.pi * done)) / 2
    passed = sum(epoch >= math.floor(share * epochs + 0.5) for share in cfg.milestones)
    return cfg.lr * scale * cfg.lr_factor**passed
