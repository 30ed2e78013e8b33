"""One pruning rate for all layers: what SFP, FPGM and the one-shot methods share."""

import time
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from experiments.harness.callbacks import Method, SaveStep, plan_metrics
from experiments.harness.loop import Metrics
from psap_core import CostModel, InputError, PrunePlan, find_layers, macs_cost_model, make_plan


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

    def fits(rate: Fraction) -> bool:
        counts = pruned_counts(cost.filters, rate)
        return cost.cost([o - n for o, n in zip(cost.filters, counts, strict=True)]) <= budget

    first = bisect_left(rates, True, key=fits)
    if first == len(rates):
        raise InputError(f"target_macs_cut={target_macs_cut} is unreachable with one rate for all layers")
    return rates[first]


def lowest(scores: Tensor, count: int) -> list[int]:
    """The `count` filters of lowest score [O], ties by index."""
    filters: list[int] = scores.argsort(stable=True)[:count].tolist()
    return filters


class UniformMethod(Method, ABC):
    """A method that prunes int(O * rate) filters of every layer; the rate follows from the target.

    Args:
        model: the bare network.
        example_input: one batch [N, C, H, W].
        target_macs_cut: share of multiply-accumulates to remove.
        save: takes every step's plan.

    Raises:
        InputError: the target is unreachable.
    """

    def __init__(self, model: nn.Module, example_input: Tensor, target_macs_cut: float, save: SaveStep) -> None:
        self.layers = find_layers(model, example_input)
        self.cost = macs_cost_model(model, self.layers, example_input)
        smallest_rate(self.cost, target_macs_cut)  # refuses now, not after some epochs
        self.target_cut = target_macs_cut
        self.weights = {layer.name: _weight(model, layer.name) for layer in self.layers}
        self.plan = make_plan(self.layers, {}, self.cost, example_input.shape[1:])
        self.save = save

    def counts(self, macs_cut: float) -> list[int]:
        """How many filters of every layer go for this cut."""
        return pruned_counts(self.cost.filters, smallest_rate(self.cost, macs_cut))

    def choose(self, counts: Sequence[int]) -> dict[str, list[int]]:
        """The filters to prune, so many of every layer, by the method's scores."""
        chosen = zip(self.weights.items(), counts, strict=True)
        return {name: lowest(self.scores(weight.detach()), count) for (name, weight), count in chosen}

    @abstractmethod
    def scores(self, weight: Tensor) -> Tensor:
        """Importance of every filter: [O, I, kH, kW] -> [O]."""

    @torch.no_grad()
    def zero_and_adopt(self, epochs_done: int, macs_cut: float) -> Metrics:
        """Choose anew among all filters, zero the convolution weights of the chosen ones, and make them the plan."""
        began = time.perf_counter()
        pruned = self.choose(self.counts(macs_cut))
        for name, filters in pruned.items():
            self.weights[name][filters] = 0.0
        return self.adopt(pruned, epochs_done, macs_cut, began)

    def adopt(self, pruned: dict[str, list[int]], epochs_done: int, macs_cut: float, began: float) -> Metrics:
        """Make these filters the plan; save it and say what changed since `began` (time.perf_counter)."""
        plan = make_plan(self.layers, pruned, self.cost, self.plan.input_shape, macs_cut)
        changed = sum(len(set(now).symmetric_difference(self.plan.pruned[name])) for name, now in pruned.items())
        self.plan = plan
        self.save("plans", epochs_done, plan.to_json())
        return plan_metrics(plan, changed / sum(self.cost.filters), time.perf_counter() - began)

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self.plan.to_json()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plan = PrunePlan.from_json(state["plan"])


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
