"""One pruning rate for all layers, within a filter: what SFP, FPGM and the one-shot methods share.

Their papers take int(O * rate) filters of every layer, which meets a budget only roughly: the smallest rate that
removes 54 % of ResNet-20's MACs removes 56.6 %. Here eq. 2 of psap_core sets the counts, with alpha 0, so that all
methods are given the same budget, to the filter.

Their scope is `all`. In scope `coupled` several layers may write the channels of a group: each one's filters are
scored, and the scores joined as PSAP joins its norms (`psap_core.scoring.joint_scores`).
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from experiments.methods.base import Method, Metrics, SaveStep, plan_metrics
from psap_core import InputError, PrunePlan
from psap_core.allocation import filter_counts
from psap_core.cost import macs_cost_model
from psap_core.groups import Scope, find_groups
from psap_core.inputs import describe
from psap_core.plan import make_plan
from psap_core.scoring import joint_scores
from psap_core.suspension import tensors_by_group


def lowest(scores: Tensor, count: int) -> list[int]:
    """The `count` filters of lowest score [O], ties by index."""
    filters: list[int] = scores.argsort(stable=True)[:count].tolist()
    return filters


class UniformMethod(Method, ABC):
    """A method that prunes the same share of every channel group; the share follows from the target.

    Args:
        model: the bare network.
        example_input: one batch [N, C, H, W].
        target_macs_cut: share of multiply-accumulates to remove.
        scope: which channels are pruned together, see `psap_core.groups.find_groups`.
        save: takes every step's plan.

    Attributes:
        tensors: group name to the live tensors of its filters.

    Raises:
        InputError: the target is outside [0, 1), or one filter per group still costs more.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        target_macs_cut: float,
        scope: Scope,
        save: SaveStep,
    ) -> None:
        if not 0 <= target_macs_cut < 1:
            raise InputError(f"target_macs_cut must be a share in [0, 1), not {target_macs_cut}")
        self.model, self.target_cut = model, target_macs_cut
        self.groups = find_groups(model, example_input, scope=scope)
        self.cost = macs_cost_model(model, self.groups, example_input)
        self.counts(target_macs_cut)  # refuses now, not after some epochs
        self.tensors = tensors_by_group(model, self.groups)
        self.plan = make_plan(self.groups, {}, self.cost, describe(example_input), scope)
        self.save = save

    def counts(self, macs_cut: float) -> list[int]:
        """How many filters of every group go for this cut."""
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
        """The filters to prune, so many of every group, by the method's scores."""
        chosen = {}
        for (name, tensors), count in zip(self.tensors.items(), counts, strict=True):
            scores = [self.scores(writer.rows.detach()) for writer in tensors.filter_rows()]
            chosen[name] = lowest(joint_scores(scores), count)
        return chosen

    @abstractmethod
    def scores(self, rows: Tensor) -> Tensor:
        """Importance of every filter by the rows of one layer that writes it: [O, I, kH, kW] -> [O]."""

    @torch.no_grad()
    def zero_and_adopt(self, epochs_done: int, macs_cut: float) -> Metrics:
        """Choose anew among all filters, zero the weights that write the chosen ones, and make them the plan."""
        began = time.perf_counter()
        pruned = self.choose(self.counts(macs_cut))
        for name, filters in pruned.items():
            tensors = self.tensors[name]
            for writer in tensors.writers:
                tensors.parameters[writer].zero_(tensors.index(filters))
        return self.adopt(pruned, epochs_done, macs_cut, began)

    def adopt(
        self, pruned: dict[str, list[int]], epochs_done: int, macs_cut: float, began: float
    ) -> Metrics:
        """Make these filters the plan; save it and say what changed since `began` (time.perf_counter)."""
        plan = make_plan(
            self.groups, pruned, self.cost, self.plan.inputs, self.plan.scope, macs_cut
        )
        changed = sum(
            len(set(now).symmetric_difference(self.plan.pruned[name]))
            for name, now in pruned.items()
        )
        self.plan = plan
        self.save("plans", epochs_done, plan.to_json())
        return plan_metrics(plan, changed / sum(self.cost.filters), time.perf_counter() - began)

    @torch.no_grad()
    def finish(self) -> None:
        """As in the official small networks: filters go whole; of scattered ones BatchNorm's constant stays."""
        for group, part in self.plan.match(self.groups):
            tensors = self.tensors[group.name]
            spared = tensors.silencers if group.scattered is not None else ()
            for name, rows in tensors.parameters.items():
                if name not in spared:
                    rows.zero_(tensors.index(part.pruned))

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self.plan.to_json()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plan = PrunePlan.from_json(state["plan"])
