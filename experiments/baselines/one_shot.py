"""One shot: prune once, then train on. L1 and L2 norms (Li et al., ICLR 2017), and a random choice as the control.

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

from experiments.baselines.uniform import UniformMethod
from experiments.harness.callbacks import SaveStep
from experiments.harness.loop import Metrics
from psap_core import Silence, apply_, filter_norms, filter_tensors

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
        score: Score,
        prune_at: int,
        seed: int,
        save: SaveStep,
    ) -> None:
        super().__init__(model, example_input, target_macs_cut, save)
        self.optimizer = optimizer
        self.score, self.prune_at = score, prune_at
        self.generator = torch.Generator().manual_seed(seed)
        self.silence = Silence({layer.name: filter_tensors(model, layer) for layer in self.layers})

    def scores(self, weight: Tensor) -> Tensor:
        if self.score == "random":
            return torch.rand(len(weight), generator=self.generator)
        return weight.flatten(1).abs().sum(1) if self.score == "l1" else filter_norms(weight)

    def before_train(self) -> None:
        if self.prune_at == 0 and not any(self.plan.pruned.values()):
            self._prune(0)

    def after_step(self) -> None:
        self.silence.hold_()

    def end_epoch(self, epochs_done: int) -> Metrics:
        return self._prune(epochs_done) if epochs_done == self.prune_at else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.silence.set_(self.plan.pruned)

    def _prune(self, epochs_done: int) -> Metrics:
        began = time.perf_counter()
        pruned = self.choose(self.counts(self.target_cut))
        metrics = self.adopt(pruned, epochs_done, self.target_cut, began)
        apply_(self.model, self.layers, self.plan, self.optimizer)
        self.silence.set_(self.plan.pruned)
        return metrics
