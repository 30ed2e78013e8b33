"""What must hold for eq. 1-3, the plan and the schedule, whatever the numbers are."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from psap_core.allocation import filter_counts, filter_floors, layer_prune_ratios
from psap_core.cost import CostModel
from psap_core.errors import InputError
from psap_core.files import sealed, unsealed
from psap_core.groups import ChannelGroup, Entries
from psap_core.inputs import describe
from psap_core.plan import LayerPlan, PrunePlan, make_plan
from psap_core.pruner import PSAP
from psap_core.schedule import Schedule, make_schedule
from psap_core.scoring import filter_norms, joint_scores, propose
from psap_core.settings import Settings
from psap_core.sparsity import FilterRows, weight_sparsity_ratio

drawn = settings(deadline=None, derandomize=True, max_examples=100)
EITHER_FAN = pytest.mark.parametrize("fan", ["in", "out"])
EITHER_REFERENCE = pytest.mark.parametrize("reference", ["network", "layer"])
powers_of_two = st.integers(-20, 20).map(
    lambda power: 2.0**power
)  # rescaling by these rounds nothing

# ---------------------------------------------------------------------------- eq. 1


Writers = dict[str, list[Tensor]]  # of every group the weights of the layers that write it


def network(seed: int) -> Writers:
    """Three groups; the second is written by two layers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "group0": [(8, 3, 3, 3)],
        "group1": [(6, 8, 1, 1), (6, 10, 3, 3)],
        "group2": [(12, 6, 3, 3)],
    }
    return {
        name: [torch.randn(shape, generator=generator) / (n + 1) for shape in of_group]
        for n, (name, of_group) in enumerate(shapes.items())
    }


def rescaled(writers: Writers, factor: float, only: str | None = None) -> Writers:
    return {
        name: [weight * factor if only in (None, name) else weight for weight in weights]
        for name, weights in writers.items()
    }


def sparsity_of(writers: Writers, **options: Any) -> dict[str, float]:
    rows = {name: [FilterRows.of(weight) for weight in group] for name, group in writers.items()}
    return weight_sparsity_ratio(rows, **options)


@EITHER_FAN
@EITHER_REFERENCE
@given(st.integers(0, 999), st.floats(1e-3, 10), powers_of_two)
@drawn
def test_sparsity_is_a_share_and_ignores_the_networks_scale(
    fan: Any, reference: Any, seed: int, kappa: float, factor: float
) -> None:
    writers = network(seed)
    ratios = sparsity_of(writers, kappa=kappa, fan=fan, reference=reference)
    assert all(0 <= s <= 1 for s in ratios.values())
    for scale in (factor, -1.0):
        others = rescaled(writers, scale)
        assert sparsity_of(others, kappa=kappa, fan=fan, reference=reference) == ratios


@given(st.integers(0, 999))
@drawn
def test_a_groups_sparsity_is_the_mean_over_its_writers_weights(seed: int) -> None:
    """Whatever else is in the network, as long as R is the same: each writer as a group of its own."""
    writers = network(seed)
    together = sparsity_of(writers)
    first, second = writers["group1"]
    apart = {"first": [first], "second": [second]} | {
        name: weights for name, weights in writers.items() if name != "group1"
    }
    alone = sparsity_of(apart)
    small = alone["first"] * first.numel() + alone["second"] * second.numel()
    assert together["group1"] == pytest.approx(small / (first.numel() + second.numel()), abs=1e-12)
    assert [together["group0"], together["group2"]] == [alone["group0"], alone["group2"]]


@EITHER_FAN
@EITHER_REFERENCE
@given(st.integers(0, 999))
@drawn
def test_sparsity_grows_with_kappa(fan: Any, reference: Any, seed: int) -> None:
    writers = network(seed)
    of_kappas = [
        sparsity_of(writers, kappa=kappa, fan=fan, reference=reference)
        for kappa in (1e-9, 0.25, 0.5, 1.0, 2.0, 1e9)
    ]
    for name in writers:
        ratios = [ratio[name] for ratio in of_kappas]
        assert ratios == sorted(ratios)
        assert (ratios[0], ratios[-1]) == (0.0, 1.0)
        assert ratios[1] < ratios[3]


@given(
    st.integers(0, 999),
    st.sampled_from(["group0", "group1", "group2"]),
    st.sampled_from([0.5, 0.25, 0.125]),
)
@drawn
def test_a_group_left_small_is_sparser_beside_the_network_only(
    seed: int, small: str, factor: float
) -> None:
    writers = network(seed)
    shrunk = rescaled(writers, factor, only=small)
    before, after = sparsity_of(writers), sparsity_of(shrunk)
    assert after[small] > before[small]
    assert all(after[name] <= before[name] for name in writers if name != small)
    own = sparsity_of(writers, reference="layer")
    assert sparsity_of(shrunk, reference="layer") == own


@EITHER_FAN
@EITHER_REFERENCE
def test_at_he_initialisation_all_groups_are_alike(fan: Any, reference: Any) -> None:
    # Fans from 36 to 1152 in and 32 to 1152 out; at least 9,216 weights each.
    shapes = {
        "wide": [(256, 4, 3, 3)],
        "deep": [(32, 128, 3, 3)],
        "pointwise": [(32, 512, 1, 1)],
        "large": [(64, 8, 7, 7)],
        "stream": [(256, 4, 3, 3), (256, 512, 1, 1), (256, 8, 7, 7)],
    }
    torch.manual_seed(0)
    writers = {name: [torch.empty(shape) for shape in group] for name, group in shapes.items()}
    for weight in (weight for group in writers.values() for weight in group):
        nn.init.kaiming_normal_(weight, mode=f"fan_{fan}", nonlinearity="relu")
    ratios = sparsity_of(writers, fan=fan, reference=reference)
    expected = math.erf(0.5 / math.sqrt(2))  # share of a standard normal within half a deviation
    for name, ratio in ratios.items():
        count = sum(weight.numel() for weight in writers[name])
        error = math.sqrt(expected * (1 - expected) / count)
        assert ratio == pytest.approx(expected, abs=5 * error)
    if reference == "network":  # measured in the other initialisation's units they are far apart
        other = sparsity_of(writers, fan={"in": "out", "out": "in"}[fan])
        assert max(other.values()) - min(other.values()) > 0.3


# ---------------------------------------------------------------------------- eq. 2


@st.composite
def costs(draw: st.DrawFn) -> CostModel:
    """As in a network: every group pays for its output, some also for a pruned input, some for their own."""
    n = draw(st.integers(1, 6))
    filters = draw(st.tuples(*[st.integers(2, 40)] * n))
    linear = draw(st.tuples(*[st.integers(1, 300)] * n))
    one = st.integers(0, n - 1)
    bilinear = draw(st.lists(st.tuples(one, one, st.integers(1, 60)), max_size=2 * n))
    return CostModel(filters, draw(st.integers(0, 500)), linear, tuple(bilinear))


ALPHAS = st.sampled_from([0.0, 0.5, 1.0, 3.0])


@given(costs(), st.data(), st.integers(1, 9))
@drawn
def test_the_marginal_cost_is_what_more_filters_cost(
    cost: CostModel, data: st.DataObject, more: int
) -> None:
    """Whatever is kept; it grows with every count, which is what lets allocation give up a group for good."""
    kept = [data.draw(st.integers(0, o)) for o in cost.filters]
    l = data.draw(st.integers(0, len(kept) - 1))
    then = [k + more * (m == l) for m, k in enumerate(kept)]
    marginal = cost.marginal(kept, l, more)
    assert type(marginal) is int
    assert marginal == cost.cost(then) - cost.cost(kept)
    one_by_one, growing = 0, kept.copy()
    for _ in range(more):
        one_by_one += cost.marginal(growing, l)
        growing[l] += 1
    assert marginal == one_by_one
    for other in range(len(kept)):
        larger = [k + (m == other) for m, k in enumerate(kept)]
        assert cost.marginal(larger, l, more) >= marginal


@given(
    costs(), st.data(), ALPHAS, st.integers(1, 5), st.floats(0, 1), st.sampled_from([1, 1, 2, 8])
)
@drawn
def test_counts_meet_the_budget_and_no_further_multiple_fits(
    cost: CostModel,
    data: st.DataObject,
    alpha: float,
    smallest: int,
    where: float,
    round_to: int,
) -> None:
    floors = filter_floors(cost.filters, smallest, round_to=round_to)
    sparsity = [data.draw(st.floats(0, 1)) for _ in floors]
    least = cost.cost(floors)
    budget = least + where * (cost.dense - least)
    kept = filter_counts(sparsity, cost, budget, floors, alpha, round_to)
    assert all(type(k) is int for k in kept)
    assert cost.cost(kept) <= budget
    for layer, (k, o) in enumerate(zip(kept, cost.filters, strict=True)):
        assert floors[layer] <= k <= o
        step = round_to if o >= 2 * round_to else 1
        assert k % step == 0 or k == o
        more = [*kept[:layer], min(k + step, o), *kept[layer + 1 :]]
        assert k == o or cost.cost(more) > budget
    for all_of_it, expected in ((cost.dense, list(cost.filters)), (least, floors)):
        assert filter_counts(sparsity, cost, all_of_it, floors, alpha, round_to) == expected


@pytest.mark.parametrize(
    ("round_to", "floors"),
    [
        (1, [1, 2, 2, 2, 2, 2, 4, 7]),
        (8, [1, 2, 2, 8, 8, 8, 8, 8]),
        (16, [1, 2, 2, 2, 2, 16, 16, 16]),
    ],
)
def test_floors_are_multiples_where_a_group_has_two(round_to: int, floors: list[int]) -> None:
    assert filter_floors([1, 2, 15, 16, 17, 33, 80, 130], round_to=round_to) == floors


@given(costs(), st.data(), ALPHAS, st.lists(st.floats(0, 1), min_size=2, max_size=4))
@drawn
def test_prune_ratios_meet_the_budget_and_fall_as_it_grows(
    cost: CostModel, data: st.DataObject, alpha: float, where: list[float]
) -> None:
    floors = filter_floors(cost.filters)
    sparsity = [data.draw(st.floats(0, 0.99)) for _ in floors]
    least = cost.cost(floors)
    before = [1.0] * len(floors)
    for budget in sorted(least + share * (cost.dense - least) for share in where):
        ratios = layer_prune_ratios(sparsity, cost, budget, floors, alpha)
        kept = [(1 - ratio) * o for ratio, o in zip(ratios, cost.filters, strict=True)]
        assert cost.cost(kept) == pytest.approx(budget, rel=1e-9)  # all of it is used
        for ratio, earlier, k, floor in zip(ratios, before, kept, floors, strict=True):
            assert ratio <= earlier + 1e-9
            assert ratio >= 0
            assert k >= floor - 1e-9
        before = ratios


@given(costs(), st.data(), st.floats(0.05, 1))
@drawn
def test_sparser_layers_lose_more_and_alpha_says_how_much(
    cost: CostModel, data: st.DataObject, where: float
) -> None:
    floors = [1] * len(cost.filters)
    sparsity = [data.draw(st.floats(0, 0.99)) for _ in floors]
    budget = cost.cost(floors) + where * (cost.dense - cost.cost(floors))
    for alpha in (0.0, 1.0, 3.0):
        ratios = layer_prune_ratios(sparsity, cost, budget, floors, alpha)
        free = [
            l
            for l, (r, o) in enumerate(zip(ratios, cost.filters, strict=True))
            if 1e-6 < r < 1 - 1 / o - 1e-6
        ]
        # Unclamped layers keep lambda (1 - s)^alpha of their filters, with one lambda.
        multipliers = [(1 - ratios[l]) / (1 - sparsity[l]) ** alpha for l in free]
        assert multipliers == pytest.approx([multipliers[0]] * len(free) if free else [], rel=1e-6)


def test_a_budget_below_the_floors_is_refused() -> None:
    cost = CostModel((8, 16), 100, (5, 3), ((0, 1, 2),))
    floors = [2, 4]
    least = 100 + 10 + 12 + 16
    assert filter_counts([0.5, 0.5], cost, least, floors) == floors
    for function in (filter_counts, layer_prune_ratios):
        with pytest.raises(InputError):
            function([0.5, 0.5], cost, least - 0.5, floors)


# ---------------------------------------------------------------------------- eq. 3


@given(st.integers(0, 999), powers_of_two, st.sets(st.integers(0, 11), max_size=9))
@drawn
def test_rescaling_a_layer_changes_no_rank(seed: int, factor: float, suspended: set[int]) -> None:
    (weight,) = network(seed)["group2"]
    live = [f for f in range(len(weight)) if f not in suspended]
    lowest = sorted(live, key=lambda f: weight[f].norm().item())[:2]
    # Nor does a suspended filter's norm.
    louder = weight.clone()
    louder[sorted(suspended)] *= 3
    for changed in (weight, weight * factor, louder):
        assert list(propose(filter_norms(changed), suspended, len(suspended) + 2, 0)) == sorted(
            lowest
        )


@given(st.integers(0, 999), st.lists(powers_of_two, min_size=3, max_size=3))
@drawn
def test_rescaling_one_writer_of_a_group_changes_no_score(seed: int, factors: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [filter_norms(torch.randn(9, 4, 3, 3, generator=generator)) for _ in factors]
    joint = joint_scores(scores)
    for writer, factor in enumerate(factors):
        others = scores.copy()
        others[writer] = factor * scores[writer]
        torch.testing.assert_close(joint_scores(others), joint)
    assert torch.equal(joint_scores(scores[:1]), scores[0])


def test_no_writer_drowns_another() -> None:
    loud, soft = torch.tensor([1000.0, 1001.0, 1002.0]), torch.tensor([0.003, 0.002, 0.001])
    assert joint_scores([loud, soft]).argsort().tolist() == [2, 1, 0]


# ---------------------------------------------------------------------------- when


SHARES = {"start": 0.05, "ramp_end": 0.4, "freeze": 0.5}


@pytest.mark.parametrize(
    ("total", "arguments"),
    [
        (20, {"start": 9, "ramp_end": 10, "freeze": 8}),  # start after freeze
        (20, {"start": 9, "ramp_end": 8, "freeze": 10}),  # start after ramp_end
        (20, {"start": 2, "ramp_end": 12, "freeze": 11}),  # ramp_end after freeze
        (20, {"start": 0, "ramp_end": 8, "freeze": 10}),
        (20, {"start": -1, "ramp_end": 8, "freeze": 10}),
        (20, {"start": 1, "ramp_end": 8, "freeze": 21}),  # freeze after the last epoch
        (20, {"start": 21, "ramp_end": 21, "freeze": 21}),
        (20, {"interval": 0}),
        (20, {"interval": -1}),
        (0, {"start": 1, "ramp_end": 1, "freeze": 1}),
        (0, {}),
        (20, {"freeze": 1.2}),  # a share that ends after the last epoch
    ],
)
def test_impossible_schedules_are_refused(total: int, arguments: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        make_schedule(total, **SHARES | arguments)
    if all(isinstance(value, int) for value in arguments.values()) and "start" in arguments:
        with pytest.raises(InputError):
            Schedule(total, **arguments)


@pytest.mark.parametrize(
    ("start", "ramp_end", "freeze"), [(1, 1, 1), (20, 20, 20), (1, 20, 20), (3, 3, 4)]
)
def test_the_extremes_of_a_schedule_are_allowed(start: int, ramp_end: int, freeze: int) -> None:
    schedule = make_schedule(20, start, ramp_end, freeze)
    assert (schedule.start, schedule.ramp_end, schedule.freeze) == (start, ramp_end, freeze)
    assert schedule == Schedule(20, start, ramp_end, freeze)


def test_epochs_are_taken_as_they_are_and_shares_follow_them() -> None:
    schedule = make_schedule(
        20, 10, 0.4, 0.5
    )  # 8 and 10 epochs by share, but the ramp starts at 10
    assert (schedule.start, schedule.ramp_end, schedule.freeze) == (10, 10, 10)
    schedule = make_schedule(20, 1, 1.0, 1.0)  # 1 is an epoch, 1.0 all of them
    assert (schedule.start, schedule.ramp_end, schedule.freeze) == (1, 20, 20)


@given(st.data(), st.integers(1, 250), st.integers(1, 30))
@drawn
def test_the_ramp_rises_to_the_whole_target(data: st.DataObject, total: int, interval: int) -> None:
    start, ramp_end, freeze = sorted(data.draw(st.integers(1, total)) for _ in range(3))
    schedule = Schedule(total, start, ramp_end, freeze, interval)
    steps = [epoch for epoch in range(total + 1) if schedule.is_step(epoch)]
    assert (steps[0], steps[-1]) == (start, freeze)
    assert list(steps) == sorted(set(steps))
    assert all(later - earlier == interval for earlier, later in pairwise(steps[:-1]))
    asked = [schedule.ramp(epoch) for epoch in steps]
    assert asked == sorted(asked)
    assert asked[0] > 0
    assert asked[-1] == 1.0
    assert all(
        (share == 1) == (epoch >= ramp_end) for share, epoch in zip(asked, steps, strict=True)
    )


# ---------------------------------------------------------------------------- plan

INPUTS = describe(torch.zeros(1, 3, 32, 32))


def group(name: str, filters: int) -> ChannelGroup:
    rows = (Entries(f"{name}.weight", 0, torch.arange(filters)[:, None]),)
    return ChannelGroup(name, filters, rows, rows, rows, ())


LAYERS = (group("stem", 6), group("block.conv1", 8), group("block.conv2", 6))
COST = CostModel((6, 8, 6), 50, (27, 54, 0), ((1, 2, 9),))
PRUNED = {"stem": (0, 5), "block.conv2": (1, 2, 3)}


def plan(**changes: Any) -> PrunePlan:
    return dataclasses.replace(make_plan(LAYERS, PRUNED, COST, INPUTS, "all", 0.4), **changes)


def test_a_plan_says_what_it_costs() -> None:
    made = plan()
    assert [(layer.name, layer.filters, layer.pruned, layer.kept) for layer in made.layers] == [
        ("stem", 6, (0, 5), 4),
        ("block.conv1", 8, (), 8),
        ("block.conv2", 6, (1, 2, 3), 3),
    ]
    assert made.macs == 50 + 27 * 4 + 54 * 8 + 9 * 8 * 3
    assert made.dense_macs == 50 + 27 * 6 + 54 * 8 + 9 * 8 * 6
    assert made.macs_cut == pytest.approx(1 - made.macs / made.dense_macs, abs=1e-12)
    assert (made.scope, made.target_cut, made.unit) == ("all", 0.4, "macs")
    assert made.inputs == {"shape": [1, 3, 32, 32], "dtype": "float32", "low": 0.0, "high": 0.0}
    empty = make_plan(LAYERS, {}, COST, INPUTS, "all")
    assert (empty.macs, empty.macs_cut, empty.target_cut) == (COST.dense, 0.0, 0.0)
    assert [layer.kept for layer in empty.layers] == [6, 8, 6]


def test_indices_in_any_order_make_the_same_plan() -> None:
    pruned = {"block.conv2": [3, 1, 2], "stem": [5, 0]}
    assert make_plan(LAYERS, pruned, COST, INPUTS, "all", 0.4) == plan()


@pytest.mark.parametrize(
    "pruned",
    [
        (2, 1),  # unsorted
        (0, 2, 1, 3),  # unsorted inside
        (1, 1),  # twice
        (0, 6),  # out of range
        (-1, 0),
        (0, 1, 2, 3, 4, 5),  # nothing left
    ],
)
def test_bad_indices_are_refused(pruned: tuple[int, ...]) -> None:
    assert LayerPlan("stem", 6, (0, 1, 2, 3, 4)).kept == 1
    assert LayerPlan("stem", 6, ()).kept == 6
    with pytest.raises(InputError):
        LayerPlan("stem", 6, pruned)


@pytest.mark.parametrize("pruned", [{"stem": [6]}, {"stem": range(6)}, {"missing": [0]}])
def test_plans_of_another_network_are_refused(pruned: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        make_plan(LAYERS, pruned, COST, INPUTS, "all")


def test_plans_that_name_a_group_twice_or_an_unknown_scope_are_refused() -> None:
    stem, *_ = plan().layers
    with pytest.raises(InputError, match="names a layer twice"):
        plan(layers=(stem, stem))
    with pytest.raises(InputError, match="scope 'outer' is none of coupled, all, inner"):
        plan(scope="outer")


def test_a_plan_finds_its_groups() -> None:
    more = (group("other", 3), *reversed(LAYERS))
    assert [(found.name, part.name) for found, part in plan().match(more)] == [
        (name, name) for name in ("stem", "block.conv1", "block.conv2")
    ]
    with pytest.raises(InputError, match=r"no layer 'block\.conv1' with 8 filters"):
        plan().match((LAYERS[0], group("block.conv1", 9), LAYERS[2]))


def test_the_digest_is_that_of_names_widths_and_indices() -> None:
    digest = plan().digest
    assert len(digest) == 64
    assert int(digest, 16) > 0
    for irrelevant in (
        {"macs": 5},
        {"dense_macs": 9999},
        {"target_cut": 0.123},
        {"unit": "filters"},
        {"scope": "coupled"},
        {"inputs": describe(torch.zeros(1, 3, 8, 8))},
    ):
        assert plan(**irrelevant).digest == digest
    stem, conv1, conv2 = plan().layers
    others = [
        (LayerPlan("stam", 6, (0, 5)), conv1, conv2),
        (LayerPlan("stem", 7, (0, 5)), conv1, conv2),
        (LayerPlan("stem", 6, (0, 4)), conv1, conv2),
        (LayerPlan("stem", 6, (0,)), conv1, conv2),
        (stem, LayerPlan("block.conv1", 8, (5,)), conv2),
        (conv1, stem, conv2),
        (stem, conv1),
    ]
    digests = {plan(layers=layers).digest for layers in others}
    assert len(digests | {digest}) == len(others) + 1


def test_the_digest_is_the_same_in_every_version() -> None:
    # Checkpoints and exported networks carry it.
    assert plan().digest == "684da42a6e92568b63dc6aca110254b9a4eabdeaff3307e5877549a0e23647a7"


@given(
    st.data(),
    st.floats(0, 0.99),
    st.sampled_from(["macs", "filters"]),
    st.sampled_from(["coupled", "all", "inner"]),
)
@drawn
def test_json_gives_the_same_plan_back(
    data: st.DataObject, target: float, unit: Any, scope: Any
) -> None:
    pruned = {
        l.name: data.draw(st.sets(st.integers(0, l.filters - 1), max_size=l.filters - 1))
        for l in LAYERS
    }
    made = make_plan(
        LAYERS,
        {name: sorted(filters) for name, filters in pruned.items()},
        COST,
        INPUTS,
        scope,
        target,
        unit,
    )
    text = made.to_json()
    assert json.loads(text)
    back = PrunePlan.from_json(text)
    assert back == made
    assert back.digest == made.digest
    assert back.to_json() == text


@pytest.mark.parametrize(
    "spoil",
    [("[0, 5]", "[0, 4]"), ("[0, 5]", "[5, 0]"), ('"stem"', '"stam"'), ("{", ""), ("6", "7")],
)
def test_spoiled_json_is_refused(spoil: tuple[str, str]) -> None:
    text = json.dumps(json.loads(plan().to_json()))
    assert spoil[0] in text
    with pytest.raises(InputError):
        PrunePlan.from_json(text.replace(*spoil, 1))


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"layers": 3}'])
def test_json_that_is_no_plan_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        PrunePlan.from_json(text)


@pytest.mark.parametrize(
    "changes",
    [
        {"macs": -5},
        {"macs": "7"},
        {"dense_macs": 0},
        {"target_cut": float("nan")},
        {"target_cut": 2},
        {"unit": "grams"},
        {"scope": "most"},
        {"layers": [{"name": "stem", "filters": "6", "pruned": []}]},
        {"layers": [{"name": "stem", "filters": 6, "pruned": [6]}]},
        {"layers": [{"name": None, "filters": 6, "pruned": []}]},
        {"layers": [{"name": "stem", "filters": True, "pruned": []}]},
        {"layers": [{"name": "stem", "filters": 6, "pruned": [1.0]}]},
        {"layers": [{"name": "stem", "filters": 6, "pruned": [True]}]},
        {"macs": 10**9},
        {"inputs": {"shape": ["1", "3"], "dtype": "float32", "low": 0.0, "high": 0.0}},
        {"inputs": {"shape": "13", "dtype": "float32", "low": 0.0, "high": 0.0}},
        {"inputs": {"shape": [1, 3], "dtype": "float33", "low": 0.0, "high": 0.0}},
        {"inputs": {"in_order": [{"shape": [1], "dtype": "int64", "low": 0, "high": 10**400}]}},
    ],
    ids=lambda changes: f"{changes!s:.60}",
)
def test_a_plan_that_cannot_be_is_refused(changes) -> None:
    content = unsealed(json.loads(plan().to_json()))
    with pytest.raises(InputError):
        PrunePlan.from_json(json.dumps(sealed(content | changes)))


def test_a_plan_of_numpys_numbers_is_one_of_pythons() -> None:
    made = LayerPlan("stem", np.int64(6), (np.int64(1), np.int32(2)))
    assert made == LayerPlan("stem", 6, (1, 2))
    whole = plan(layers=(made,), macs=np.int64(5), target_cut=np.float32(0.5))
    assert PrunePlan.from_json(whole.to_json()) == whole


def test_a_long_schedule_takes_no_memory() -> None:
    schedule = make_schedule(10**12, 0.05, 0.4, 0.5)
    assert schedule.is_step(5 * 10**10)
    assert not schedule.is_step(5 * 10**11 + 1)


# ---------------------------------------------------------------------------- PSAP's arguments


STARTING_VALUES = {
    "scope": "coupled",
    "exclude": (),
    "kappa": 0.5,
    "sparsity_reference": "network",
    "fan": "in",
    "alpha": 1.0,
    "protection": True,
    "pulse_batches": 10,
    "margin": 0.3,
    "min_filters": 2,
    "min_filter_share": 0.05,
    "round_to": 1,
    "start": 0.05,
    "ramp_end": 0.40,
    "freeze": 0.50,
    "interval": 1,
}


class Chain(nn.Module):
    """Two convolutions of eight filters, which may go down to two each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return self.head(x.mean((2, 3)))


def pruner(**arguments: Any) -> PSAP:
    model = Chain()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return PSAP(model, optimizer, torch.zeros(1, 3, 8, 8), **{"total_epochs": 10, **arguments})


def test_unreachable_targets_are_refused_before_training() -> None:
    assert pruner(target_filters_cut=0.75).plan.macs_cut == 0
    assert pruner(target_filters_cut=0.5, min_filters=4)
    least, dense = (27 * 36 * k + 9 * 16 * k * k + 4 * k for k in (2, 8))
    assert pruner(target_macs_cut=1 - least / dense - 1e-9)
    for unreachable in (
        {"target_filters_cut": 0.76},
        {"target_filters_cut": 0.51, "min_filters": 4},
        {"target_filters_cut": 0.51, "min_filter_share": 0.5},
        {"target_macs_cut": 1 - least / dense + 1e-9},
        {"target_macs_cut": 0.01, "min_filters": 8},
        {"target_filters_cut": 0.51, "round_to": 4},
    ):
        with pytest.raises(InputError):
            pruner(**unreachable)


def test_the_starting_values() -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(Settings)}
    assert {name: defaults[name] for name in STARTING_VALUES} == STARTING_VALUES
    required = defaults.keys() - STARTING_VALUES.keys()
    assert required == {"target_macs_cut", "target_filters_cut", "total_epochs"}
    of_a_pruner = dataclasses.asdict(pruner(target_macs_cut=0.5).settings)
    assert {name: of_a_pruner[name] for name in STARTING_VALUES} == STARTING_VALUES


@pytest.mark.parametrize(
    ("total", "epochs"),
    [(1, (1, 1, 1)), (2, (1, 1, 1)), (15, (1, 6, 8)), (30, (2, 12, 15)), (200, (10, 80, 100))],
)
def test_the_default_schedule(total: int, epochs: tuple[int, int, int]) -> None:
    assert pruner(target_macs_cut=0.5, total_epochs=total).schedule == Schedule(total, *epochs)


def test_rounding_never_misses_a_whole_budget() -> None:
    """(1 - 0.8) * 20 is 3.999... in floating point; four filters fit all the same."""
    two_layers = CostModel((10, 10), 0, (1, 1), ())
    assert (1 - 0.8) * 20 < 4
    assert two_layers.budget(0.8) == 4
    assert filter_counts([0.3, 0.3], two_layers, two_layers.budget(0.8), [2, 2]) == [2, 2]
    assert filter_counts([0.3, 0.3], two_layers, two_layers.budget(0.9), [1, 1]) == [1, 1]
    assert two_layers.budget(0.33) == 0.6699999999999999 * 20
