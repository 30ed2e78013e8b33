"""Eq. 2: adaptive group ratios under an exact budget."""

import math
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from psap_core.cost import CostModel
from psap_core.errors import InputError


def filter_floors(
    filters: Sequence[int],
    min_filters: int = 2,
    min_filter_share: float = 0.05,
    round_to: int = 1,
) -> list[int]:
    """The fewest filters each group keeps: max(min_filters, ceil(min_filter_share * O)), rounded up, at most O."""
    floors = []
    for o in filters:
        floor = max(min_filters, math.ceil(min_filter_share * o))
        step = _step(o, round_to)
        floors.append(min(o, math.ceil(floor / step) * step))
    return floors


def layer_prune_ratios(
    sparsity: Sequence[float],
    cost: CostModel,
    budget: float,
    floors: Sequence[int],
    alpha: float = 1.0,
) -> list[float]:
    """Prune ratio of each group, real-valued: 1 - k_l / O_l with k_l = clamp(lambda (1 - s_l)^alpha O_l, floor_l, O_l).

    Args:
        sparsity: s_l of eq. 1, in [0, 1], one per group.
        cost: cost of the exported network.
        budget: the most it may cost, in the cost's unit.
        floors: fewest filters of each group.
        alpha: how strongly the ratios follow the sparsity; 0 is one ratio for all groups.

    Raises:
        InputError: the budget cannot be met with the floors.
    """
    kept = _real_counts(sparsity, cost, budget, floors, alpha)
    return [1 - k / o for k, o in zip(kept, cost.filters, strict=True)]


def filter_counts(
    sparsity: Sequence[float],
    cost: CostModel,
    budget: float,
    floors: Sequence[int],
    alpha: float = 1.0,
    round_to: int = 1,
) -> list[int]:
    """Kept filters of each group, whole numbers: largest remainders of eq. 2 first, as long as one more fits.

    Arguments and errors as in `layer_prune_ratios`. Groups of at least 2 `round_to` filters keep a multiple of it, or
    all. The result costs at most `budget`, and no group's next filter (next multiple) would fit.
    """
    real = _real_counts(sparsity, cost, budget, floors, alpha)
    steps = [_step(o, round_to) for o in cost.filters]
    kept = []
    for k, floor, o, step in zip(real, floors, cost.filters, steps, strict=True):
        whole = o if k >= o else math.floor(k) // step * step
        kept.append(max(floor, whole))
    rest = budget - cost.cost(kept)
    queue = [(n - k, l) for l, (n, k) in enumerate(zip(kept, real, strict=True))]
    heapify(queue)
    while queue:  # what does not fit now never will: budgets shrink, marginal costs grow
        missing, l = heappop(queue)
        more = min(steps[l], cost.filters[l] - kept[l])
        marginal = cost.marginal(kept, l, more)
        if more > 0 and marginal <= rest:
            kept[l] += more
            rest -= marginal
            heappush(queue, (missing + more, l))
    return kept


def check_reachable(cost: CostModel, budget: float, floors: Sequence[int]) -> None:
    """Raise InputError if even the floors cost more than the budget."""
    if cost.cost(floors) > budget:
        cut, most = 1 - budget / cost.dense, 1 - cost.cost(floors) / cost.dense
        raise InputError(
            f"a cut of {cut:.4f} is unreachable: the groups' minimum filters allow {most:.4f}"
        )


def _step(filters: int, round_to: int) -> int:
    return round_to if filters >= 2 * round_to else 1


def _real_counts(
    sparsity: Sequence[float],
    cost: CostModel,
    budget: float,
    floors: Sequence[int],
    alpha: float,
) -> list[float]:
    check_reachable(cost, budget, floors)
    shares = [(1 - s) ** alpha for s in sparsity]
    groups = list(zip(shares, cost.filters, floors, strict=True))

    def counts(scale: float) -> list[float]:
        return [min(max(scale * share * o, floor), o) for share, o, floor in groups]

    low = 0.0
    high = max((1 / share for share in shares if share > 0), default=0.0)
    if cost.cost(counts(high)) <= budget:
        return counts(high)
    while low < (middle := (low + high) / 2) < high:
        if cost.cost(counts(middle)) <= budget:
            low = middle
        else:
            high = middle
    return counts(low)
