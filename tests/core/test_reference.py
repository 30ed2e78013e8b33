"""psap_core's fast functions against their slow twin, and both against numbers worked out by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from psap_core import (
    PSAP,
    CostModel,
    PruneStep,
    Schedule,
    choose_restored,
    filter_counts,
    filter_floors,
    filter_norms,
    layer_prune_ratios,
    make_schedule,
    propose,
    pulse_margin,
    weight_sparsity_ratio,
)
from tests.core import reference

drawn = settings(deadline=None, derandomize=True, max_examples=300)

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
    ratios = weight_sparsity_ratio({"a": A, "b": B}, **options)
    settings_ = {"kappa": 0.5, "fan": "in", "reference": "network"} | options
    assert reference.weight_sparsity_ratios([A.tolist(), B.tolist()], **settings_) == list(by_hand)
    assert ratios == {"a": by_hand[0], "b": by_hand[1]}


def test_a_weight_at_the_threshold_is_not_small() -> None:
    weight = torch.full((3, 8, 1, 1), 0.5)  # in He units 1, so R = 1, both exact
    assert weight_sparsity_ratio({"a": weight}, kappa=1.0) == {"a": 0.0}
    assert reference.weight_sparsity_ratios([weight.tolist()], 1.0, "in", "network") == [0.0]
    assert weight_sparsity_ratio({"a": torch.zeros(3, 8, 1, 1)}) == {"a": 0.0}


@st.composite
def networks(draw: st.DrawFn) -> dict[str, Tensor]:
    """One to four layers of random widths, kernels and magnitudes, some of them partly zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    weights = {}
    for layer in range(draw(st.integers(1, 4))):
        kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 5)]))
        shape = (draw(st.integers(1, 6)), draw(st.integers(1, 5)), *kernel)
        weight = torch.randn(shape, generator=generator) * draw(
            st.sampled_from([1e-3, 0.1, 0.2, 1.0, 30.0])
        )
        if draw(st.booleans()):
            weight[torch.rand(shape, generator=generator) < 0.3] = 0.0
        weights[f"layer{layer}"] = weight
    return weights


@given(
    networks(),
    st.sampled_from([1e-4, 0.25, 0.5, 1.0, 3.0, 1e4]),
    st.sampled_from(["in", "out"]),
    st.sampled_from(["network", "layer"]),
)
@drawn
def test_sparsity(weights: dict[str, Tensor], kappa: float, fan: str, against: str) -> None:
    fast = weight_sparsity_ratio(weights, kappa=kappa, fan=fan, reference=against)
    lists = [weight.tolist() for weight in weights.values()]
    # A weight within rounding of the threshold may fall on either side; the twin rounds less.
    at_least, at_most = (
        reference.weight_sparsity_ratios(lists, kappa * (1 + off), fan, against)
        for off in (-1e-6, 1e-6)
    )
    assert list(fast) == list(weights)
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


def twin_counts(
    cost: CostModel,
    sparsity: tuple[float, ...],
    alpha: float,
    floors: tuple[int, ...],
    budget: float,
    off: float = 0.0,
) -> tuple[list[float], list[int]]:
    """Real and whole counts of the twin, with lambda moved by the factor 1 + off."""
    price = reference.cost_function(cost.fixed, cost.linear, cost.bilinear)
    found = reference.largest_multiplier(sparsity, cost.filters, floors, alpha, price, budget)
    real = reference.keep_counts_at(found * (1 + off), sparsity, cost.filters, floors, alpha)
    return real, reference.whole_counts(real, cost.filters, price, budget)


Allocation = tuple[CostModel, tuple[float, ...], float, tuple[int, ...], float]


@st.composite
def allocations(draw: st.DrawFn) -> Allocation:
    """A cost model, sparsities, alpha, floors and a budget between the floors' cost and the dense cost."""
    n = draw(st.integers(1, 5))
    filters = draw(st.tuples(*[st.integers(1, 24)] * n))
    if draw(st.booleans()):
        cost = by_filters(*filters)
    else:
        linear = draw(st.tuples(*[st.integers(1, 500)] * n))
        one = st.integers(0, n - 1)
        pairs = draw(st.lists(st.tuples(one, one, st.integers(1, 90)), max_size=4))
        bilinear = tuple((a, b, c) for a, b, c in pairs if a != b)
        cost = CostModel(filters, draw(st.sampled_from([0, 7, 1000])), linear, bilinear)
    one_sparsity = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 0.3]), st.floats(0, 1))
    sparsity = draw(st.tuples(*[one_sparsity] * n))
    alpha = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0, 4.0]))
    smallest, share = draw(
        st.sampled_from([(1, 0.0), (2, 0.05), (3, 0.4), (5, 0.9), (24, 0.0), (1, 1.0)])
    )
    floors = tuple(reference.minima(filters, smallest, share))
    least, dense = cost.cost(floors), cost.cost(filters)
    where = draw(st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1)))
    budget = min(least + where * (dense - least), dense)
    return cost, sparsity, alpha, floors, budget


@given(allocations())
@drawn
def test_prune_ratios(drawn_case: Allocation) -> None:
    cost, sparsity, alpha, floors, budget = drawn_case
    real, _ = twin_counts(cost, sparsity, alpha, floors, budget)
    ratios = layer_prune_ratios(sparsity, cost, budget, floors, alpha)
    assert ratios == pytest.approx(
        [1 - k / o for k, o in zip(real, cost.filters, strict=True)], abs=1e-7
    )


@given(allocations())
@drawn
def test_counts(drawn_case: Allocation) -> None:
    cost, sparsity, alpha, floors, budget = drawn_case
    counts = filter_counts(sparsity, cost, budget, floors, alpha)
    # Where a real count is a whole number the last bit of lambda decides; elsewhere the three agree.
    near = [
        twin_counts(cost, sparsity, alpha, floors, budget, off)[1] for off in (0.0, -1e-9, 1e-9)
    ]
    assert counts in near


@given(allocations(), st.data())
@drawn
def test_cost(drawn_case: Allocation, data: st.DataObject) -> None:
    cost = drawn_case[0]
    price = reference.cost_function(cost.fixed, cost.linear, cost.bilinear)
    kept = [data.draw(st.integers(1, o)) for o in cost.filters]
    assert cost.cost(kept) == price(kept)
    assert cost.dense == price(cost.filters)
    for layer, extra in enumerate(cost.marginal(kept, l) for l in range(len(kept))):
        assert extra == price([k + (m == layer) for m, k in enumerate(kept)]) - price(kept)


@given(
    st.lists(st.integers(1, 600), min_size=1, max_size=4),
    st.integers(1, 70),
    st.sampled_from([0, 0.05, 0.1, 0.5, 1]),
)
@drawn
def test_floors(filters: list[int], smallest: int, share: float) -> None:
    assert filter_floors(filters, smallest, share) == reference.minima(filters, smallest, share)


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
    assert reference.relative_norms(weight.tolist(), [2]) == [2.5, 0.5, 5.0, 0.0]


@given(networks())
@drawn
def test_norms(weights: dict[str, Tensor]) -> None:
    for weight in weights.values():
        own = filter_norms(weight)
        assert own.shape == (len(weight),)
        assert own.tolist() == pytest.approx(reference.norms(weight.tolist()), rel=1e-5)


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
    # u = -(2 g_gamma - g_beta): -1, -3, -8; deviations 3, 1, -4; sample variance 26 / 2
    mean, error = reference.utility([(1.0, 1.0), (2.0, 1.0), (3.0, -2.0)], (2.0, -1.0))
    assert mean == -4.0
    assert error == pytest.approx(math.sqrt(13 / 3))


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
            (epoch in schedule.steps)
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
    assert list(schedule.steps) == reference.steps(start, freeze, interval)
    for epoch in schedule.steps:
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


def conv_bn(inputs: int, outputs: int, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight)
    bn = nn.BatchNorm2d(outputs)
    nn.init.uniform_(bn.weight, 0.5, 1.5)
    nn.init.uniform_(bn.bias, -0.5, 0.5)
    return nn.Sequential(conv, bn)


def modules(model: nn.Module, name: str) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    return model.get_submodule(name), model.get_submodule(name.removesuffix("0") + "1")


SIZE = 6
WIDTHS = {"stem.0": 6, "a1.0": 8, "a2.0": 6, "b1.0": 4, "b2.0": 8, "b3.0": 6}


def tiny_macs(scope: str) -> Callable[[list[float]], float]:
    """MACs of the exported TinyNet, by hand: residual filters are scattered, so their readers stay wide."""

    def cost(kept: list[float]) -> float:
        width = dict(WIDTHS, **dict(zip(in_scope(scope), kept, strict=True)))
        stem, a1, a2, b1, b2, b3 = width.values()
        pixels = SIZE * SIZE
        return (
            pixels * (9 * 3 * stem + 9 * 6 * a1 + 9 * a1 * a2 + 6 * b1 + 9 * b1 * b2 + b2 * b3)
            + 6 * 5
        )

    return cost


def in_scope(scope: str) -> list[str]:
    return list(WIDTHS) if scope == "all" else ["a1.0", "b1.0", "b2.0"]


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(8, 3, SIZE, SIZE, generator=generator),
            torch.randint(5, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def losses(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    for images, labels in data:
        yield nn.functional.cross_entropy(model(images.to(model.head.weight.dtype)), labels)


Rows = dict[
    tuple[str, int], dict[str, Tensor]
]  # by layer and filter, tensor name to the filter's row
Gradients = dict[
    tuple[str, int], list[tuple[float, float]]
]  # by layer and filter, one pair for each batch


DEFAULTS = {
    "kappa": 0.5,
    "fan": "in",
    "sparsity_reference": "network",
    "alpha": 1.0,
    "min_filters": 2,
    "min_filter_share": 0.05,
    "margin": 0.3,
    "protection": True,
    "scope": "all",
    "start": 1,
    "ramp_end": 4,
    "freeze": 7,
    "interval": 1,
}


class Run:
    """A run of PSAP with a twin beside it, which knows the weights before each step and nothing else."""

    def __init__(self, settings_: dict, dtype: torch.dtype) -> None:
        torch.manual_seed(3)
        self.settings = DEFAULTS | settings_
        self.unit = unit = "filters" if "target_filters_cut" in settings_ else "macs"
        self.target = settings_[f"target_{unit}_cut"]
        self.names = in_scope(self.settings["scope"])
        self.widths = [WIDTHS[name] for name in self.names]
        self.macs = tiny_macs(self.settings["scope"])
        self.cost = self.macs if unit == "macs" else sum
        self.model = TinyNet().to(dtype)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), 0.05, momentum=0.9, weight_decay=5e-3
        )
        example = torch.zeros(1, 3, SIZE, SIZE, dtype=dtype)
        self.pruner = PSAP(
            self.model, self.optimizer, example, total_epochs=10, pulse_batches=4, **self.settings
        )
        assert [layer.name for layer in self.pruner.layers] == self.names
        self.saved: Rows = {}  # suspended filters as they were when they went

    def rows(self, name: str, f: int) -> dict[str, Tensor]:
        """Everything of a filter: weights, affine, statistics, momentum."""
        conv, bn = modules(self.model, name)
        tensors = {
            "weight": conv.weight,
            "gamma": bn.weight,
            "beta": bn.bias,
            "mean": bn.running_mean,
            "var": bn.running_var,
            "weight momentum": self.optimizer.state[conv.weight]["momentum_buffer"],
            "gamma momentum": self.optimizer.state[bn.weight]["momentum_buffer"],
            "beta momentum": self.optimizer.state[bn.bias]["momentum_buffer"],
        }
        return {key: tensor.detach()[f].clone() for key, tensor in tensors.items()}

    @property
    def frozen(self) -> bool:
        return self.pruner.epochs_done >= self.settings["freeze"]

    def train(self, epoch: int) -> None:
        self.model.train()
        for loss in losses(self.model, batches(3, seed=epoch)):
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        if epoch in (
            3,
            5,
        ):  # a layer that training has left small: its share of the pruned filters grows
            with torch.no_grad():
                self.model.get_submodule({3: "a1", 5: "b2"}[epoch])[0].weight.mul_(0.2)
        for name, f in self.saved:
            now = self.rows(name, f)
            assert now["gamma"] == now["beta"] == 0
            if self.frozen:
                assert not now["weight"].any()

    def weights_with_snapshots(self) -> list[reference.Weight]:
        weights = []
        for name in self.names:
            weight = modules(self.model, name)[0].weight.detach().clone()
            for f in range(len(weight)):
                if (name, f) in self.saved:
                    weight[f] = self.saved[name, f]["weight"]
            weights.append(weight.tolist())
        return weights

    def expected(
        self, epoch: int
    ) -> tuple[list[float], list[int], list[list[int]], list[list[list[float]]]]:
        """The twin's eq. 1-3 at a step: sparsity ratios, kept counts, filters proposed anew, weights."""
        s = self.settings
        weights = self.weights_with_snapshots()
        sparsity = reference.weight_sparsity_ratios(
            weights, s["kappa"], s["fan"], s["sparsity_reference"]
        )
        floors = reference.minima(self.widths, s["min_filters"], s["min_filter_share"])
        cut = reference.asked_cut(epoch, self.target, s["start"], s["ramp_end"], s["interval"])
        budget = (1 - cut) * self.cost(self.widths)
        found = reference.largest_multiplier(
            sparsity, self.widths, floors, s["alpha"], self.cost, budget
        )
        real = reference.keep_counts_at(found, sparsity, self.widths, floors, s["alpha"])
        kept = reference.whole_counts(real, self.widths, self.cost, budget)
        anew = []
        rows = zip(weights, self.widths, kept, floors, self.suspended(), strict=True)
        for weight, o, k, floor, earlier in rows:
            extra = reference.pulse_margin(o - k, k, floor, s["margin"]) if s["protection"] else 0
            scores = reference.relative_norms(weight, earlier)
            anew.append(reference.proposed_anew(scores, earlier, o - k, extra))
        return sparsity, kept, anew, weights

    def suspended(self) -> list[list[int]]:
        return [sorted(f for layer, f in self.saved if layer == name) for name in self.names]

    def expected_gradients(
        self, proposed: dict[str, list[int]], data: list[tuple[Tensor, Tensor]]
    ) -> Gradients:
        """(dL/dgamma, dL/dbeta) of every filter and batch at the pulse: autograd on a copy of the network."""
        copied = copy.deepcopy(self.model)
        with torch.no_grad():
            for name, filters in proposed.items():
                conv, bn = modules(copied, name)
                for f in filters:
                    rows = self.saved.get((name, f)) or self.rows(name, f)
                    conv.weight[f] = rows["weight"]
                    bn.weight[f] = reference.PULSE_EPSILON * rows["gamma"]
                    bn.bias[f] = reference.PULSE_EPSILON * rows["beta"]
        affines = [modules(copied, name)[1] for name in self.names]
        parameters = [p for bn in affines for p in (bn.weight, bn.bias)]
        of_batches = [torch.autograd.grad(loss, parameters) for loss in losses(copied, data)]
        return {
            (name, f): [(g[2 * layer][f].item(), g[2 * layer + 1][f].item()) for g in of_batches]
            for layer, name in enumerate(self.names)
            for f in range(WIDTHS[name])
        }

    def check_supervision(
        self, step: PruneStep, proposed: dict[str, list[int]], gradients: Gradients, was: Rows
    ) -> None:
        assert lists(step.utility, self.names) == proposed
        for name in self.names:
            for f in proposed[name]:
                saved = was[name, f]["gamma"].item(), was[name, f]["beta"].item()
                assert step.utility[name][f] == self.near(
                    reference.utility(gradients[name, f], saved)
                )
            live, suspended = (
                [
                    g
                    for f in range(WIDTHS[name])
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
            (n, f): self.saved.get((n, f)) or self.rows(n, f)
            for n in self.names
            for f in range(WIDTHS[n])
        }

        step = self.pruner.end_epoch(lambda: losses(self.model, offered))

        assert step is not None
        assert step.epochs_done == epoch
        assert list(step.weight_sparsity_ratio.values()) == pytest.approx(sparsity, abs=1e-9)
        assert [layer.kept for layer in step.plan.layers] == kept
        assert step.plan.macs == self.macs(kept)
        assert step.plan.dense_macs == self.macs(self.widths)
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
        for name, weight, k in zip(self.names, weights, kept, strict=True):
            scores = dict(enumerate(reference.norms(weight)))
            if self.settings["protection"]:
                scores = {f: u for f, (u, _) in step.utility.get(name, {}).items()}
            back[name] = reference.restored(scores, earlier[name], anew[name], WIDTHS[name] - k)
        assert lists(step.restored, self.names) == back
        left = {name: sorted(set(proposed[name]) - set(back[name])) for name in self.names}
        assert lists(step.plan.pruned, self.names) == left
        assert self.pruner.plan == step.plan
        moved = sum(len(set(earlier[name]) ^ set(left[name])) for name in self.names)
        assert step.mask_churn == pytest.approx(moved / sum(self.widths))

        for name, f in was:
            now = self.rows(name, f)
            if f in left[name]:
                assert now["gamma"] == now["beta"] == 0
                if f in anew[name] or self.frozen:
                    assert not any(now[key].any() for key in now if "momentum" in key)
                if self.frozen:
                    assert not now["weight"].any()
                self.saved[name, f] = was[name, f]
            else:  # a live filter is untouched, a restored one is bit for bit what it was
                assert all(torch.equal(now[key], was[name, f][key]) for key in now)
                self.saved.pop((name, f), None)
        return {
            "chosen by the pulse": any(back[name] and anew[name] for name in self.names),
            "count falls": any(back[name] and not anew[name] for name in self.names),
            "asked again": any(earlier[name] and anew[name] for name in self.names),
        }


def lists(filters: dict, names: list[str]) -> dict[str, list[int]]:
    assert set(filters) <= set(names)
    return {name: sorted(filters.get(name, ())) for name in names}


FALLS = {"count falls", "asked again"}
ALL = FALLS | {"chosen by the pulse"}
RUNS: dict[
    str, tuple[dict, set[str]]
] = {  # settings, and what must have happened at one of the steps
    "default": ({"target_macs_cut": 0.6}, ALL),
    "filters": ({"target_filters_cut": 0.45, "margin": 0.5}, ALL),
    "uniform": ({"target_macs_cut": 0.5, "alpha": 0.0, "margin": 1.0}, ALL),
    "own reference": ({"target_macs_cut": 0.5, "sparsity_reference": "layer", "kappa": 1.0}, ALL),
    "fan out": ({"target_macs_cut": 0.5, "fan": "out"}, ALL),
    "unprotected": ({"target_macs_cut": 0.6, "protection": False}, FALLS),
    "unprotected, alpha 2": ({"target_filters_cut": 0.4, "protection": False, "alpha": 2.0}, FALLS),
    "margin 0": ({"target_macs_cut": 0.55, "margin": 0.0}, ALL),
    "inner": ({"target_macs_cut": 0.3, "scope": "inner", "margin": 0.6}, ALL),
    "every second": ({"target_macs_cut": 0.6, "interval": 2, "start": 2}, ALL),
    "high": (
        {"target_macs_cut": 0.82, "min_filters": 1, "min_filter_share": 0.2, "kappa": 0.25},
        ALL,
    ),
    "one step": (
        {"target_macs_cut": 0.5, "start": 4, "ramp_end": 4, "freeze": 4},
        {"chosen by the pulse"},
    ),
    "at the floors": (
        {"target_filters_cut": 4 / 38, "min_filters": 6, "margin": 1.0},
        ALL - {"count falls"},
    ),
    "nothing to do": ({"target_filters_cut": 0.0, "min_filters": 8}, set()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RUNS)
def test_every_decision_of_a_run(name: str, dtype: torch.dtype) -> None:
    settings_, expected_branches = RUNS[name]
    run = Run(settings_, dtype)
    s = run.settings
    due = reference.steps(s["start"], s["freeze"], s["interval"])
    branches = set()
    for epoch in range(1, 10):
        run.train(epoch)
        if epoch in due:
            branches |= {branch for branch, taken in run.step(epoch).items() if taken}
        else:
            assert run.pruner.end_epoch(lambda: losses(run.model, [])) is None
    assert branches == expected_branches
