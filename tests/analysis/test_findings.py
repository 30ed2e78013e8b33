"""Findings of a study: paired differences to the reference, on validation images, with a pooled spread."""

import re
from dataclasses import replace

import numpy as np
import pytest

from analysis.figures.study import draw_study
from analysis.findings import (
    Spread,
    compare,
    effect_rows,
    findings,
    shared_spread,
    study_markdown,
    write_findings,
)
from analysis.results import read_run
from analysis.stats import student_half_width
from analysis.suites import PlannedCell, PlannedSuite, setting_of
from experiments.runs.files import DataError
from tests.analysis.runs import write_run

ACCURACY = {"psap": [90, 91, 95], "thin": [80, 81, 86], "without protection": [90.5, 90, 95.2]}


@pytest.fixture
def study(tmp_path):
    """A suite of three cells and one that was not run, and its runs; their validation accuracy is top1 - 10 / 8."""
    runs = []
    for cell, values in ACCURACY.items():
        for seed, top1 in enumerate(values):
            method = "thin" if cell == "thin" else "psap"
            folder = tmp_path / cell / str(seed)
            runs.append(
                read_run(
                    write_run(
                        folder,
                        method,
                        top1=top1,
                        seed=seed,
                        suite="study",
                        cell=cell,
                        protection="without" not in cell,
                    )
                )
            )
    identities = {run.cell: run.identity for run in runs}
    identities["never"] = identities["psap"]
    cells = tuple(
        PlannedCell(
            name,
            setting_of(identity),
            setting_of(identity).target,
            identity,
            against="psap" if name != "psap" else None,
        )
        for name, identity in identities.items()
    )
    return PlannedSuite("study", "A study", (0, 1, 2), cells, "psap"), runs


def run_of(run, top1):
    """The run with another accuracy."""
    moved = top1 - run.summary.top1
    metrics = run.metrics.assign(**{"eval/top1": run.metrics["eval/top1"] + moved})
    return replace(run, summary=replace(run.summary, top1=top1), metrics=metrics)


def test_cells_are_compared_with_the_reference_on_validation_images_seed_by_seed(study):
    rows, notes = findings(compare(*study))
    by_cell = rows.set_index("cell")
    assert by_cell.loc["psap", "accuracy [%]"] == "90.75 ± 2.65"
    assert by_cell.loc["psap", "test [%]"] == "92.00"
    assert by_cell.loc["psap", "difference"] == ""
    # Differences -10, -10, -9: Student's own interval, 4.303 * 0.5774 / sqrt(3).
    assert by_cell.loc["thin", ["n", "difference", "95 %", "verdict", "plan"]].tolist() == [
        "3 of 3",
        "-9.67 ± 0.58",
        "[-11.10, -8.23]",
        "worse",
        "",
    ]
    # Differences 0.5, -1, 0.2; with psap a residual sd of 0.5612 with 2 degrees; 4.303 * 0.5612 * sqrt(2 / 3).
    assert by_cell.loc[
        "without protection", ["difference", "95 %", "verdict", "plan"]
    ].tolist() == [
        "-0.10 ± 0.79",
        "[-2.07, +1.87]",
        "not shown",
        "0 filters, 0 %",
    ]
    assert by_cell.loc["never", ["n", "accuracy [%]", "verdict"]].tolist() == [
        "0 of 3",
        "not run",
        "",
    ]
    assert "Cells of psap and its variants have one standard deviation, 0.56 points" in notes[1]
    assert "(Bonferroni: 2 with the shared standard deviation, 1 others)" in notes[2]
    assert notes[-1] == "Hardware: x86_64 CPU, 2 cores; training: 0.1 h in all; commits: 0123456."


def test_the_picture_shows_every_difference_and_its_two_intervals(study):
    suite, runs = study
    (axes,) = draw_study(
        compare(suite, [run for run in runs if (run.cell, run.seed) != ("thin", 2)])
    ).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "thin (n = 2)",
        "without protection",
        "never",
    ]
    bars = [sorted(bar.get_segments()[0].tolist()) for bar in axes.collections]
    # Bonferroni of two, then the interval of this one: 6.205 and 4.303, times 0.5612 * sqrt(2 / 3).
    assert bars[-2:] == [
        [[pytest.approx(-0.1 - half, abs=0.01), 1], [pytest.approx(-0.1 + half, abs=0.01), 1]]
        for half in (2.84, 1.97)
    ]
    seeds = [line.get_xdata() for line in axes.lines if line.get_marker() == "|"]
    assert [list(values) for values in seeds] == [[-10, -10], pytest.approx([0.5, -1, 0.2])]
    assert [text.get_text() for text in axes.texts] == ["not run"]


def test_the_picture_has_the_effects_below_the_cells(study):
    suite, runs = study
    effects = {"pruning": [("psap", "thin")], "nothing": [("never", "psap")]}
    (axes,) = draw_study(compare(replace(suite, effects=effects), runs)).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [
        "thin",
        "without protection",
        "never",
        "effect of pruning",
        "effect of nothing",
    ]
    ends = [bar.get_segments()[0][:, 1].tolist() for bar in axes.collections]
    assert [place for place, _ in ends] == [0, 0, 1, 1, 3, 3]
    assert [text.get_text() for text in axes.texts] == ["not run", "no seed in common"]


def test_the_picture_tells_no_interval_and_nothing_to_compare_with_from_not_run(study):
    suite, runs = study
    (axes,) = draw_study(compare(suite, [run for run in runs if run.seed == 0])).axes
    assert not axes.collections
    assert {line.get_fillstyle() for line in axes.lines if line.get_marker() == "o"} == {"none"}
    cells = [replace(c, against="never") if c.name == "thin" else c for c in suite.cells]
    (axes,) = draw_study(compare(replace(suite, cells=tuple(cells)), runs)).axes
    assert [text.get_text() for text in axes.texts] == ["no seed in common", "not run"]


def test_a_verdict_holds_for_all_intervals_of_its_kind_together(study):
    suite, runs = study
    close = [
        run_of(run, top1=run.summary.top1 + 8.2) if run.cell == "thin" else run for run in runs
    ]
    thin = next(cell for cell in suite.cells if cell.name == "thin")
    more = replace(suite, cells=(*suite.cells, replace(thin, name="thinner")))
    for asked, verdict in (
        (suite, "worse"),
        (more, "not shown"),
    ):  # -1.8, -1.8, -0.8: 1.467 > 1.434, < 2.068
        found = findings(compare(asked, close))[0].set_index("cell").loc["thin"]
        assert found[["difference", "95 %", "verdict"]].tolist() == [
            "-1.47 ± 0.58",
            "[-2.90, -0.03]",
            verdict,
        ]


def test_a_cell_may_be_compared_with_another_one_than_the_reference(study):
    suite, runs = study
    cells = [
        replace(c, against="thin") if c.name == "without protection" else c for c in suite.cells
    ]
    found = findings(compare(replace(suite, cells=tuple(cells)), runs))[0].set_index("cell")
    assert found.loc["without protection", ["against", "difference", "plan"]].tolist() == [
        "thin",
        "+9.57 ± 0.81",
        "",
    ]
    assert found.loc["thin", "against"] == "psap"


def test_an_effect_is_the_mean_of_its_pairs(study):
    suite, runs = study
    again = [
        replace(run, summary=replace(run.summary, cell="never"))
        for run in runs
        if run.cell == "psap"
    ]
    again = [
        run_of(run, top1=run.summary.top1 + move)
        for run, move in zip(again, (1, 2, 4), strict=True)
    ]
    again = [replace(run, summary=replace(run.summary, top1=run.summary.top1 + 3)) for run in again]
    effects = {
        "inside": [("psap", "without protection"), ("never", "without protection")],
        "outside": [("thin", "psap")],
        "no seed": [("never", "psap")],
    }
    asked = replace(suite, effects=effects)
    # psap - without protection is -0.5, 1, -0.2; never is 1, 2, 4 above psap; two pairs weigh 1/2, 1/2, 1.
    found = compare(asked, [*runs, *again])
    assert found.effects["inside"].by_seed == pytest.approx({0: 0.0, 1: 2.0, 2: 1.8})
    for number, half in ((1, found.effects["inside"].half), (3, found.effects["inside"].together)):
        assert half == pytest.approx(
            student_half_width(3, 1.5**0.5 * found.spread.sd, found.spread.degrees, number)
        )
    assert found.effects["outside"].half == found.differences["thin"].half  # their own spread
    shown = effect_rows(found).set_index("effect").loc["inside"]
    assert shown["mean of"] == "psap - without protection; never - without protection"
    assert shown[["n", "above zero", "difference"]].tolist() == ["3", "2 of 3", "+1.27 ± 1.10"]
    assert shown["test difference"] == "+2.77 ± 1.10"
    lacking = effect_rows(compare(asked, runs)).set_index("effect")
    assert lacking.loc["no seed", ["n", "difference", "verdict"]].tolist() == ["0", "", ""]
    assert "| inside " in study_markdown(found)
    assert "2 with the shared standard deviation, 1 others, 3 effects" in study_markdown(found)


def test_the_plan_tells_how_far_a_cell_lies_from_the_reference(study):
    suite, runs = study
    first = next(run.plan["layers"] for run in runs if run.cell == "psap")
    pruned = sum(len(layer["pruned"]) for layer in first)
    other = [
        {**layer, "pruned": layer["pruned"][1:]} for layer in first
    ]  # one filter a layer stays
    moved = [replace(run, plan={"layers": other}) if "without" in run.cell else run for run in runs]
    found = findings(compare(suite, moved))[0].set_index("cell").loc["without protection", "plan"]
    assert found == f"{len(first)} filters, {100 * len(first) / pruned:.0f} %"


def test_the_shared_spread_knows_neither_where_cells_stand_nor_what_seeds_share():
    noise = {"a": {0: 1.0, 1: -1.0}, "b": {0: -1.0, 1: 1.0}}
    moved = {
        name: {seed: value + 100 * (name == "b") + 7 * seed for seed, value in row.items()}
        for name, row in noise.items()
    }
    assert (
        shared_spread(noise, "a") == shared_spread(moved, "a") == Spread(pytest.approx(2.0), 1, {})
    )
    assert shared_spread({"a": {0: 1.0}}, "a") == Spread(0.0, 0, {})


@pytest.mark.long
def test_of_cells_without_effect_one_in_twenty_lies_outside_and_one_suite_in_twenty_has_a_cell_apart():
    draw = np.random.default_rng(0)
    outside = apart = 0
    for _ in range(400):
        cells = draw.normal(size=(11, 3)) + draw.normal(size=3)
        accuracy = {name: dict(enumerate(row)) for name, row in enumerate(cells)}
        spread = shared_spread(accuracy, 0)
        half = student_half_width(3, 2**0.5 * spread.sd, spread.degrees)
        means = [np.mean([*row.values()]) for row in accuracy.values()]
        outside += sum(abs(mean - means[0]) > half for mean in means[1:])
        apart += bool(spread.apart)
    assert 0.04 < outside / 4000 < 0.06
    assert 0.02 < apart / 400 < 0.08


def test_a_cell_whose_residuals_are_beyond_the_others_has_its_own_spread(study):
    draw = np.random.default_rng(1)
    quiet = {
        name: dict(enumerate(row))
        for name, row in zip("abcdefgh", draw.normal(size=(8, 3)), strict=True)
    }
    wild, wilder = {0: 10.0, 1: -10.0, 2: 5.0}, {0: -50.0, 1: 40.0, 2: 0.0}
    found = shared_spread(quiet | {"y": wild, "z": wilder}, "a")
    assert (found.sd, found.degrees) == (shared_spread(quiet, "a").sd, 14)
    assert list(found.apart) == ["z", "y"]
    # z's F: the sum of squares that it adds has 2 degrees, what is without it 16.
    squares = [
        spread.sd**2 * spread.degrees
        for spread in (
            shared_spread(quiet | {"y": wild}, "y"),
            shared_spread(quiet | {"y": wild, "z": wilder}, "z"),
        )
    ]
    assert found.apart["z"] == pytest.approx((squares[1] - squares[0]) / 2 / (squares[0] / 16))
    assert shared_spread(quiet | {"z": wilder}, "z").apart == {}  # the reference

    suite, runs = study
    move = {"a": (0, 0.1, 0), "b": (0.1, 0, 0), "wild": (9, -8, 3)}
    cells = [replace(suite.cells[0], name=name, against="psap") for name in move]
    made = [
        run_of(
            replace(run, summary=replace(run.summary, cell=name)),
            run.summary.top1 + moves[run.seed],
        )
        for name, moves in move.items()
        for run in runs
        if run.cell == "psap"
    ]
    study = compare(replace(suite, cells=(suite.cells[0], *cells)), [*runs[:3], *made])
    assert (study.inside, study.outside, [*study.spread.apart]) == (2, 1, ["wild"])
    assert study.differences["wild"].half == pytest.approx(
        student_half_width(3, np.std(move["wild"], ddof=1), 2)
    )
    assert study.differences["a"].half == pytest.approx(
        student_half_width(3, 2**0.5 * study.spread.sd, 4)
    )
    assert re.search(
        r"their own, and so has wild \(F = \d+\.\d\): what the means leave of it",
        study_markdown(study),
    )
    (legend,) = draw_study(study).legends
    assert (
        legend.get_title().get_text().endswith("share one spread; others, and wild, have their own")
    )


def test_a_run_of_another_configuration_than_its_cells_is_left_out(study):
    suite, runs = study
    cells = []
    for cell in suite.cells:
        if "without" in cell.name:
            method = {**cell.settings["method"], "alpha": 4.0}
            cell = replace(cell, settings={**cell.settings, "method": method})
        cells.append(cell)
    rows, notes = findings(compare(replace(suite, cells=tuple(cells)), runs))
    assert rows.set_index("cell").loc["without protection", "n"] == "0 of 3"
    reason = "without protection, seed 0: it was not trained as the suite says (method.alpha 1.0, not 4.0)"
    assert f"Left out: {reason}." in notes


def test_without_two_runs_of_a_cell_there_is_no_interval(study):
    suite, runs = study
    rows, notes = findings(compare(suite, [run for run in runs if run.seed == 0]))
    assert rows.set_index("cell").loc["thin", ["n", "difference", "95 %", "verdict"]].tolist() == [
        "1 of 3",
        "-10.00",
        "",
        "",
    ]
    assert "one standard deviation" not in notes[1]


def test_only_a_study_has_findings(study, tmp_path):
    suite, runs = study
    plain = PlannedSuite(suite.name, suite.title, suite.seeds, suite.cells)
    assert write_findings([plain], runs, tmp_path) == []
    assert [path.name for path in write_findings([suite, plain], runs, tmp_path)] == [
        "study_findings.md"
    ]
    assert (tmp_path / "study_findings.md").read_text() == study_markdown(compare(suite, runs))
    with pytest.raises(DataError, match="the suite study has no reference"):
        compare(plain, runs)


def test_a_run_without_validation_images_is_refused(tmp_path):
    run = read_run(
        write_run(tmp_path / "other", "psap", dataset="cifar10", suite="study", cell="psap")
    )
    cells = (PlannedCell("psap", setting_of(run.identity), None, run.identity),)
    with pytest.raises(
        DataError, match="psap, seed 0 of study was trained without validation images"
    ):
        compare(PlannedSuite("study", "A study", (0,), cells, "psap"), [run])


def test_a_run_from_weights_that_may_have_seen_the_validation_images_is_refused(tmp_path):
    run = read_run(
        write_run(tmp_path / "run", "psap", weights="trained", suite="study", cell="psap")
    )
    cells = (PlannedCell("psap", setting_of(run.identity), None, run.identity),)
    with pytest.raises(
        DataError,
        match="psap, seed 0 of study starts from weights that may have seen its validation",
    ):
        compare(PlannedSuite("study", "A study", (0,), cells, "psap"), [run])
