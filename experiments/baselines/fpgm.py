"""Filter Pruning via Geometric Median (He et al., CVPR 2019).

The filters nearest to the layer's geometric median can be replaced by the others: the filter that has the smallest
sum of Euclidean distances to all filters of its layer goes first. At the end of every epoch the same share of every
layer is chosen and their convolution weights set to zero; from then on their gradients are masked. So they do not come
back, and as zeros lie together, the same filters are chosen again. BatchNorm and momentum are left alone; constants are
exported as SFP's are.

Different here: the official code also chooses before the first epoch, where a mask from scratch is a random one and
stays for ever; the paper's algorithm, which is done here, chooses after each epoch. Its mixture with the norm
criterion is not offered.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.baselines.uniform import UniformMethod
from experiments.harness.callbacks import SaveStep
from experiments.harness.loop import Metrics


def summed_distances(weight: Tensor) -> Tensor:
    """Sum of a filter's Euclidean distances to all filters of its layer: [O, I, kH, kW] -> [O], float64."""
    filters = weight.flatten(1).double()
    # Not by a matrix product: equal filters must be at distance 0, and equal sums must be ties.
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


class FPGM(UniformMethod):
    """See the module's description."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_input: Tensor,
        target_macs_cut: float,
        save: SaveStep,
    ) -> None:
        super().__init__(model, example_input, target_macs_cut, save)
        # Changed in place only, so that a captured training step stays valid.
        self.masks = {
            name: torch.ones(len(w), 1, 1, 1, device=w.device) for name, w in self.weights.items()
        }
        optimizer.register_step_pre_hook(self._mask_gradients)

    def scores(self, weight: Tensor) -> Tensor:
        return summed_distances(weight)

    def end_epoch(self, epochs_done: int) -> Metrics:
        metrics = self.zero_and_adopt(epochs_done, self.target_cut)
        self._set_masks()
        return metrics

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._set_masks()

    def _set_masks(self) -> None:
        for name, filters in self.plan.pruned.items():
            self.masks[name].fill_(1.0)[list(filters)] = 0.0

    def _mask_gradients(self, *_: Any) -> None:
        gradients: Any = [weight.grad for weight in self.weights.values()]
        torch._foreach_mul_(gradients, [*self.masks.values()])
