"""First-order Taylor importance of the BatchNorm affine (Molchanov et al., CVPR 2019, "Importance Estimation").

A filter's importance is the square of what the loss would change by, to first order, if the filter went: of a
convolution with its own BatchNorm (gamma dL/dgamma + beta dL/dbeta)^2, summed over the training batches since the last
step. The filters of smallest importance in the whole network go first, whatever their layer, and for good.

`taylor` removes them little by little, as in the paper, at the end of each epoch of PSAP's ramp, so that both are given
the same budgets. `taylor_one_shot` removes all at once: a fresh network is pruned when half of its training is over, a
pretrained one after the first epoch.

Different here: the paper prunes a trained network, a fixed number of filters after every few batches, and trains it
on; here every step meets a budget of MACs, to the filter.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.methods.base import Metrics, SaveStep
from experiments.methods.budget import BudgetMethod
from experiments.methods.registry import MethodContext, register
from experiments.schema import HardPruningConfig
from psap_core import InputError
from psap_core.groups import Scope
from psap_core.schedule import Schedule, make_schedule
from psap_core.suspension import FilterMask, FilterTensors, apply_

START, RAMP_END = 0.05, 0.4  # shares of the epochs, PSAP's


def importance(tensors: FilterTensors) -> Tensor:
    """(sum over a filter's silencers s of <s, dL/ds>)^2 for the gradients that stand: float64 [filters]."""
    first = tensors.parameters[tensors.silencers[0]]
    everyone = torch.arange(len(first.index), device=tensors.device)
    change = torch.zeros(len(everyone), dtype=torch.float64, device=tensors.device)
    for name in tensors.silencers:
        rows = tensors.parameters[name]
        if rows.tensor.grad is None:  # a constant, or what no batch passed
            continue
        products = rows.tensor.detach().double() * rows.tensor.grad.double()
        change += rows.take(everyone, products).flatten(1).sum(1)
    return change.square()


class Taylor(BudgetMethod):
    """See the module's description.

    Args:
        schedule: when filters go, and how much of the cut is asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_input: Tensor,
        target_macs_cut: float,
        scope: Scope,
        schedule: Schedule,
        save: SaveStep,
    ) -> None:
        super().__init__(model, optimizer, example_input, target_macs_cut, scope, save)
        self.schedule = schedule
        self.mask = FilterMask(self.tensors)
        # Changed in place only: a captured step stays valid.
        self.sums = {name: importance(tensors) for name, tensors in self.tensors.items()}
        self._refuse_without_gradient()
        self.observing = optimizer.register_step_pre_hook(self._observe)
        self.holding = optimizer.register_step_post_hook(self.mask.hold_)

    def _refuse_without_gradient(self) -> None:
        for name, tensors in self.tensors.items():
            silencers = [tensors.parameters[silencer].tensor for silencer in tensors.silencers]
            if not any(tensor.requires_grad for tensor in silencers):
                raise InputError(
                    f"method=taylor: nothing that silences the filters of {name} has a gradient"
                )

    def _observe(self, *_: Any) -> None:
        with torch.no_grad():
            for name, tensors in self.tensors.items():
                self.sums[name] += importance(tensors)

    @torch.no_grad()
    def end_epoch(self, epochs_done: int) -> Metrics:
        if epochs_done >= self.schedule.freeze:
            self.observing.remove()  # nothing is chosen any more
        if not self.schedule.is_step(epochs_done):
            return {}
        began = time.perf_counter()
        cut = self.target_cut * self.schedule.ramp(epochs_done)
        pruned = self.least_important(cut)
        metrics = self.adopt(pruned, epochs_done, cut, began)
        apply_(self.model, self.groups, self.plan, self.optimizer)
        self.mask.set_(pruned)
        for sums in self.sums.values():
            sums.zero_()
        return metrics

    def plan_is_final(self, epochs_done: int) -> bool:
        return epochs_done >= self.schedule.freeze

    def compact_(self) -> None:
        super().compact_()
        self.observing.remove()
        self.holding.remove()

    def least_important(self, macs_cut: float) -> dict[str, list[int]]:
        """The filters to prune: those that are pruned already, and the least important of the whole network besides.

        The cut is reached, and no filter that goes now could stay. Every group keeps one filter.
        """
        budget = self.cost.budget(macs_cut)
        pruned = {name: [*filters] for name, filters in self.plan.pruned.items()}
        kept = {group.name: group.filters - len(pruned[group.name]) for group in self.groups}
        going = []
        for name, f in self._by_importance():
            if self._cost(kept) <= budget:
                break
            if kept[name] > 1:
                kept[name] -= 1
                going.append((name, f))
        for name, f in reversed(going):  # the last one may have been large: others fit again
            kept[name] += 1
            if self._cost(kept) > budget:
                kept[name] -= 1
                pruned[name].append(f)
        return {name: sorted(filters) for name, filters in pruned.items()}

    def _by_importance(self) -> list[tuple[str, int]]:
        """(group, filter) of all that are not pruned, the least important first."""
        ranked = []
        for name, sums in self.sums.items():
            gone = {*self.plan.pruned[name]}
            for f, value in enumerate(sums.tolist()):
                if f not in gone:
                    ranked.append((value, name, f))
        return [(name, f) for _, name, f in sorted(ranked)]

    def _cost(self, kept: Mapping[str, int]) -> float:
        return self.cost.cost([kept[group.name] for group in self.groups])

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if not self.is_compact:
            self.mask.set_(self.plan.pruned)
        for name, sums in self.sums.items():
            sums.copy_(state["sums"][name])


@register(HardPruningConfig, "taylor", "taylor_one_shot")
def make(context: MethodContext) -> Taylor:
    cfg, method = context.cfg, context.cfg.method
    assert isinstance(method, HardPruningConfig)
    schedule = make_schedule(cfg.epochs, START, RAMP_END, RAMP_END)
    if method.name == "taylor_one_shot":
        at = 1 if cfg.model.weights else (cfg.epochs + 1) // 2
        schedule = make_schedule(cfg.epochs, at, at, at)
    return Taylor(
        context.model,
        context.optimizer,
        context.example_input,
        method.target_macs_cut,
        method.scope.value,
        schedule,
        context.save,
    )
