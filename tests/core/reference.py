"""Slow twin of eq. 1-6 and of the schedule: one number at a time, written from the method's text alone.

Plain floats and lists, no tensors: a weight [O, I, kH, kW] is four nested lists, a group's filters are their indices, a
network's groups stand in network order. Nothing here is shared with psap_core.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

Filter = list[list[list[float]]]  # [I, kH, kW]
Weight = list[Filter]  # [O, I, kH, kW]
PULSE_EPSILON = 1e-4  # share of its silencers at which a suspended filter stands during the pulse
Cost = Callable[
    [Sequence[float]], float
]  # kept filters of every group -> cost of the exported network


@dataclass(frozen=True)
class Writer:
    """A layer that writes a group's channels: its whole weight, and which of its rows each filter owns."""

    weight: Weight
    rows: list[list[int]]


Group = list[Writer]


def whole(weight: Weight) -> Writer:
    """A layer each row of which is a filter."""
    return Writer(weight, [[row] for row in range(len(weight))])


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


def group_in_he_units(group: Group, fan: str) -> list[float]:
    """The same of every weight with which any layer writes the group."""
    found = []
    for writer in group:
        scaled = in_he_units(writer.weight, fan)
        size = len(scaled) // len(writer.weight)
        for rows in writer.rows:
            for row in rows:
                found += scaled[row * size : (row + 1) * size]
    return found


def weight_sparsity_ratios(
    groups: Sequence[Group], kappa: float, fan: str, reference: str
) -> list[float]:
    """s_l of every group: share of its weights that are small beside the network's, or beside its own."""
    scaled = [group_in_he_units(group, fan) for group in groups]
    of_network = root_mean_square([value for group in scaled for value in group])
    ratios = []
    for group in scaled:
        r = {"network": of_network, "layer": root_mean_square(group)}[reference]
        small = 0
        for value in group:
            if value < kappa * r:
                small += 1
        ratios.append(small / len(group))
    return ratios


# ---------------------------------------------------------------------------- eq. 2


def cost_function(
    fixed: int, linear: Sequence[int], bilinear: Sequence[tuple[int, int, int]]
) -> Cost:
    """fixed + sum_l linear[l] k_l + sum_(l, m, c) c k_l k_m; l may be m, where a layer reads what it writes."""

    def cost(kept: Sequence[float]) -> float:
        total: float = fixed
        for layer, coefficient in enumerate(linear):
            total += coefficient * kept[layer]
        for layer, other, coefficient in bilinear:
            total += coefficient * kept[layer] * kept[other]
        return total

    return cost


@dataclass(frozen=True)
class Side:
    """What a layer reads, or writes: entries of groups side by side, and entries of none."""

    parts: list[tuple[int, int]]  # (group, entries of each of its filters)
    others: int

    def entries(self, kept: Sequence[float]) -> float:
        total: float = self.others
        for group, per_filter in self.parts:
            total += per_filter * kept[group]
        return total


def cost_of_layers(layers: Sequence[tuple[int, Side, Side]]) -> Cost:
    """The sum over layers of coefficient * inputs * outputs."""

    def cost(kept: Sequence[float]) -> float:
        total: float = 0
        for coefficient, inputs, outputs in layers:
            total += coefficient * inputs.entries(kept) * outputs.entries(kept)
        return total

    return cost


def step_of(filters: int, round_to: int) -> int:
    """Filters go and come in multiples of this: of `round_to` where the group has at least twice as many."""
    return round_to if filters >= 2 * round_to else 1


def minima(
    filters: Sequence[int], min_filters: int, min_filter_share: float, round_to: int = 1
) -> list[int]:
    """The fewest filters that each group keeps, a multiple of its step; never more than it has."""
    found = []
    for o in filters:
        fewest = max(min_filters, math.ceil(min_filter_share * o))
        while fewest % step_of(o, round_to):
            fewest += 1
        found.append(min(o, fewest))
    return found


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
    real: Sequence[float],
    filters: Sequence[int],
    cost: Cost,
    budget: float,
    floors: Sequence[int],
    round_to: int = 1,
) -> list[int]:
    """Integer counts: down to a multiple, then one multiple at a time, largest remainder first, as long as one fits."""
    steps = [step_of(o, round_to) for o in filters]
    kept = []
    for k, o, floor, step in zip(real, filters, floors, steps, strict=True):
        count = math.floor(k)
        while count % step and count != o:
            count -= 1
        kept.append(max(count, floor))
    remainder = [k - count for k, count in zip(real, kept, strict=True)]
    while True:
        best = None
        for group in range(len(kept)):
            if kept[group] == filters[group]:
                continue
            more = kept.copy()
            more[group] = min(kept[group] + steps[group], filters[group])
            if cost(more) > budget:
                continue
            if best is None or remainder[group] > remainder[best]:
                best = group
        if best is None:
            return kept
        added = min(steps[best], filters[best] - kept[best])
        kept[best] += added
        remainder[best] -= added


# ---------------------------------------------------------------------------- eq. 3


def norms(weight: Weight) -> list[float]:
    """L2 norm of every row."""
    return norms_of_writer(whole(weight))


def norms_of_writer(writer: Writer) -> list[float]:
    """L2 norm of all that each filter owns in one layer."""
    found = []
    for rows in writer.rows:
        total = 0.0
        for w in entries([writer.weight[row] for row in rows]):
            total += w * w
        found.append(math.sqrt(total))
    return found


def joint_norms(group: Group) -> list[float]:
    """Of one writer its norms; of several the root of the sum of squares of each one's norms over their mean."""
    if len(group) == 1:
        return norms_of_writer(group[0])
    squares = [0.0] * len(group[0].rows)
    for writer in group:
        own = norms_of_writer(writer)
        mean = sum(own) / len(own)
        for f, norm in enumerate(own):
            squares[f] += (norm / mean) ** 2 if mean else 0.0
    return [math.sqrt(square) for square in squares]


def relative_norms(group: Group, suspended: Collection[int]) -> list[float]:
    """Norm of every filter over the mean norm of the live ones: the same ranks within a group."""
    own = joint_norms(group)
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


def utility(gradients: Sequence[Sequence[float]], saved: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error over the batches of u = - <dL/ds, saved s>, s all that silences the filter."""
    u = []
    for gradient in gradients:
        product = 0.0
        for g, s in zip(gradient, saved, strict=True):
            product += g * s
        u.append(-product)
    mean = sum(u) / len(u)
    squares = 0.0
    for value in u:
        squares += (value - mean) ** 2
    return mean, math.sqrt(squares / (len(u) - 1)) / math.sqrt(len(u))


def gradient_norm(gradients: Sequence[Sequence[float]]) -> float:
    """Mean over batches and filters of ||dL/ds||."""
    total = 0.0
    for gradient in gradients:
        square = 0.0
        for g in gradient:
            square += g * g
        total += math.sqrt(square)
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
