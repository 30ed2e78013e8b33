"""Slow twin of eq. 1-6 and of the schedule: one number at a time, written from the method's text alone.

Plain floats and lists, no tensors: a weight [O, I, kH, kW] is four nested lists, a layer's filters are their
indices, a network's layers stand in network order. Nothing here is shared with psap_core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

Filter = list[list[list[float]]]  # [I, kH, kW]
Weight = list[Filter]  # [O, I, kH, kW]
PULSE_EPSILON = 1e-4  # share of its affine at which a suspended filter stands during the pulse
Cost = Callable[
    [Sequence[float]], float
]  # kept filters of every layer -> cost of the exported network


# ---------------------------------------------------------------------------- eq. 1


def entries(weight: Weight) -> list[float]:
    found = []
    for filter_ in weight:
        for channel in filter_:
            for row in channel:
                for w in row:
                    found.append(w)
    return found


def fan_in(weight: Weight) -> int:
    return len(weight[0]) * len(weight[0][0]) * len(weight[0][0][0])


def fan_out(weight: Weight) -> int:
    return len(weight) * len(weight[0][0]) * len(weight[0][0][0])


def in_he_units(weight: Weight, fan: str) -> list[float]:
    """|w| sqrt(fan / 2) of every weight: 1 is the standard deviation that He initialisation gives."""
    count = {"in": fan_in, "out": fan_out}[fan](weight)
    return [abs(w) * math.sqrt(count / 2) for w in entries(weight)]


def root_mean_square(values: Sequence[float]) -> float:
    total = 0.0
    for value in values:
        total += value * value
    return math.sqrt(total / len(values))


def weight_sparsity_ratios(
    weights: Sequence[Weight], kappa: float, fan: str, reference: str
) -> list[float]:
    """s_l of every layer: share of its weights that are small beside the network's, or beside its own."""
    scaled = [in_he_units(weight, fan) for weight in weights]
    of_network = root_mean_square([value for layer in scaled for value in layer])
    ratios = []
    for layer in scaled:
        r = {"network": of_network, "layer": root_mean_square(layer)}[reference]
        small = 0
        for value in layer:
            if value < kappa * r:
                small += 1
        ratios.append(small / len(layer))
    return ratios


# ---------------------------------------------------------------------------- eq. 2


def cost_function(
    fixed: int, linear: Sequence[int], bilinear: Sequence[tuple[int, int, int]]
) -> Cost:
    """fixed + sum_l linear[l] k_l + sum_(l, m, c) c k_l k_m."""

    def cost(kept: Sequence[float]) -> float:
        total: float = fixed
        for layer, coefficient in enumerate(linear):
            total += coefficient * kept[layer]
        for layer, other, coefficient in bilinear:
            total += coefficient * kept[layer] * kept[other]
        return total

    return cost


def minima(filters: Sequence[int], min_filters: int, min_filter_share: float) -> list[int]:
    """The fewest filters that each layer keeps; never more than it has."""
    return [min(o, max(min_filters, math.ceil(min_filter_share * o))) for o in filters]


def keep_counts_at(
    multiplier: float,
    sparsity: Sequence[float],
    filters: Sequence[int],
    floors: Sequence[int],
    alpha: float,
) -> list[float]:
    """Real-valued kept filters of every layer for one lambda, the clamp inside."""
    kept = []
    for s, o, floor in zip(sparsity, filters, floors, strict=True):
        k = multiplier * (1 - s) ** alpha * o
        kept.append(min(max(k, float(floor)), float(o)))
    return kept


def largest_multiplier(
    sparsity: Sequence[float],
    filters: Sequence[int],
    floors: Sequence[int],
    alpha: float,
    cost: Cost,
    budget: float,
) -> float:
    """The largest lambda whose real-valued counts cost at most the budget; the floors alone must fit."""

    def fits(multiplier: float) -> bool:
        return cost(keep_counts_at(multiplier, sparsity, filters, floors, alpha)) <= budget

    if not fits(0.0):
        raise ValueError("the floors cost more than the budget")
    shares = [(1 - s) ** alpha for s in sparsity]
    all_full = max([1 / share for share in shares if share > 0], default=0.0) * (1 + 1e-12)
    if fits(all_full):
        return all_full
    low, high = 0.0, all_full
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return low
        if fits(middle):
            low = middle
        else:
            high = middle


def whole_counts(
    real: Sequence[float], filters: Sequence[int], cost: Cost, budget: float
) -> list[int]:
    """Integer counts: floor, then one filter at a time, largest remainder first, as long as one fits."""
    kept = [math.floor(k) for k in real]
    remainder = [k - math.floor(k) for k in real]
    while True:
        best = None
        for layer in range(len(kept)):
            if kept[layer] == filters[layer]:
                continue
            one_more = kept.copy()
            one_more[layer] += 1
            if cost(one_more) > budget:
                continue
            if best is None or remainder[layer] > remainder[best]:
                best = layer
        if best is None:
            return kept
        kept[best] += 1
        remainder[best] -= 1


# ---------------------------------------------------------------------------- eq. 3


def norms(weight: Weight) -> list[float]:
    """L2 norm of every filter."""
    found = []
    for filter_ in weight:
        total = 0.0
        for w in entries([filter_]):
            total += w * w
        found.append(math.sqrt(total))
    return found


def relative_norms(weight: Weight, suspended: Collection[int]) -> list[float]:
    """Norm of every filter over the mean norm of the live ones: the same ranks within a layer."""
    own = norms(weight)
    live = [own[f] for f in range(len(own)) if f not in suspended]
    mean = sum(live) / len(live)
    return [norm / mean for norm in own]


def pulse_margin(pruned: int, kept: int, minimum: int, margin: float) -> int:
    """m_l, filters proposed beyond those needed."""
    return min(max(1, math.floor(margin * pruned)), kept - minimum)


def proposed_anew(
    scores: Sequence[float], suspended: Collection[int], pruned: int, margin: int
) -> list[int]:
    """Live filters to propose besides the suspended ones: the lowest scores, sorted by index."""
    needed = pruned - len(suspended)
    if needed <= 0:
        return []
    chosen: list[int] = []
    for _ in range(needed + margin):
        lowest = None
        for f in range(len(scores)):
            if f in suspended or f in chosen:
                continue
            if lowest is None or scores[f] < scores[lowest]:
                lowest = f
        assert lowest is not None
        chosen.append(lowest)
    return sorted(chosen)


# ---------------------------------------------------------------------------- eq. 5


def utility(
    gradients: Sequence[tuple[float, float]], saved: tuple[float, float]
) -> tuple[float, float]:
    """Mean and standard error over the batches of u = - <dL/d(gamma, beta), saved (gamma, beta)>."""
    u = [-(g_gamma * saved[0] + g_beta * saved[1]) for g_gamma, g_beta in gradients]
    mean = sum(u) / len(u)
    squares = 0.0
    for value in u:
        squares += (value - mean) ** 2
    return mean, math.sqrt(squares / (len(u) - 1)) / math.sqrt(len(u))


def gradient_norm(gradients: Sequence[tuple[float, float]]) -> float:
    """Mean over batches and filters of ||dL/d(gamma, beta)||."""
    total = 0.0
    for g_gamma, g_beta in gradients:
        total += math.sqrt(g_gamma**2 + g_beta**2)
    return total / len(gradients)


# ---------------------------------------------------------------------------- eq. 6


def highest(scores: Mapping[int, float], among: Collection[int], count: int) -> list[int]:
    """The `count` filters with the highest scores, of equal ones the lower index; sorted by index."""
    chosen: list[int] = []
    for _ in range(count):
        best = None
        for f in sorted(among):
            if f in chosen:
                continue
            if best is None or scores[f] > scores[best]:
                best = f
        assert best is not None
        chosen.append(best)
    return sorted(chosen)


def restored(
    scores: Mapping[int, float], earlier: Collection[int], anew: Collection[int], pruned: int
) -> list[int]:
    """Which filters come back: of those proposed anew, or, where the count falls, of the earlier ones.

    `scores` is the utility with protection, the saved norm without it.
    """
    if anew:
        return highest(scores, anew, len(earlier) + len(anew) - pruned)
    return highest(scores, earlier, len(earlier) - pruned)


# ---------------------------------------------------------------------------- when


def epochs_of_share(share: float, total_epochs: int) -> int:
    return math.floor(share * total_epochs + 0.5)


def schedule_from_shares(
    total_epochs: int, start: float, ramp_end: float, freeze: float
) -> tuple[int, int, int]:
    first = max(1, epochs_of_share(start, total_epochs))
    full = max(first, epochs_of_share(ramp_end, total_epochs))
    last = max(full, epochs_of_share(freeze, total_epochs))
    return first, full, last


def steps(start: int, freeze: int, interval: int) -> list[int]:
    """Completed epochs at which a pruning step happens."""
    found = []
    epoch = start
    while epoch < freeze:
        found.append(epoch)
        epoch += interval
    return [*found, freeze]


def asked_cut(epoch: int, target: float, start: int, ramp_end: int, interval: int) -> float:
    """B(e), the cut asked for at a step."""
    x = min(1.0, (epoch - start + interval) / (ramp_end - start + interval))
    return target * (1 - (1 - x) ** 3)
