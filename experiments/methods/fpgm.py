"""Filter Pruning via Geometric Median (He et al., CVPR 2019).

The filters nearest to the layer's geometric median can be replaced by the others: the filter that has the smallest
sum of Euclidean distances to all filters of its layer goes first. At the end of every epoch the same share of every
layer is chosen and the weights that write them set to zero; from then on their gradients are masked. So they do not
come back, and as zeros lie together, the same filters are chosen again. BatchNorm and momentum are left alone;
constants are exported as SFP's are.

Where the network is to be made small in training, the choice of the epoch in the middle stands to the end, and what it
chose goes whole, BatchNorm's constants too.

Different here: the official code also chooses before the first epoch, where a mask from scratch is a random one and
stays for ever; the paper's algorithm, which is done here, chooses after each epoch. Its mixture with the norm
criterion is not offered.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.methods.base import Metrics, SaveStep
from experiments.methods.registry import MethodContext, register
from experiments.methods.uniform import UniformMethod
from experiments.schema import HardPruningConfig, compacts
from psap_core.groups import Scope
from psap_core.suspension import apply_


def summed_distances(rows: Tensor) -> Tensor:
    """Sum of a filter's Euclidean distances to all filters of its layer: [O, I, kH, kW] -> [O], float64."""
    filters = rows.flatten(1).double()
    # Not by a matrix product: equal filters must be at distance 0, and equal sums must be ties.
    return torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


class FPGM(UniformMethod):
    """See the module's description.

    Args:
        final_at: completed epochs after which nothing is chosen any more; None: it is to the end.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_input: Tensor,
        target_macs_cut: float,
        scope: Scope,
        save: SaveStep,
        final_at: int | None = None,
    ) -> None:
        super().__init__(model, optimizer, example_input, target_macs_cut, scope, save)
        self.weights: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}  # changed in place only: a captured step stays valid
        for tensors in self.tensors.values():
            for name in tensors.writers:
                rows = tensors.parameters[name]
                shape = [1] * rows.tensor.ndim
                shape[rows.dim] = rows.tensor.shape[rows.dim]
                self.weights[name] = rows.tensor
                self.masks[name] = torch.ones(shape, device=rows.tensor.device)
        self.masking = optimizer.register_step_pre_hook(self._mask_gradients)
        self.final_at = final_at

    def scores(self, rows: Tensor) -> Tensor:
        return summed_distances(rows)

    def end_epoch(self, epochs_done: int) -> Metrics:
        if self.is_compact:
            return {}
        metrics = self.zero_and_adopt(epochs_done, self.target_cut)
        self._set_masks()
        if self.plan_is_final(epochs_done):
            apply_(self.model, self.groups, self.plan, self.optimizer)
        return metrics

    def plan_is_final(self, epochs_done: int) -> bool:
        return self.final_at is not None and epochs_done >= self.final_at

    def compact_(self) -> None:
        super().compact_()
        self.masking.remove()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if not self.is_compact:
            self._set_masks()

    def _set_masks(self) -> None:
        for mask in self.masks.values():
            mask.fill_(1.0)
        for group, filters in self.plan.pruned.items():
            tensors = self.tensors[group]
            for name in tensors.writers:
                places = tensors.parameters[name].index[[*filters]].flatten()
                self.masks[name].view(-1)[places] = 0.0

    def _mask_gradients(self, *_: Any) -> None:
        gradients: Any = [weight.grad for weight in self.weights.values()]
        torch._foreach_mul_(gradients, [*self.masks.values()])


@register(HardPruningConfig, "fpgm")
def make(context: MethodContext) -> FPGM:
    cfg, method = context.cfg, context.cfg.method
    assert isinstance(method, HardPruningConfig)
    final_at = (cfg.epochs + 1) // 2 if compacts(method) else None
    return FPGM(
        context.model,
        context.optimizer,
        context.example_input,
        method.target_macs_cut,
        method.scope.value,
        context.save,
        final_at,
    )
