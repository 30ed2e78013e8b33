"""Some of what the method card says of the recorded runs and no table holds."""

from collections import Counter

import pandas as pd
import pytest
from scipy.stats import t

from analysis.figures.utility import LAYER, correlations, read_pulse_check
from analysis.findings import compare
from analysis.recorded import read_suite_runs
from analysis.results import RESULTS, Run
from analysis.stats import estimate, paired_difference, student_half_width
from analysis.suites import find_suite, runs_of_cells

STUDIES = "cifar16_defaults", "cifar16_study"  # eight fresh seeds, and the three before


@pytest.fixture(scope="module")
def studies():
    return [compare(find_suite(name), read_suite_runs(RESULTS / name)) for name in STUDIES]


def short_run(cell: str) -> Run:
    """The run from a pretrained network; it has one seed."""
    runs = read_suite_runs(RESULTS / "cifar10_short_comparison")
    return next(run for run in runs if run.cell == cell)


def kept(run):
    return {layer["name"]: layer["filters"] - len(layer["pruned"]) for layer in run.plan["layers"]}


def moved_widths(study):
    """The widths that the last plans of adaptive ratios and of one ratio do not share, and how often that is so."""
    found = Counter()
    for adaptive, uniform in study.suite.effects["adaptive layer ratios"]:
        for seed, run in study.runs[adaptive].items():
            ours, theirs = kept(run), kept(study.runs[uniform][seed])
            found[
                tuple(
                    (name, ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]
                )
            ] += 1
    return found


def test_adaptive_ratios_move_the_same_four_filters_in_14_of_16_pairs(studies):
    fresh, before = map(moved_widths, studies)
    (same, times), *_ = fresh.most_common()
    assert (times, fresh.total()) == (14, 16)
    assert same[0] == ("conv1", 5, 4)
    assert [(name, ours - theirs) for name, ours, theirs in same[1:]] == [
        (f"layer3.{i}.conv2", -1) for i in range(3)
    ]
    assert (
        sum(times for pair, times in before.items() if ("conv1", 5, 4) in pair)
        == before.total()
        == 6
    )


def test_adaptive_ratios_over_all_eleven_seeds(studies):
    by_seed = [
        value
        for study in studies
        for value in study.effects["adaptive layer ratios"].by_seed.values()
    ]
    found = estimate(by_seed)
    assert found.n == 11
    assert [round(value, 2) for value in (found.mean, found.low, found.high)] == [0.27, 0.03, 0.51]


@pytest.mark.parametrize(
    ("cell", "first", "last"),
    [
        ("psap 54", 0.03, 0.20),
        ("psap without protection 54", 0.03, 0.22),
        ("psap one step 54", 0.03, 0.18),
        ("l1 54", 0.50, 0.19),
        ("sfp 54", 0.03, 1.79),
    ],
)
def test_training_losses_from_a_pretrained_network(cell, first, last):
    run = short_run(cell)
    losses = run.metrics["train/loss"]
    assert (round(losses.iloc[0], 2), round(losses.iloc[-1], 2)) == (first, last)


def test_sfp_changes_its_choice_from_a_pretrained_network():
    run = short_run("sfp 54")
    assert (run.metrics["psap/mask_churn"].iloc[1:3] > 0.5).all()


def test_three_of_twelve_differences_of_the_small_table_stand_after_correction():
    of_cells, _ = runs_of_cells(
        find_suite("cifar16_comparison"), read_suite_runs(RESULTS / "cifar16_comparison")
    )
    top1 = {
        name: {seed: run.summary.top1 for seed, run in runs.items()}
        for name, runs in of_cells.items()
    }
    others = ("thin", "thin_plan", "l1", "fpgm", "sfp", "psap without protection")
    compared = {f"{name} {cut}": f"psap {cut}" for name in others for cut in (54, 85)}
    found = {name: paired_difference(top1[name], top1[psap]) for name, psap in compared.items()}
    assert {name for name, one in found.items() if one.high < 0} == {
        "thin 85",
        "thin_plan 85",
        "l1 85",
        "fpgm 54",
        "fpgm 85",
        "sfp 54",
        "sfp 85",
    }
    halves = {
        name: student_half_width(one.n, one.sd, one.n - 1, len(found))
        for name, one in found.items()
    }
    stand = {name for name, one in found.items() if abs(one.mean) > halves[name]}
    assert stand == {"l1 85", "sfp 54", "sfp 85"}


def test_before_its_export_fpgms_difference_at_85_stands_too():
    of_cells, _ = runs_of_cells(
        find_suite("cifar16_comparison"), read_suite_runs(RESULTS / "cifar16_comparison")
    )

    def masked_to_psap(cut):
        masked = {seed: run.summary.masked_top1 for seed, run in of_cells[f"fpgm {cut}"].items()}
        return paired_difference(
            masked, {seed: run.summary.top1 for seed, run in of_cells[f"psap {cut}"].items()}
        )

    found = {cut: masked_to_psap(cut) for cut in (54, 85)}
    assert {
        cut: [round(value, 1) for value in (one.mean, one.low, one.high)]
        for cut, one in found.items()
    } == {
        54: [-1.7, -3.3, -0.1],
        85: [-4.2, -5.0, -3.4],
    }
    assert found[85].mean < -student_half_width(5, found[85].sd, 4, 12)


@pytest.mark.parametrize(
    ("cell", "low", "high"),
    [
        ("alpha 4 and ratios of the stage width only", -3.6, 3.1),
        ("alpha 4 and ratios permuted over layers", -2.4, 2.1),
    ],
)
def test_controls_against_alpha_4_scatter_more_than_the_shared_spread_says(
    studies, cell, low, high
):
    own = estimate(list(studies[1].differences[cell].by_seed.values()))
    assert (round(own.low, 1), round(own.high, 1)) == (low, high)


def test_adaptive_ratios_stand_after_correction_for_all_seven_with_their_own_spread_only(studies):
    effect = studies[0].effects["adaptive layer ratios"]
    own = estimate(list(effect.by_seed.values()))
    spread = studies[0].spread
    chances = [
        2 * float(t.sf(own.mean / (own.sd / own.n**0.5), own.n - 1)),
        2 * float(t.sf(own.mean / (effect.half / t.ppf(0.975, spread.degrees)), spread.degrees)),
    ]
    assert len(studies[0].differences) + len(studies[0].effects) == 7
    assert [round(7 * chance, 2) for chance in chances] == [0.03, 0.09]


def test_the_utility_foresees_the_loss_where_psap_looks_too():
    filters = pd.DataFrame(
        read_pulse_check(RESULTS / "utility" / "cifar10_small_resnet20.json")["filters"]
    )
    smaller = filters[filters.groupby(LAYER)["norm"].rank(pct=True) <= 0.5]
    for of, low, high in ((filters, 0.76, 0.82), (smaller, 0.74, 0.84)):
        found = correlations(of)["utility"]
        assert (round(found.min(), 2), round(found.max(), 2)) == (low, high)


def test_layers_of_the_pretrained_network_differ():
    run = short_run("psap 54")
    sparsity = run.metrics.filter(like="layer/weight_sparsity_ratio/").dropna().iloc[-1]
    assert (round(sparsity.min(), 2), round(sparsity.max(), 2)) == (0.37, 0.62)
    ratios = [len(layer["pruned"]) / layer["filters"] for layer in run.plan["layers"]]
    assert (round(min(ratios), 2), round(max(ratios), 2)) == (0.28, 0.58)
