"""One shot: prune once, then train on. L1 and L2 norms (Li et al., ICLR 2017), and a random choice as the control.

In scope `coupled`, l2 is what Torch-Pruning's magnitude pruner does (Fang et al., CVPR 2023): what is pruned together
has one score, from normalised group norms. There the squares of the rows that write a channel, of the columns that read
it and of BatchNorm's gamma are averaged and divided by the group's mean; here the rows alone count, and each layer's
norms are divided by their mean before they are joined, so that no layer drowns another.

One rate for all layers; the filters of smallest norm go, for good (eq. 7 of psap_core). A pretrained network is pruned
before the first epoch and fine-tuned for all of them; a fresh one trains dense for the first half of the epochs.

Different here: Li et al. prune with the L1 norm, and by hand spare layers that they found sensitive; here every layer
loses the same share, so that the exported cut is the same as the others'.
"""

import time
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.methods.base import Metrics, SaveStep
from experiments.methods.registry import MethodContext, register
from experiments.methods.uniform import UniformMethod
from experiments.schema import HardPruningConfig
from psap_core.groups import Scope
from psap_core.scoring import filter_norms
from psap_core.suspension import FilterMask, apply_

Score = Literal["l1", "l2", "random"]


class OneShot(UniformMethod):
    """See the module's description.

    Args:
        prune_at: completed epochs at which the network is pruned; 0: before the first one.
        seed: of the generator that draws a random choice.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_input: Tensor,
        target_macs_cut: float,
        scope: Scope,
        score: Score,
        prune_at: int,
        seed: int,
        save: SaveStep,
    ) -> None:
        super().__init__(model, optimizer, example_input, target_macs_cut, scope, save)
        self.score, self.prune_at = score, prune_at
        self.generator = torch.Generator().manual_seed(seed)
        self.mask = FilterMask(self.tensors)

    def scores(self, rows: Tensor) -> Tensor:
        if self.score == "random":
            return torch.rand(len(rows), generator=self.generator)
        return rows.flatten(1).abs().sum(1) if self.score == "l1" else filter_norms(rows)

    def before_train(self) -> None:
        if self.prune_at == 0 and not any(self.plan.pruned.values()):
            self._prune(0)

    def after_step(self) -> None:
        if not self.is_compact:
            self.mask.hold_()

    def end_epoch(self, epochs_done: int) -> Metrics:
        return self._prune(epochs_done) if epochs_done == self.prune_at else {}

    def plan_is_final(self, epochs_done: int) -> bool:
        return epochs_done >= self.prune_at

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if not self.is_compact:
            self.mask.set_(self.plan.pruned)

    def _prune(self, epochs_done: int) -> Metrics:
        began = time.perf_counter()
        pruned = self.choose(self.counts(self.target_cut))
        metrics = self.adopt(pruned, epochs_done, self.target_cut, began)
        apply_(self.model, self.groups, self.plan, self.optimizer)
        self.mask.set_(self.plan.pruned)
        return metrics


@register(HardPruningConfig, "l1", "l2", "random")
def make(context: MethodContext) -> OneShot:
    cfg, method = context.cfg, context.cfg.method
    assert isinstance(method, HardPruningConfig)
    score: Score = method.name  # type: ignore[assignment]
    # A pretrained network is pruned before the first epoch, a fresh one when it has half of its training.
    prune_at = 0 if cfg.model.weights else (cfg.epochs + 1) // 2
    return OneShot(
        context.model,
        context.optimizer,
        context.example_input,
        method.target_macs_cut,
        method.scope.value,
        score,
        prune_at,
        cfg.seed,
        context.save,
    )
