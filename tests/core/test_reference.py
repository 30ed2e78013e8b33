"""psap_core's fast functions against their slow twin, and both against numbers worked out by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from _pytest.mark import ParameterSet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from psap_core.allocation import filter_counts, filter_floors, layer_prune_ratios
from psap_core.cost import CostModel
from psap_core.pruner import PSAP, PruneStep
from psap_core.schedule import Schedule, make_schedule
from psap_core.scoring import filter_norms, joint_scores, propose, pulse_margin
from psap_core.sparsity import FilterRows, weight_sparsity_ratio
from psap_core.supervision import choose_restored
from tests.core import reference

drawn = settings(deadline=None, derandomize=True, max_examples=150)

# ---------------------------------------------------------------------------- eq. 1

# In He units (fan_in 2 and 8: times 1 and 2) the layers are 1, .1, .5, 2 and .8, seven times .1.
# R^2: network (5.26 + .71) / 12, R .705; layer a 5.26 / 4, R 1.147; layer b .71 / 8, R .298.
A = torch.tensor([[1.0, 0.1], [0.5, -2.0]])[:, :, None, None]
B = torch.tensor([[0.4, 0.05, -0.05, 0.05, 0.05, 0.05, 0.05, 0.05]])[:, :, None, None]


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        ({}, (1 / 4, 7 / 8)),  # below .353: .1; .1 seven times
        ({"kappa": 0.8}, (2 / 4, 7 / 8)),  # below .564: .1 .5; .1 seven times
        ({"kappa": 1.2}, (2 / 4, 8 / 8)),  # below .846
        ({"kappa": 2.0}, (3 / 4, 8 / 8)),  # below 1.41: 1 too
        ({"kappa": 2.9}, (4 / 4, 8 / 8)),  # below 2.05: all
        ({"kappa": 0.1}, (0.0, 0.0)),  # below .0705: none
        ({"fan": "out"}, (1 / 4, 8 / 8)),  # b times sqrt(1/2): .283, .035; R .668, below .334
        ({"reference": "layer"}, (2 / 4, 7 / 8)),  # below .573 in a, .149 in b
        ({"kappa": 1.2, "reference": "layer"}, (3 / 4, 7 / 8)),  # below 1.376; .357
    ],
)
def test_sparsity_by_hand(options: dict, by_hand: tuple[float, float]) -> None:
    ratios = weight_sparsity_ratio({"a": [FilterRows.of(A)], "b": [FilterRows.of(B)]}, **options)
    settings_ = {"kappa": 0.5, "fan": "in", "reference": "network"} | options
    groups = [[reference.whole(weight.tolist())] for weight in (A, B)]
    assert reference.weight_sparsity_ratios(groups, **settings_) == list(by_hand)
    assert ratios == {"a": by_hand[0], "b": by_hand[1]}


# In He units (fan_in 8: times 2) .1 fifteen times and 2.
C = torch.tensor([[0.05] * 8, [0.05] * 7 + [-1.0]])[:, :, None, None]


@pytest.mark.parametrize(
    ("options", "by_hand"),
    [
        # R^2 (5.26 + 4.15 + .71) / 28, R .601
        ({}, (16 / 20, 7 / 8)),  # below .301: .1 sixteen times
        ({"kappa": 1.0}, (17 / 20, 7 / 8)),  # below .601: .5 too
        ({"reference": "layer"}, (16 / 20, 7 / 8)),  # R .686 and .298
        ({"kappa": 1.5, "reference": "layer"}, (18 / 20, 7 / 8)),  # below 1.03: all but 2 twice
    ],
)
def test_sparsity_of_two_writers_by_hand(options: dict, by_hand: tuple[float, float]) -> None:
    """a is written by two layers, each with fans of its own."""
    rows = {"a": [FilterRows.of(A), FilterRows.of(C)], "b": [FilterRows.of(B)]}
    settings_ = {"kappa": 0.5, "fan": "in", "reference": "network"} | options
    groups = [[reference.whole(w.tolist()) for w in writers] for writers in ((A, C), (B,))]
    assert reference.weight_sparsity_ratios(groups, **settings_) == pytest.approx(by_hand)
    assert weight_sparsity_ratio(rows, **options) == pytest.approx(
        {"a": by_hand[0], "b": by_hand[1]}
    )


def test_a_weight_at_the_threshold_is_not_small() -> None:
    weight = torch.full((3, 8, 1, 1), 0.5)  # in He units 1, so R = 1, both exact
    assert weight_sparsity_ratio({"a": [FilterRows.of(weight)]}, kappa=1.0) == {"a": 0.0}
    group = [reference.whole(weight.tolist())]
    assert reference.weight_sparsity_ratios([group], 1.0, "in", "network") == [0.0]
    zeros = FilterRows.of(torch.zeros(3, 8, 1, 1))
    assert weight_sparsity_ratio({"a": [zeros]}) == {"a": 0.0}


@dataclass(frozen=True)
class DrawnWriter:
    """A layer's weight, and int64 [filters, n], the rows that each filter owns."""

    weight: Tensor
    index: Tensor

    def fast(self) -> FilterRows:
        all_rows = FilterRows.of(self.weight)
        return FilterRows(self.weight[self.index], all_rows.fan_in, all_rows.fan_out)

    def slow(self) -> reference.Writer:
        return reference.Writer(self.weight.tolist(), self.index.tolist())


@st.composite
def networks(draw: st.DrawFn) -> dict[str, list[DrawnWriter]]:
    """One to four groups of one to three writers with random widths, kernels and magnitudes, some partly zero.

    A filter owns one or two rows of a writer; some writers have rows that belong to no filter.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    groups = {}
    for group in range(draw(st.integers(1, 4))):
        filters = draw(st.integers(1, 6))
        writers = []
        for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
            kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 5)]))
            each, others = draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([0, 0, 3]))
            shape = (filters * each + others, draw(st.integers(1, 5)), *kernel)
            weight = torch.randn(shape, generator=generator) * draw(
                st.sampled_from([1e-3, 0.1, 0.2, 1.0, 30.0])
            )
            if draw(st.booleans()):
                weight[torch.rand(shape, generator=generator) < 0.3] = 0.0
            rows = torch.randperm(len(weight), generator=generator)[: filters * each]
            writers.append(DrawnWriter(weight, rows.view(filters, each)))
        groups[f"group{group}"] = writers
    return groups


@given(
    networks(),
    st.sampled_from([1e-4, 0.25, 0.5, 1.0, 3.0, 1e4]),
    st.sampled_from(["in", "out"]),
    st.sampled_from(["network", "layer"]),
)
@drawn
def test_sparsity(
    groups: dict[str, list[DrawnWriter]], kappa: float, fan: str, against: str
) -> None:
    rows = {name: [writer.fast() for writer in writers] for name, writers in groups.items()}
    fast = weight_sparsity_ratio(rows, kappa=kappa, fan=fan, reference=against)
    slow = [[writer.slow() for writer in writers] for writers in groups.values()]
    # A weight within rounding of the threshold may fall on either side; the twin rounds less.
    at_least, at_most = (
        reference.weight_sparsity_ratios(slow, kappa * (1 + off), fan, against)
        for off in (-1e-6, 1e-6)
    )
    assert list(fast) == list(groups)
    for ratio, low, high in zip(fast.values(), at_least, at_most, strict=True):
        assert low - 1e-12 <= ratio <= high + 1e-12


# ---------------------------------------------------------------------------- eq. 2


def by_filters(*filters: int) -> CostModel:
    return CostModel(filters, 0, (1,) * len(filters), ())


WITH_FIXED = CostModel((2, 8, 4), 8, (10, 4, 2), ())


@pytest.mark.parametrize(
    ("cost", "sparsity", "alpha", "floors", "budget", "real", "whole"),
    [
        # 10 lambda = 6; remainders .2 and .8
        (by_filters(4, 8), (0.5, 0.0), 1.0, (1, 1), 6.0, (1.2, 4.8), (1, 5)),
        # the clamp is inside: layer 0 stands at its floor 2, 8 lambda = 4.5
        (by_filters(4, 8), (0.5, 0.0), 1.0, (2, 2), 6.5, (2.0, 4.5), (2, 4)),
        # alpha 2: 9 lambda = 6 would leave .67 in layer 0, so 1 and 8 lambda = 5.2
        (by_filters(4, 8), (0.5, 0.0), 2.0, (1, 1), 6.2, (1.0, 5.2), (1, 5)),
        # alpha 0: one ratio for all, whatever the sparsity; remainders .1 and .2, only one fits
        (by_filters(4, 8), (0.5, 1.0), 0.0, (1, 1), 7.3, (2.4333333, 4.8666667), (2, 5)),
        # full layers take no more: 2 + lambda = 9.4
        (by_filters(2, 10), (0.0, 0.9), 1.0, (1, 1), 9.4, (2.0, 7.4), (2, 7)),
        # a layer that is small throughout keeps its floor, however large lambda is
        (by_filters(5, 9), (1.0, 0.0), 1.0, (2, 2), 10.5, (2.0, 8.5), (2, 8)),
        # everything fits
        (by_filters(5, 9), (0.3, 0.6), 1.0, (1, 1), 14.0, (5.0, 9.0), (5, 9)),
        # 3 k0 + 2 k0 k1: 12 lambda + 32 lambda^2 = 20, lambda 5/8; from (2, 2) = 14 the tie goes to
        # layer 0, but (3, 2) = 21 does not fit, (2, 3) = 18 does, (2, 4) = 22 and (3, 3) = 27 do not
        (
            CostModel((4, 4), 0, (3, 0), ((0, 1, 2),)),
            (0.0, 0.0),
            1.0,
            (1, 1),
            20.0,
            (2.5, 2.5),
            (2, 3),
        ),
        # 44 lambda = 30; layer 0 does not fit; layer 1 takes two, its remainder below zero
        (
            CostModel((4, 4), 0, (10, 1), ()),
            (0.0, 0.0),
            1.0,
            (1, 1),
            30.0,
            (2.7272727, 2.7272727),
            (2, 4),
        ),
        # the tie goes to the first in network order; 13 of fixed cost
        (CostModel((5, 5), 13, (2, 2), ()), (0.2, 0.2), 1.0, (1, 1), 24.0, (2.75, 2.75), (3, 2)),
        # three layers, 30 lambda = 17, remainders .67 each; one each, in network order, while it fits
        (by_filters(10, 10, 10), (0, 0, 0), 1.0, (1, 1, 1), 17.0, (5.6666667,) * 3, (6, 6, 5)),
        # 8 + 60 lambda = 44, lambda .6; (1, 4, 2) = 38, .8 first: (1, 5, 2) = 42, then .4: (1, 5, 3) = 44
        (WITH_FIXED, (0, 0, 0), 1.0, (1, 1, 1), 44.0, (1.2, 4.8, 2.4), (1, 5, 3)),
        # a layer reads what it writes: 2 k^2 + 4 k = 58.5, k 4.5; 4 cost 48, one more 22
        (CostModel((8,), 0, (4,), ((0, 0, 2),)), (0.0,), 1.0, (1,), 58.5, (4.5,), (4,)),
        (CostModel((8,), 0, (4,), ((0, 0, 2),)), (0.0,), 1.0, (1,), 70.0, (5.0,), (5,)),
        # a concatenation of both is read by layer 1: 3 k0 k1 + 3 k1^2 = 48 at k = lambda (4, 4)
        (
            CostModel((4, 4), 0, (0, 0), ((1, 0, 3), (1, 1, 3))),
            (0.0, 0.0),
            1.0,
            (1, 1),
            48.0,
            (2.8284271, 2.8284271),
            (4, 2),
        ),
    ],
)
def test_counts_by_hand(
    cost: CostModel,
    sparsity: tuple[float, ...],
    alpha: float,
    floors: tuple[int, ...],
    budget: float,
    real: tuple[float, ...],
    whole: tuple[int, ...],
) -> None:
    ratios = layer_prune_ratios(sparsity, cost, budget, floors, alpha)
    kept = [(1 - r) * o for r, o in zip(ratios, cost.filters, strict=True)]
    assert kept == pytest.approx(list(real), abs=1e-6)
    assert filter_counts(sparsity, cost, budget, floors, alpha) == list(whole)
    twin_real, twin_whole = twin_counts(cost, sparsity, alpha, floors, budget)
    assert twin_real == pytest.approx(list(real), abs=1e-6)
    assert twin_whole == list(whole)


@pytest.mark.parametrize(
    ("filters", "budget", "floors", "real", "whole"),
    [
        # real 24 and 12: 24 is a multiple of 8, 12 is not; nothing is left for 8
        ((32, 16), 36.0, (8, 8), (24.0, 12.0), (24, 8)),
        # real 26.67 and 13.33; 24 + 8, remainders 2.67 and 5.33
        ((32, 16), 40.0, (8, 8), (26.6666667, 13.3333333), (24, 16)),
        # a group below 16 takes single filters, before and after
        ((32, 15), 40.0, (8, 2), (27.2340426, 12.7659574), (24, 15)),
        # the last multiple of a group of 18 is 2 filters, and fits where 8 would not
        ((18, 16), 27.0, (8, 8), (14.2941176, 12.7058824), (18, 8)),
        # as many as there are, although that is no multiple
        ((18, 15), 33.0, (8, 2), (18.0, 15.0), (18, 15)),
    ],
)
def test_multiples_of_eight_by_hand(
    filters: tuple[int, ...],
    budget: float,
    floors: tuple[int, ...],
    real: tuple[float, ...],
    whole: tuple[int, ...],
) -> None:
    cost = by_filters(*filters)
    sparsity = (0.0,) * len(filters)
    assert filter_floors(filters, round_to=8) == list(floors)
    assert reference.minima(filters, 2, 0.05, round_to=8) == list(floors)
    twin_real, twin_whole = twin_counts(cost, sparsity, 1.0, floors, budget, round_to=8)
    assert twin_real == pytest.approx(list(real), abs=1e-6)
    assert twin_whole == list(whole)
    assert filter_counts(sparsity, cost, budget, floors, round_to=8) == list(whole)


def twin_counts(
    cost: CostModel,
    sparsity: tuple[float, ...],
    alpha: float,
    floors: tuple[int, ...],
    budget: float,
    off: float = 0.0,
    round_to: int = 1,
) -> tuple[list[float], list[int]]:
    """Real and whole counts of the twin, with lambda moved by the factor 1 + off."""
    price = reference.cost_function(cost.fixed, cost.linear, cost.bilinear)
    found = reference.largest_multiplier(sparsity, cost.filters, floors, alpha, price, budget)
    real = reference.keep_counts_at(found * (1 + off), sparsity, cost.filters, floors, alpha)
    return real, reference.whole_counts(real, cost.filters, price, budget, floors, round_to)


Allocation = tuple[CostModel, tuple[float, ...], float, tuple[int, ...], float, int]


@st.composite
def allocations(draw: st.DrawFn) -> Allocation:
    """A cost model, sparsities, alpha, floors, a budget between the floors' cost and the dense cost, and round_to."""
    n = draw(st.integers(1, 5))
    filters = draw(st.tuples(*[st.integers(1, 40)] * n))
    if draw(st.booleans()):
        cost = by_filters(*filters)
    else:
        linear = draw(st.tuples(*[st.integers(1, 500)] * n))
        one = st.integers(0, n - 1)
        bilinear = draw(st.lists(st.tuples(one, one, st.integers(1, 90)), max_size=4))
        cost = CostModel(filters, draw(st.sampled_from([0, 7, 1000])), linear, tuple(bilinear))
    one_sparsity = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 0.3]), st.floats(0, 1))
    sparsity = draw(st.tuples(*[one_sparsity] * n))
    alpha = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0]))
    smallest, share = draw(
        st.sampled_from([(1, 0.0), (2, 0.05), (3, 0.4), (5, 0.9), (24, 0.0), (1, 1.0)])
    )
    round_to = draw(st.sampled_from([1, 1, 2, 8]))
    floors = tuple(reference.minima(filters, smallest, share, round_to))
    least, dense = cost.cost(floors), cost.cost(filters)
    where = draw(st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1)))
    budget = min(least + where * (dense - least), dense)
    return cost, sparsity, alpha, floors, budget, round_to


@given(allocations())
@drawn
def test_prune_ratios(drawn_case: Allocation) -> None:
    cost, sparsity, alpha, floors, budget, _ = drawn_case
    real, _ = twin_counts(cost, sparsity, alpha, floors, budget)
    ratios = layer_prune_ratios(sparsity, cost, budget, floors, alpha)
    assert ratios == pytest.approx(
        [1 - k / o for k, o in zip(real, cost.filters, strict=True)], abs=1e-7
    )


@given(allocations())
@drawn
def test_counts(drawn_case: Allocation) -> None:
    cost, sparsity, alpha, floors, budget, round_to = drawn_case
    counts = filter_counts(sparsity, cost, budget, floors, alpha, round_to)
    # Where a real count is a whole number the last bit of lambda decides; elsewhere the three agree.
    near = [
        twin_counts(cost, sparsity, alpha, floors, budget, off, round_to)[1]
        for off in (0.0, -1e-9, 1e-9)
    ]
    assert counts in near


@given(allocations(), st.data())
@drawn
def test_cost(drawn_case: Allocation, data: st.DataObject) -> None:
    cost = drawn_case[0]
    price = reference.cost_function(cost.fixed, cost.linear, cost.bilinear)
    kept = [data.draw(st.integers(1, o)) for o in cost.filters]
    more = data.draw(st.integers(1, 9))
    assert cost.cost(kept) == price(kept)
    assert cost.dense == price(cost.filters)
    for group in range(len(kept)):
        then = [k + more * (m == group) for m, k in enumerate(kept)]
        assert cost.marginal(kept, group, more) == price(then) - price(kept)
        one = [k + (m == group) for m, k in enumerate(kept)]
        assert cost.marginal(kept, group) == price(one) - price(kept)


S, D, Z = 0, 1, 2  # the stream, a layer beside it, one that reads both


def both(parts: list[tuple[int, int]], others: int = 0) -> reference.Side:
    return reference.Side(parts, others)


# Image, then a stream that a layer reads and writes, and concatenations with what is of no group.
LAYERS = [
    (9 * 64, both([], 3), both([(S, 1)])),
    (9 * 64, both([(S, 1)]), both([(D, 1)])),
    (9 * 64, both([(S, 1), (D, 1)]), both([(S, 1)])),
    (64, both([(S, 1), (D, 2)], 5), both([(Z, 3)], 2)),
    (1, both([(Z, 12), (S, 1)], 7), both([], 10)),
]


def expanded(filters: tuple[int, ...], layers: list) -> CostModel:
    """Every product multiplied out, as CostModel wants it."""
    fixed, linear, bilinear = 0, [0] * len(filters), []
    for coefficient, inputs, outputs in layers:
        fixed += coefficient * inputs.others * outputs.others
        for l, a in outputs.parts:
            linear[l] += coefficient * a * inputs.others
        for m, b in inputs.parts:
            linear[m] += coefficient * b * outputs.others
        bilinear += [(l, m, coefficient * a * b) for l, a in outputs.parts for m, b in inputs.parts]
    return CostModel(filters, fixed, tuple(linear), tuple(bilinear))


@given(st.tuples(*[st.integers(1, 20)] * 3))
@drawn
def test_cost_of_streams_and_concatenations(kept: tuple[int, ...]) -> None:
    cost, price = expanded((20, 20, 20), LAYERS), reference.cost_of_layers(LAYERS)
    assert cost.cost(kept) == price(kept)
    for group in range(3):
        then = [k + 4 * (m == group) for m, k in enumerate(kept)]
        assert cost.marginal(kept, group, 4) == price(then) - price(kept)


@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=4),
    st.integers(1, 70),
    st.sampled_from([0, 0.05, 0.1, 0.5, 1]),
    st.sampled_from([1, 2, 8, 16]),
)
@drawn
def test_floors(filters: list[int], smallest: int, share: float, round_to: int) -> None:
    expected = reference.minima(filters, smallest, share, round_to)
    assert filter_floors(filters, smallest, share, round_to) == expected


def test_floors_by_hand() -> None:
    filters = [1, 2, 16, 40, 41, 64]
    assert filter_floors(filters) == reference.minima(filters, 2, 0.05) == [1, 2, 2, 2, 3, 4]
    assert (
        filter_floors(filters, 16, 0.0)
        == reference.minima(filters, 16, 0.0)
        == [1, 2, 16, 16, 16, 16]
    )


# ---------------------------------------------------------------------------- eq. 3


def test_norms_by_hand() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 1.0], [6.0, -8.0], [0.0, 0.0]])[:, :, None, None]
    assert (
        filter_norms(weight).tolist() == reference.norms(weight.tolist()) == [5.0, 1.0, 10.0, 0.0]
    )
    # live are 5, 1 and 0
    group = [reference.whole(weight.tolist())]
    assert reference.relative_norms(group, [2]) == [2.5, 0.5, 5.0, 0.0]


def test_joint_norms_by_hand() -> None:
    """Of two writers, the second a thousand times as loud."""
    first = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 6.0]])[:, :, None, None]
    second = torch.tensor([[2000.0], [1000.0], [0.0]])[:, :, None, None]
    # 5 1 6 over 4; 2000 1000 0 over 1000
    by_hand = [math.hypot(1.25, 2.0), math.hypot(0.25, 1.0), 1.5]
    scores = joint_scores([filter_norms(first), filter_norms(second)])
    assert scores.tolist() == pytest.approx(by_hand)
    group = [reference.whole(weight.tolist()) for weight in (first, second)]
    assert reference.joint_norms(group) == pytest.approx(by_hand)
    # Two rows a filter: of the first four rows, filter 0 owns 0 and 3, filter 1 owns 1 and 2.
    index = torch.tensor([[0, 3], [1, 2]])
    weight = torch.tensor([[3.0], [5.0], [12.0], [4.0]])[:, :, None, None]
    assert filter_norms(weight[index]).tolist() == [5.0, 13.0]
    writer = reference.Writer(weight.tolist(), index.tolist())
    assert reference.norms_of_writer(writer) == [5.0, 13.0]


def test_a_writer_of_zeros_says_nothing() -> None:
    loud, silent = torch.tensor([3.0, 1.0]), torch.zeros(2)
    assert joint_scores([loud, silent]).tolist() == [1.5, 0.5]


@given(networks())
@drawn
def test_norms(groups: dict[str, list[DrawnWriter]]) -> None:
    for writers in groups.values():
        own = joint_scores([filter_norms(writer.fast().rows) for writer in writers])
        assert own.shape == (len(writers[0].index),)
        slow = reference.joint_norms([writer.slow() for writer in writers])
        assert own.tolist() == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize(
    ("pruned", "kept", "minimum", "margin", "by_hand"),
    [
        (10, 22, 2, 0.3, 3),
        (11, 21, 2, 0.3, 3),  # 3.3
        (2, 30, 2, 0.3, 1),  # .6, at least 1
        (20, 4, 2, 0.3, 2),  # 6, but only two above the minimum
        (30, 2, 2, 0.3, 0),  # nothing above the minimum
        (10, 22, 2, 1.0, 10),
        (10, 22, 2, 0.0, 1),
        (19, 81, 2, 0.99, 18),  # 18.81
    ],
)
def test_margin_by_hand(pruned: int, kept: int, minimum: int, margin: float, by_hand: int) -> None:
    assert pulse_margin(pruned, kept, minimum, margin) == by_hand
    assert reference.pulse_margin(pruned, kept, minimum, margin) == by_hand


def test_proposal_by_hand() -> None:
    scores = [0.9, 0.1, 0.5, 0.5, 1.7, 0.2]
    for suspended, pruned, margin, by_hand in [
        ([], 2, 0, [1, 5]),
        ([], 2, 1, [1, 2, 5]),  # .5 twice: the lower index
        ([1], 3, 1, [2, 3, 5]),
        ([4, 0], 3, 1, [1, 5]),  # suspended ones stay whatever their score
        ([1, 4], 2, 3, []),  # none needed, no margin
        ([1, 4, 5], 2, 3, []),
    ]:
        assert list(propose(torch.tensor(scores), suspended, pruned, margin)) == by_hand
        assert reference.proposed_anew(scores, suspended, pruned, margin) == by_hand


tied_scores = st.one_of(st.integers(-2, 2).map(float), st.floats(-1, 1))


@given(st.data(), st.integers(1, 16), st.one_of(st.sampled_from([0.0, 0.3, 1.0]), st.floats(0, 1)))
@drawn
def test_margin_proposal_and_protection(data: st.DataObject, filters: int, margin: float) -> None:
    minimum = data.draw(st.integers(1, filters))
    pruned = data.draw(st.integers(0, filters - minimum))
    earlier = data.draw(st.sets(st.integers(0, filters - 1), max_size=filters - minimum))
    scores = data.draw(st.lists(tied_scores, min_size=filters, max_size=filters))

    extra = pulse_margin(pruned, filters - pruned, minimum, margin)
    assert extra == reference.pulse_margin(pruned, filters - pruned, minimum, margin)
    anew = propose(torch.tensor(scores, dtype=torch.float64), sorted(earlier), pruned, extra)
    assert list(anew) == reference.proposed_anew(scores, earlier, pruned, extra)

    proposed = sorted({*earlier, *anew})
    utility = {f: data.draw(tied_scores) for f in proposed}
    back = choose_restored(utility, sorted(earlier), anew, pruned)
    assert sorted(back) == reference.restored(utility, earlier, anew, pruned)
    assert len(proposed) - len(back) == pruned
    if anew:
        assert len(back) == extra
        assert set(back) <= set(anew)


# ---------------------------------------------------------------------------- eq. 5 and 6


def test_utility_by_hand() -> None:
    # of gamma and beta: u = -(2 g_gamma - g_beta): -1, -3, -8; deviations 3, 1, -4; sample variance 26 / 2
    mean, error = reference.utility([(1.0, 1.0), (2.0, 1.0), (3.0, -2.0)], (2.0, -1.0))
    assert mean == -4.0
    assert error == pytest.approx(math.sqrt(13 / 3))
    # of two affines: every one has its part, -(2 - 1) - (3 * 4 + 0)
    mean, error = reference.utility([(1.0, 1.0, 4.0, 9.0)] * 2, (2.0, -1.0, 3.0, 0.0))
    assert (mean, error) == (-13.0, 0.0)
    assert reference.gradient_norm([(3.0, 4.0), (2.0, 4.0, 4.0)]) == 5.5


def test_protection_by_hand() -> None:
    utility = {0: 0.5, 2: -1.0, 3: 0.5, 5: 2.0, 6: 0.0}
    for earlier, anew, pruned, by_hand in [
        ([0, 2], [3, 5, 6], 4, [5]),
        ([2], [0, 3, 5, 6], 3, [0, 5]),  # .5 twice: the lower index
        ([0, 5], [2, 3, 6], 4, [3]),  # earlier ones do not come back, whatever their utility
        ([0, 2, 3, 5, 6], [], 3, [0, 5]),  # the count falls by two
        ([0, 2, 3, 5, 6], [], 0, [0, 2, 3, 5, 6]),
        ([0, 2, 3], [], 3, []),
        ([0, 2], [5], 3, []),  # no margin
    ]:
        assert sorted(choose_restored(utility, earlier, anew, pruned)) == by_hand
        assert reference.restored(utility, earlier, anew, pruned) == by_hand


# ---------------------------------------------------------------------------- when


DEFAULT_SHARES = (0.05, 0.40, 0.50)


@pytest.mark.parametrize(
    ("total", "shares", "by_hand"),
    [
        (1, DEFAULT_SHARES, (1, 1, 1)),
        (2, DEFAULT_SHARES, (1, 1, 1)),
        (15, DEFAULT_SHARES, (1, 6, 8)),
        (30, DEFAULT_SHARES, (2, 12, 15)),
        (200, DEFAULT_SHARES, (10, 80, 100)),
        (10, (0.05, 0.25, 0.45), (1, 3, 5)),  # .5, 2.5 and 4.5 go up
        (10, (0.5, 0.4, 0.3), (5, 5, 5)),  # what comes too early waits
        (10, (0.0, 0.5, 0.3), (1, 5, 5)),
    ],
)
def test_schedule_by_hand(
    total: int, shares: tuple[float, float, float], by_hand: tuple[int, int, int]
) -> None:
    schedule = make_schedule(total, *shares)
    assert (schedule.start, schedule.ramp_end, schedule.freeze) == by_hand
    assert reference.schedule_from_shares(total, *shares) == by_hand


@pytest.mark.parametrize(
    ("epochs", "interval", "by_hand"),
    [
        (
            (2, 12, 15),
            1,
            {1: 0.0, 2: 1 - (10 / 11) ** 3, 11: 1 - (1 / 11) ** 3, 12: 1.0, 15: 1.0, 16: 0.0},
        ),
        ((2, 6, 9), 3, {2: 1 - (4 / 7) ** 3, 3: 0.0, 5: 1 - (1 / 7) ** 3, 8: 1.0, 9: 1.0, 11: 0.0}),
        ((4, 4, 4), 1, {3: 0.0, 4: 1.0, 5: 0.0}),
        ((4, 4, 4), 7, {3: 0.0, 4: 1.0, 5: 0.0, 11: 0.0}),
        ((1, 1, 3), 5, {1: 1.0, 2: 0.0, 3: 1.0}),
    ],
)
def test_ramp_by_hand(
    epochs: tuple[int, int, int], interval: int, by_hand: dict[int, float]
) -> None:
    start, ramp_end, freeze = epochs
    schedule = Schedule(20, start, ramp_end, freeze, interval)
    for epoch, share in by_hand.items():
        assert (
            schedule.is_step(epoch)
            == (epoch in reference.steps(start, freeze, interval))
            == (share > 0)
        )
        if share:
            half = reference.asked_cut(epoch, 0.5, start, ramp_end, interval)
            assert schedule.ramp(epoch) == pytest.approx(share, abs=1e-12)
            assert half == pytest.approx(share / 2, abs=1e-12)


share = st.one_of(st.sampled_from([0.0, 0.05, 0.4, 0.5, 1.0]), st.floats(0, 1))


@given(
    st.one_of(st.sampled_from([1, 2, 15, 30, 200]), st.integers(1, 300)),
    st.one_of(st.just(DEFAULT_SHARES), st.tuples(share, share, share)),
    st.integers(1, 9),
)
@drawn
def test_schedule(total: int, shares: tuple[float, float, float], interval: int) -> None:
    schedule = make_schedule(total, *shares, interval)
    start, ramp_end, freeze = reference.schedule_from_shares(total, *shares)
    assert (schedule.total_epochs, schedule.interval) == (total, interval)
    assert (schedule.start, schedule.ramp_end, schedule.freeze) == (start, ramp_end, freeze)
    steps = [epoch for epoch in range(total + 1) if schedule.is_step(epoch)]
    assert steps == reference.steps(start, freeze, interval)
    for epoch in steps:
        assert schedule.ramp(epoch) == pytest.approx(
            reference.asked_cut(epoch, 1.0, start, ramp_end, interval)
        )


# ---------------------------------------------------------------------------- every decision of a real run


class TinyNet(nn.Module):
    """A stem and two blocks with residual sums, four to eight filters; one block has two inner layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_bn(3, 6)
        self.a1, self.a2 = conv_bn(6, 8), conv_bn(8, 6)
        self.b1, self.b2, self.b3 = conv_bn(6, 4, kernel=1), conv_bn(4, 8), conv_bn(8, 6, kernel=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.a2(self.a1(x).relu())).relu()
        x = (x + self.b3(self.b2(self.b1(x).relu()).relu())).relu()
        return self.head(x.mean((2, 3)))


class JoinedNet(nn.Module):
    """Layers that read and write a stream; one reads a concatenation with the stream behind a BatchNorm of both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.beside = conv_bn(3, 16), conv_bn(16, 18, kernel=1)
        self.norm, self.joined = norm(34), conv(34, 16)
        self.inner, self.last = conv_bn(16, 7, kernel=1), conv_bn(7, 16, kernel=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        both = self.norm(torch.cat([x, self.beside(x)], 1)).relu()
        x = (x + self.joined(both)).relu()
        x = (x + self.last(self.inner(x).relu())).relu()
        return self.head(x.mean((2, 3)))


def conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    return layer


def norm(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.uniform_(layer.bias, -0.5, 0.5)
    return layer


def conv_bn(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, kernel), norm(outputs))


Places = dict[str, int]  # tensor name to the entry of filter 0; filter f has the entry f places on


@dataclass(frozen=True)
class Layout:
    """What a group's filters own, by hand.

    Attributes:
        writers: names of convolutions, each row a filter.
        norms: names of BatchNorms, with the entry of filter 0.
        silencers: names of parameters, with the entry of filter 0.
    """

    filters: int
    writers: list[str]
    norms: Places
    silencers: Places

    @property
    def parameters(self) -> Places:
        weights = {f"{name}.weight": 0 for name in self.writers}
        return weights | of_norms(self.norms, "weight", "bias")

    @property
    def buffers(self) -> Places:
        return of_norms(self.norms, "running_mean", "running_var")


def of_norms(norms: Places, *parts: str) -> Places:
    return {f"{name}.{part}": first for name, first in norms.items() for part in parts}


def behind_own_norms(filters: int, *layers: str) -> Layout:
    """A group whose every writer has its own BatchNorm, which silences what it writes."""
    norms = {f"{layer}.1": 0 for layer in layers}
    writers = [f"{layer}.0" for layer in layers]
    return Layout(filters, writers, norms, of_norms(norms, "weight", "bias"))


SIZE = 6
PIXELS = SIZE * SIZE
TINY = {"stem": 6, "a1": 8, "a2": 6, "b1": 4, "b2": 8, "b3": 6}
TINY_INNER = ["a1", "b1", "b2"]


def tiny_macs(names: list[str]) -> Callable[[list[float]], float]:
    """Of the exported TinyNet: what feeds a sum is scattered, so its readers stay wide."""

    def cost(kept: list[float]) -> float:
        stem, a1, a2, b1, b2, b3 = (TINY | dict(zip(names, kept, strict=True))).values()
        convolutions = 9 * 3 * stem + 9 * 6 * a1 + 9 * a1 * a2 + 6 * b1 + 9 * b1 * b2 + b2 * b3
        return PIXELS * convolutions + 6 * 5

    return cost


def coupled_tiny_macs(kept: list[float]) -> float:
    s, a1, b1, b2 = kept
    convolutions = 9 * 3 * s + 9 * s * a1 + 9 * a1 * s + s * b1 + 9 * b1 * b2 + b2 * s
    return PIXELS * convolutions + s * 5


def joined_macs(kept: list[float]) -> float:
    s, beside, inner = kept
    convolutions = 9 * 3 * s + s * beside + 9 * (s + beside) * s + s * inner + inner * s
    return PIXELS * convolutions + s * 5


@dataclass(frozen=True)
class Network:
    """A network in one scope, its groups in network order, and MACs of the exported one; all by hand.

    Attributes:
        shrunk: epoch to a convolution that training has left small by then: its share of the pruned filters grows.
    """

    make: Callable[[], nn.Module]
    scope: str
    groups: dict[str, Layout]
    macs: Callable[[list[float]], float]
    shrunk: dict[int, str]


def tiny(scope: str, names: list[str]) -> Network:
    groups = {f"{name}.0": behind_own_norms(TINY[name], name) for name in names}
    return Network(TinyNet, scope, groups, tiny_macs(names), {3: "a1.0", 5: "b2.0"})


def coupled_tiny() -> Network:
    groups = {
        "stem.0": behind_own_norms(6, "stem", "a2", "b3"),
        "a1.0": behind_own_norms(8, "a1"),
        "b1.0": behind_own_norms(4, "b1"),
        "b2.0": behind_own_norms(8, "b2"),
    }
    return Network(TinyNet, "coupled", groups, coupled_tiny_macs, {3: "a1.0", 5: "b2.0"})


def joined() -> Network:
    """A stream is silent where its layers' affines, the BatchNorm of both and the weights without one are zero."""
    stream = ["stem.1", "last.1"]
    norms = {**dict.fromkeys(stream, 0), "norm": 0}
    silencers = of_norms(norms, "weight", "bias") | {"joined.weight": 0}
    behind_both = of_norms({"norm": 16}, "weight", "bias")
    groups = {
        "stem.0": Layout(16, ["stem.0", "joined", "last.0"], norms, silencers),
        "beside.0": Layout(18, ["beside.0"], {"beside.1": 0, "norm": 16}, behind_both),
        "inner.0": behind_own_norms(7, "inner"),
    }
    return Network(JoinedNet, "coupled", groups, joined_macs, {3: "beside.0", 5: "joined"})


NETWORKS = {
    "tiny all": tiny("all", list(TINY)),
    "tiny inner": tiny("inner", TINY_INNER),
    "tiny coupled": coupled_tiny(),
    "joined coupled": joined(),
}


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(8, 3, SIZE, SIZE, generator=generator),
            torch.randint(5, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return nn.functional.cross_entropy(model(images.to(model.head.weight.dtype)), labels)


Rows = dict[
    tuple[str, int], dict[str, Tensor]
]  # by group and filter, tensor name to the filter's row
Gradients = dict[
    tuple[str, int], list[list[float]]
]  # by group and filter, of all its silencers, one list for each batch


DEFAULTS = {
    "kappa": 0.5,
    "fan": "in",
    "sparsity_reference": "network",
    "alpha": 1.0,
    "min_filters": 2,
    "min_filter_share": 0.05,
    "round_to": 1,
    "margin": 0.3,
    "protection": True,
    "start": 1,
    "ramp_end": 4,
    "freeze": 7,
    "interval": 1,
}


class Run:
    """A run of PSAP with a twin beside it, which knows the weights before each step and nothing else."""

    def __init__(self, network: Network, settings_: dict, dtype: torch.dtype) -> None:
        torch.manual_seed(3)
        self.network = network
        self.settings = DEFAULTS | settings_
        self.unit = unit = "filters" if "target_filters_cut" in settings_ else "macs"
        self.target = settings_[f"target_{unit}_cut"]
        self.groups = network.groups
        self.names = list(network.groups)
        self.widths = [group.filters for group in network.groups.values()]
        self.cost = network.macs if unit == "macs" else sum
        self.model = network.make().to(dtype)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 0.05, momentum=0.9, weight_decay=5e-3
        )
        self.pruner = PSAP(
            self.model,
            self.optimizer,
            torch.zeros(1, 3, SIZE, SIZE, dtype=dtype),
            total_epochs=10,
            pulse_batches=4,
            scope=network.scope,
            **self.settings,
        )
        assert [group.name for group in self.pruner.groups] == self.names
        self.saved: Rows = {}  # suspended filters as they were when they went

    def rows(self, name: str, f: int) -> dict[str, Tensor]:
        """Everything of a filter: weights, affines, statistics, momentum."""
        group, state = self.groups[name], self.model.state_dict(keep_vars=True)
        found = {}
        for key, first in (group.parameters | group.buffers).items():
            found[key] = state[key].detach()[first + f].clone()
        for key, first in group.parameters.items():
            momentum = self.optimizer.state[state[key]]["momentum_buffer"]
            found[f"{key} momentum"] = momentum[first + f].clone()
        return found

    @property
    def frozen(self) -> bool:
        return self.pruner.epochs_done >= self.settings["freeze"]

    def check_silent(self, name: str, f: int) -> None:
        """Silencers are zero; once the plan is final, all that training could change."""
        now = self.rows(name, f)
        group = self.groups[name]
        assert not any(now[key].any() for key in group.silencers)
        if self.frozen:
            assert not any(now[key].any() for key in group.parameters)

    def train(self, epoch: int) -> None:
        self.model.train()
        for batch in batches(3, seed=epoch):
            self.optimizer.zero_grad()
            loss_of(self.model, batch).backward()
            self.optimizer.step()
        if epoch in self.network.shrunk:
            with torch.no_grad():
                self.model.get_submodule(self.network.shrunk[epoch]).weight.mul_(0.2)
        for name, f in self.saved:
            self.check_silent(name, f)

    def weights_with_snapshots(self) -> list[reference.Group]:
        groups = []
        for name, group in self.groups.items():
            writers = []
            for writer in group.writers:
                weight = self.model.get_submodule(writer).weight.detach().clone()
                for f in range(group.filters):
                    if (name, f) in self.saved:
                        weight[f] = self.saved[name, f][f"{writer}.weight"]
                writers.append(reference.whole(weight.tolist()))
            groups.append(writers)
        return groups

    def expected(
        self, epoch: int
    ) -> tuple[list[float], list[int], list[list[int]], list[reference.Group]]:
        """The twin's eq. 1-3 at a step: sparsity ratios, kept counts, filters proposed anew, weights."""
        s = self.settings
        groups = self.weights_with_snapshots()
        sparsity = reference.weight_sparsity_ratios(
            groups, s["kappa"], s["fan"], s["sparsity_reference"]
        )
        floors = reference.minima(
            self.widths, s["min_filters"], s["min_filter_share"], s["round_to"]
        )
        cut = reference.asked_cut(epoch, self.target, s["start"], s["ramp_end"], s["interval"])
        budget = (1 - cut) * self.cost(self.widths)
        found = reference.largest_multiplier(
            sparsity, self.widths, floors, s["alpha"], self.cost, budget
        )
        real = reference.keep_counts_at(found, sparsity, self.widths, floors, s["alpha"])
        kept = reference.whole_counts(real, self.widths, self.cost, budget, floors, s["round_to"])
        anew = []
        rows = zip(groups, self.widths, kept, floors, self.suspended(), strict=True)
        for group, o, k, floor, earlier in rows:
            extra = reference.pulse_margin(o - k, k, floor, s["margin"]) if s["protection"] else 0
            scores = reference.relative_norms(group, earlier)
            anew.append(reference.proposed_anew(scores, earlier, o - k, extra))
        return sparsity, kept, anew, groups

    def suspended(self) -> list[list[int]]:
        return [sorted(f for group, f in self.saved if group == name) for name in self.names]

    def expected_gradients(
        self, proposed: dict[str, list[int]], data: list[tuple[Tensor, Tensor]]
    ) -> Gradients:
        """dL/ds of every filter and batch at the pulse: autograd on a copy of the network."""
        copied = copy.deepcopy(self.model)
        state = copied.state_dict(keep_vars=True)
        with torch.no_grad():
            for name, filters in proposed.items():
                group = self.groups[name]
                for f in filters:
                    rows = self.saved.get((name, f)) or self.rows(name, f)
                    for key, first in group.parameters.items():
                        share = reference.PULSE_EPSILON if key in group.silencers else 1.0
                        state[key][first + f] = share * rows[key]
        keys = list(dict.fromkeys(key for group in self.groups.values() for key in group.silencers))
        silencers = [state[key] for key in keys]
        of_batches = []
        for batch in data:
            gradients = torch.autograd.grad(loss_of(copied, batch), silencers)
            of_batches.append(dict(zip(keys, gradients, strict=True)))
        return {
            (name, f): [
                [
                    g
                    for key, first in group.silencers.items()
                    for g in gradients[key][first + f].flatten().tolist()
                ]
                for gradients in of_batches
            ]
            for name, group in self.groups.items()
            for f in range(group.filters)
        }

    def check_supervision(
        self, step: PruneStep, proposed: dict[str, list[int]], gradients: Gradients, was: Rows
    ) -> None:
        assert lists(step.utility, self.names) == proposed
        for name, group in self.groups.items():
            for f in proposed[name]:
                saved = [s for key in group.silencers for s in was[name, f][key].flatten().tolist()]
                assert step.utility[name][f] == self.near(
                    reference.utility(gradients[name, f], saved)
                )
            live, suspended = (
                [
                    g
                    for f in range(group.filters)
                    if (f in proposed[name]) == away
                    for g in gradients[name, f]
                ]
                for away in (False, True)
            )
            if any(proposed.values()):
                assert step.grad_norm_live[name] == self.near(reference.gradient_norm(live))
            if suspended:
                assert step.grad_norm_suspended[name] == self.near(
                    reference.gradient_norm(suspended)
                )
            else:
                assert name not in step.grad_norm_suspended

    def near(self, expected: object) -> object:
        double = next(self.model.parameters()).dtype == torch.float64
        return pytest.approx(expected, rel=1e-9 if double else 2e-3, abs=1e-12 if double else 1e-6)

    def step(self, epoch: int) -> dict[str, bool]:
        """One step, every decision compared; says which branches it went through."""
        earlier = dict(zip(self.names, self.suspended(), strict=True))
        assert {n: list(self.pruner.plan.pruned.get(n, ())) for n in self.names} == earlier
        sparsity, kept, anew_lists, weights = self.expected(epoch)
        anew = dict(zip(self.names, anew_lists, strict=True))
        proposed = {name: sorted(earlier[name] + anew[name]) for name in self.names}
        offered = batches((4, 3, 6)[epoch % 3], seed=100 + epoch)
        gradients = self.expected_gradients(proposed, offered[:4])
        was = {
            (name, f): self.saved.get((name, f)) or self.rows(name, f)
            for name, group in self.groups.items()
            for f in range(group.filters)
        }

        step = self.pruner.end_epoch(offered, lambda batch: loss_of(self.model, batch))

        assert step is not None
        assert step.epochs_done == epoch
        assert list(step.weight_sparsity_ratio.values()) == pytest.approx(sparsity, abs=1e-9)
        assert [layer.kept for layer in step.plan.layers] == kept
        assert step.plan.macs == self.network.macs(kept)
        assert step.plan.dense_macs == self.network.macs(self.widths)
        assert step.plan.unit == self.unit
        s = self.settings
        asked = reference.asked_cut(epoch, self.target, s["start"], s["ramp_end"], s["interval"])
        assert step.plan.target_cut == pytest.approx(asked, rel=1e-12)
        assert lists(step.proposed, self.names) == proposed
        if self.settings["protection"]:
            self.check_supervision(step, proposed, gradients, was)
        else:
            assert not step.utility
            assert not step.grad_norm_live
            assert not step.grad_norm_suspended
        back = {}
        for name, o, group, k in zip(self.names, self.widths, weights, kept, strict=True):
            scores = dict(enumerate(reference.joint_norms(group)))
            if self.settings["protection"]:
                scores = {f: u for f, (u, _) in step.utility.get(name, {}).items()}
            back[name] = reference.restored(scores, earlier[name], anew[name], o - k)
        assert lists(step.restored, self.names) == back
        left = {name: sorted(set(proposed[name]) - set(back[name])) for name in self.names}
        assert lists(step.plan.pruned, self.names) == left
        assert self.pruner.plan == step.plan
        moved = sum(len(set(earlier[name]) ^ set(left[name])) for name in self.names)
        assert step.mask_churn == pytest.approx(moved / sum(self.widths))
        self.check_rows(was, left, anew)
        return {
            "chosen by the pulse": any(back[name] and anew[name] for name in self.names),
            "count falls": any(back[name] and not anew[name] for name in self.names),
            "asked again": any(earlier[name] and anew[name] for name in self.names),
        }

    def check_rows(self, was: Rows, left: dict, anew: dict) -> None:
        """What stays suspended is silent; a live filter is untouched, a restored one bit for bit what it was."""
        for name, f in was:
            now = self.rows(name, f)
            if f in left[name]:
                self.check_silent(name, f)
                if f in anew[name] or self.frozen:
                    assert not any(now[key].any() for key in now if "momentum" in key)
                self.saved[name, f] = was[name, f]
            else:
                assert all(torch.equal(now[key], was[name, f][key]) for key in now)
                self.saved.pop((name, f), None)


def lists(filters: dict, names: list[str]) -> dict[str, list[int]]:
    assert set(filters) <= set(names)
    return {name: sorted(filters.get(name, ())) for name in names}


FALLS = {"count falls", "asked again"}
ALL = FALLS | {"chosen by the pulse"}
# Network, settings, and what must have happened at one of the steps.
RUNS: dict[str, tuple[str, dict, set[str]]] = {
    "default": ("tiny all", {"target_macs_cut": 0.6}, ALL),
    "filters": ("tiny all", {"target_filters_cut": 0.45, "margin": 0.5}, ALL),
    "uniform": ("tiny all", {"target_macs_cut": 0.5, "alpha": 0.0, "margin": 1.0}, ALL),
    "own reference": (
        "tiny all",
        {"target_macs_cut": 0.5, "sparsity_reference": "layer", "kappa": 1.0},
        ALL,
    ),
    "fan out": ("tiny all", {"target_macs_cut": 0.5, "fan": "out"}, ALL),
    "unprotected": ("tiny all", {"target_macs_cut": 0.6, "protection": False}, FALLS),
    "unprotected, alpha 2": (
        "tiny all",
        {"target_filters_cut": 0.4, "protection": False, "alpha": 2.0},
        FALLS,
    ),
    "margin 0": ("tiny all", {"target_macs_cut": 0.55, "margin": 0.0}, ALL),
    "inner": ("tiny inner", {"target_macs_cut": 0.3, "margin": 0.6}, ALL),
    "every second": ("tiny all", {"target_macs_cut": 0.6, "interval": 2, "start": 2}, ALL),
    "high": (
        "tiny all",
        {"target_macs_cut": 0.82, "min_filters": 1, "min_filter_share": 0.2, "kappa": 0.25},
        ALL,
    ),
    "one step": (
        "tiny all",
        {"target_macs_cut": 0.5, "start": 4, "ramp_end": 4, "freeze": 4},
        {"chosen by the pulse"},
    ),
    "at the floors": (
        "tiny all",
        {"target_filters_cut": 4 / 38, "min_filters": 6, "margin": 1.0},
        ALL - {"count falls"},
    ),
    "nothing to do": ("tiny all", {"target_filters_cut": 0.0, "min_filters": 8}, set()),
    "coupled": ("tiny coupled", {"target_macs_cut": 0.6}, ALL),
    "coupled, unprotected": (
        "tiny coupled",
        {"target_macs_cut": 0.5, "protection": False, "alpha": 2.0},
        FALLS,
    ),
    "coupled, own reference, fan out": (
        "tiny coupled",
        {"target_macs_cut": 0.6, "sparsity_reference": "layer", "fan": "out", "kappa": 1.0},
        ALL,
    ),
    "joined": ("joined coupled", {"target_macs_cut": 0.6}, ALL),
    "joined, filters": ("joined coupled", {"target_filters_cut": 0.4, "margin": 0.6}, ALL),
    "joined, multiples of 8": ("joined coupled", {"target_macs_cut": 0.5, "round_to": 8}, set()),
    "joined, multiples of 4": (
        "joined coupled",
        {"target_macs_cut": 0.5, "round_to": 4, "alpha": 2.0},
        ALL,
    ),
    "joined, multiples of 3, unprotected": (
        "joined coupled",
        {"target_macs_cut": 0.55, "round_to": 3, "protection": False},
        FALLS,
    ),
}
OF_ONE_SETTING = (
    "filters",
    "uniform",
    "fan out",
    "unprotected",
    "margin 0",
    "every second",
    "nothing to do",
    "coupled, unprotected",
    "joined, filters",
    "joined, multiples of 4",
)


def runs_and_types() -> list[ParameterSet]:
    """All runs in both types; those that differ from others in one setting alone are long tests."""
    found = []
    for name in RUNS:
        for dtype in (torch.float32, torch.float64):
            is_quick = name == "coupled" if dtype == torch.float32 else name not in OF_ONE_SETTING
            marks = () if is_quick else pytest.mark.long
            found.append(pytest.param(name, dtype, marks=marks))
    return found


@pytest.mark.parametrize(("name", "dtype"), runs_and_types())
def test_every_decision_of_a_run(name: str, dtype: torch.dtype) -> None:
    network, settings_, expected_branches = RUNS[name]
    run = Run(NETWORKS[network], settings_, dtype)
    s = run.settings
    due = reference.steps(s["start"], s["freeze"], s["interval"])
    branches = set()
    for epoch in range(1, 10):
        run.train(epoch)
        if epoch in due:
            branches |= {branch for branch, taken in run.step(epoch).items() if taken}
        else:
            assert run.pruner.end_epoch([], lambda batch: loss_of(run.model, batch)) is None
    assert branches == expected_branches
