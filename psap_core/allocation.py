"""Eq. 2: adaptive layer ratios under an exact budget."""

import math
from collections.abc import Sequence
from heapq import heappop, heappush

from psap_core.cost import CostModel
from psap_core.errors import InputError


def filter_floors(
    filters: Sequence[int], min_filters: int = 2, min_filter_share: float = 0.05
) -> list[int]:
    """The fewest filters each layer keeps: max(min_filters, ceil(min_filter_share * O)), at most O."""
    return [min(o, max(min_filters, math.ceil(min_filter_share * o))) for o in filters]


def layer_prune_ratios(
    sparsity: Sequence[float],
    cost: CostModel,
    budget: float,
    floors: Sequence[int],
    alpha: float = 1.0,
) -> list[float]:
    """Prune ratio of each layer, real-valued: 1 - k_l / O_l with k_l = clamp(lambda (1 - s_l)^alpha O_l, floor_l, O_l).

    Args:
        sparsity: s_l of eq. 1, in [0, 1], one per layer.
        cost: cost of the exported network.
        budget: the most it may cost, in the cost's unit.
        floors: fewest filters of each layer.
        alpha: how strongly the ratios follow the sparsity; 0 is one ratio for all layers.

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
) -> list[int]:
    """Kept filters of each layer, whole numbers: largest remainders of eq. 2 first, as long as one more fits.

    Arguments and errors as in `layer_prune_ratios`. The result costs at most `budget`, and no layer's next
    filter would fit.
    """
    real = _real_counts(sparsity, cost, budget, floors, alpha)
    kept = [math.floor(k) for k in real]
    left = budget - cost.cost(kept)
    queue = sorted((n - k, l) for l, (n, k) in enumerate(zip(kept, real, strict=True)))
    while queue:  # what does not fit now never will: budgets shrink, marginal costs grow
        missing, l = heappop(queue)
        marginal = cost.marginal(kept, l)
        if kept[l] < cost.filters[l] and marginal <= left:
            kept[l] += 1
            left -= marginal
            heappush(queue, (missing + 1, l))
    return kept


def check_reachable(cost: CostModel, budget: float, floors: Sequence[int]) -> None:
    """Raise InputError if even the floors cost more than the budget."""
    if cost.cost(floors) > budget:
        asked, most = 1 - budget / cost.dense, 1 - cost.cost(floors) / cost.dense
        raise InputError(
            f"a cut of {asked:.4f} is unreachable: the layers' minimum filters allow {most:.4f}"
        )


def _real_counts(
    sparsity: Sequence[float], cost: CostModel, budget: float, floors: Sequence[int], alpha: float
) -> list[float]:
    check_reachable(cost, budget, floors)
    shares = [(1 - s) ** alpha for s in sparsity]
    layers = list(zip(shares, cost.filters, floors, strict=True))

    def counts(scale: float) -> list[float]:
        return [
            floor if (k := scale * share * o) < floor else o if k > o else k
            for share, o, floor in layers
        ]

    low, high = 0.0, max((1 / share for share in shares if share > 0), default=0.0)
    if cost.cost(counts(high)) <= budget:
        return counts(high)
    while low < (middle := (low + high) / 2) < high:
        if cost.cost(counts(middle)) <= budget:
            low = middle
        else:
            high = middle
    return counts(low)
