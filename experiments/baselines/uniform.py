"""One pruning rate for all layers, within a filter: what SFP, FPGM and the one-shot methods share.

Their papers take int(O * rate) filters of every layer, which meets a budget only roughly: the smallest rate that
removes 54 % of ResNet-20's MACs removes 56.6 %. Here eq. 2 of psap_core sets the counts, with alpha 0, so that all
methods are given the same budget, to the filter.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.harness.callbacks import Method, SaveStep, plan_metrics
from experiments.harness.loop import Metrics
from psap_core import (
    InputError,
    PrunePlan,
    filter_counts,
    filter_tensors,
    find_layers,
    macs_cost_model,
    make_plan,
)


def lowest(scores: Tensor, count: int) -> list[int]:
    """The `count` filters of lowest score [O], ties by index."""
    filters: list[int] = scores.argsort(stable=True)[:count].tolist()
    return filters


class UniformMethod(Method, ABC):
    """A method that prunes the same share of every layer; the share follows from the target.

    Args:
        model: the bare network.
        example_input: one batch [N, C, H, W].
        target_macs_cut: share of multiply-accumulates to remove.
        save: takes every step's plan.

    Raises:
        InputError: the target is outside [0, 1), or one filter per layer still costs more.
    """

    def __init__(
        self, model: nn.Module, example_input: Tensor, target_macs_cut: float, save: SaveStep
    ) -> None:
        if not 0 <= target_macs_cut < 1:
            raise InputError(f"target_macs_cut must be a share in [0, 1), not {target_macs_cut}")
        self.model, self.target_cut = model, target_macs_cut
        self.layers = find_layers(model, example_input)
        self.cost = macs_cost_model(model, self.layers, example_input)
        self.counts(target_macs_cut)  # refuses now, not after some epochs
        self.weights = {layer.name: _weight(model, layer.name) for layer in self.layers}
        self.plan = make_plan(self.layers, {}, self.cost, example_input.shape[1:])
        self.save = save

    def counts(self, macs_cut: float) -> list[int]:
        """How many filters of every layer go for this cut."""
        filters = self.cost.filters
        kept = filter_counts(
            [0.0] * len(filters),
            self.cost,
            self.cost.budget(macs_cut),
            [1] * len(filters),
            alpha=0.0,
        )
        return [o - k for o, k in zip(filters, kept, strict=True)]

    def choose(self, counts: Sequence[int]) -> dict[str, list[int]]:
        """The filters to prune, so many of every layer, by the method's scores."""
        chosen = zip(self.weights.items(), counts, strict=True)
        return {
            name: lowest(self.scores(weight.detach()), count) for (name, weight), count in chosen
        }

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

    def adopt(
        self, pruned: dict[str, list[int]], epochs_done: int, macs_cut: float, began: float
    ) -> Metrics:
        """Make these filters the plan; save it and say what changed since `began` (time.perf_counter)."""
        plan = make_plan(self.layers, pruned, self.cost, self.plan.input_shape, macs_cut)
        changed = sum(
            len(set(now).symmetric_difference(self.plan.pruned[name]))
            for name, now in pruned.items()
        )
        self.plan = plan
        self.save("plans", epochs_done, plan.to_json())
        return plan_metrics(plan, changed / sum(self.cost.filters), time.perf_counter() - began)

    @torch.no_grad()
    def finish(self) -> None:
        """As in the official small networks: inner filters go whole, of residual ones BatchNorm's constant stays."""
        for layer, part in self.plan.match(self.layers):
            tensors = filter_tensors(self.model, layer)
            spared = tensors.affine if layer.role == "residual" else ()
            for parameter in [
                tensor for name, tensor in tensors.parameters.items() if name not in spared
            ]:
                parameter.index_fill_(0, tensors.index(part.pruned), 0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self.plan.to_json()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plan = PrunePlan.from_json(state["plan"])


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight
