"""In scopes `all` and `inner` groups, MACs and plans of plain networks never change: frozen_plans.json is their record.

It was written when every layer was analysed on its own, before channel groups. Checkpoints and exported networks carry
these digests.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from psap_core.allocation import filter_counts, filter_floors
from psap_core.cost import CostModel, macs_cost_model
from psap_core.groups import ChannelGroup, Scope, find_groups
from psap_core.inputs import describe
from psap_core.plan import PrunePlan, make_plan
from tests.core.networks import NETWORKS, by_topology

FROZEN: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "frozen_plans.json").read_text()
)
SHARES = (0.3, 0.7)  # of the largest reachable cut
ALPHAS = (0.0, 1.0)


def chosen_filters(filters: int, count: int) -> list[int]:
    """Some filters of a layer, the same ones everywhere: integer arithmetic, no generator."""
    return sorted(range(filters), key=lambda f: (f * 7919 + 13) % 104729)[:count]


def plan_of(
    groups: tuple[ChannelGroup, ...],
    cost: CostModel,
    example: torch.Tensor,
    scope: Scope,
    cut: float,
    alpha: float,
) -> PrunePlan:
    """Eq. 2 with sparsities that are counted up, and filters that are counted off."""
    sparsity = [(37 * l + 11) % 100 / 200 for l in range(len(groups))]
    floors = filter_floors(cost.filters)
    kept = filter_counts(sparsity, cost, cost.budget(cut), floors, alpha)
    pruned = {}
    for group, k in zip(groups, kept, strict=True):
        pruned[group.name] = chosen_filters(group.filters, group.filters - k)
    return make_plan(groups, pruned, cost, describe(example), scope, cut)


def test_the_record_is_of_all_networks_in_both_scopes() -> None:
    assert {*FROZEN} == {f"{name} {scope}" for name in NETWORKS for scope in ("all", "inner")}
    assert all(len(frozen["plans"]) == len(SHARES) * len(ALPHAS) for frozen in FROZEN.values())


@pytest.mark.parametrize("scope", ["all", pytest.param("inner", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", by_topology())
def test_groups_macs_and_plans_are_the_frozen_ones(name: str, scope: Scope) -> None:
    make, side, *_ = NETWORKS[name]
    model, example = make(), torch.zeros(1, 3, side, side)
    groups = find_groups(model, example, scope=scope)
    cost = macs_cost_model(model, groups, example)
    floors = filter_floors(cost.filters)
    largest_cut = 1 - cost.cost(floors) / cost.dense
    plans = {}
    for alpha in ALPHAS:
        for share in SHARES:
            cut = round(share * largest_cut, 4)
            plan = plan_of(groups, cost, example, scope, cut, alpha)
            plans[f"cut {cut} alpha {alpha}"] = {"macs": plan.macs, "digest": plan.digest}
    frozen = FROZEN[f"{name} {scope}"]
    assert [(group.name, group.filters) for group in groups] == [*frozen["filters"].items()]
    assert cost.dense == frozen["dense_macs"]
    assert plans == frozen["plans"]
