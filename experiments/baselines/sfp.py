"""Soft Filter Pruning (He et al., IJCAI 2018), as its official code does it.

At the end of every epoch the int(O * rate) filters of lowest L2 norm of every layer have their convolution
weights set to zero. Gradients are not masked and momentum is kept, so filters may come back. One rate for all
layers. BatchNorm's beta is left alone: a "pruned" channel is a constant until the plan is applied at the end.
"""

import time
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from experiments.harness.callbacks import Method, SavePlan, plan_metrics
from experiments.harness.loop import Metrics
from psap_core import CostModel, InputError, PrunePlan, filter_norms, find_layers, macs_cost_model, make_plan


def pruned_counts(filters: Sequence[int], rate: Fraction) -> list[int]:
    """int(O * rate) filters of every layer."""
    return [int(o * rate) for o in filters]


def smallest_rate(cost: CostModel, target_macs_cut: float) -> Fraction:
    """The smallest rate in [0, 1) whose exported network lacks at least `target_macs_cut` of the dense MACs.

    Raises:
        InputError: the target is outside [0, 1), or one filter per layer still costs more.
    """
    if not 0 <= target_macs_cut < 1:
        raise InputError(f"target_macs_cut must be a share in [0, 1), not {target_macs_cut}")
    budget = cost.budget(target_macs_cut)
    rates = sorted({Fraction(pruned, o) for o in cost.filters for pruned in range(o)})
    for rate in rates:
        kept = [o - n for o, n in zip(cost.filters, pruned_counts(cost.filters, rate), strict=True)]
        if cost.cost(kept) <= budget:
            return rate
    raise InputError(f"target_macs_cut={target_macs_cut} is unreachable with one rate for all layers")


class SFP(Method):
    """See the module's description. Arguments as for PSAP; `save_plan` takes every epoch and its plan."""

    def __init__(self, model: nn.Module, example_input: Tensor, target_macs_cut: float, save_plan: SavePlan) -> None:
        self.layers = find_layers(model, example_input)
        self.cost = macs_cost_model(model, self.layers, example_input)
        self.rate = smallest_rate(self.cost, target_macs_cut)
        self.counts = pruned_counts(self.cost.filters, self.rate)
        self.target_cut = target_macs_cut
        self.weights = [_weight(model, layer.name) for layer in self.layers]
        self.plan = make_plan(self.layers, {}, self.cost, example_input.shape[1:])
        self.save_plan = save_plan

    @torch.no_grad()
    def end_epoch(self, epochs_done: int) -> Metrics:
        began = time.perf_counter()
        lowest = {}
        for layer, weight, count in zip(self.layers, self.weights, self.counts, strict=True):
            filters = filter_norms(weight).argsort(stable=True)[:count]
            weight[filters] = 0.0
            lowest[layer.name] = filters.tolist()
        plan = make_plan(self.layers, lowest, self.cost, self.plan.input_shape, self.target_cut)
        changed = sum(len(set(lowest[name]).symmetric_difference(old)) for name, old in self.plan.pruned.items())
        self.plan = plan
        self.save_plan(epochs_done, plan)
        return plan_metrics(plan, changed / sum(self.cost.filters), time.perf_counter() - began)

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self.plan.to_json()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plan = PrunePlan.from_json(state["plan"])


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
