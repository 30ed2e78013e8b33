"""What pruning methods share: a budget of MACs, met to the filter, and a plan that they adopt."""

import time
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.methods.base import Method, Metrics, SaveStep, plan_metrics
from psap_core import PrunePlan, compact_
from psap_core.allocation import filter_counts
from psap_core.checks import require_cut
from psap_core.cost import macs_cost_model
from psap_core.groups import Scope, find_groups
from psap_core.inputs import describe
from psap_core.plan import make_plan
from psap_core.suspension import apply_, tensors_by_group


class BudgetMethod(Method):
    """A method that is given the share of the MACs to remove.

    Args:
        model: the bare network.
        optimizer: trains it.
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
        optimizer: Optimizer,
        example_input: Tensor,
        target_macs_cut: float,
        scope: Scope,
        save: SaveStep,
    ) -> None:
        require_cut("target_macs_cut", target_macs_cut)
        self.model, self.optimizer, self.target_cut = model, optimizer, target_macs_cut
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

    def compact_(self) -> None:
        compact_(self.model, self.plan, self.optimizer)
        self.is_compact = True

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self.plan.to_json(), "is_compact": self.is_compact}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plan = PrunePlan.from_json(state["plan"])
        if state.get("is_compact", False):  # runs that began before there was compaction lack it
            apply_(self.model, self.groups, self.plan)  # of a network that is fresh yet
            self.compact_()
