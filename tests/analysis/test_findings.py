"""Findings of a study: paired differences to the reference, on validation images, with a pooled spread."""

import numpy as np
import pytest

from analysis.collect import DataError, read_run
from analysis.findings import findings, markdown, residual_spread, write_findings
from analysis.stats import student_half_width
from analysis.suites import Cell, Suite, setting_of
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
            runs.append(read_run(write_run(folder, method, top1=top1, seed=seed, suite="study", cell=cell,
                                           protection="without" not in cell)))  # fmt: skip
    settings = {run.cell: setting_of(run.config) for run in runs}
    settings["never"] = settings["psap"]
    cells = tuple(Cell(name, setting, setting.target) for name, setting in settings.items())
    return Suite("study", "A study", (0, 1, 2), cells, "psap"), runs


def test_cells_are_compared_with_the_reference_on_validation_images_seed_by_seed(study):
    rows, notes = findings(*study)
    by_cell = rows.set_index("cell")
    assert by_cell.loc["psap", "accuracy [%]"] == "90.75 ± 2.65"
    assert by_cell.loc["psap", "test [%]"] == "92.00"
    assert by_cell.loc["psap", "difference"] == ""
    # Differences -10, -10, -9 and 0.5, -1, 0.2; residual sd 0.5207 with 2 * 2 degrees; 2.776 * 0.5207 * sqrt(2 / 3).
    assert by_cell.loc["thin", ["n", "difference", "95 %", "shown"]].tolist() == [
        "3 of 3", "-9.67", "[-10.85, -8.49]", "worse",
    ]  # fmt: skip
    assert by_cell.loc["without protection", ["difference", "95 %", "shown"]].tolist() == [
        "-0.10", "[-1.28, +1.08]", "nothing",
    ]  # fmt: skip
    assert by_cell.loc["never", ["n", "accuracy [%]", "difference"]].tolist() == ["0 of 3", "not run", ""]
    assert "0.52 points once the means of cells and seeds are taken off (4 degrees of freedom;" in notes[1]


def test_the_residual_spread_knows_neither_where_cells_stand_nor_what_seeds_share():
    noise = [{0: 1.0, 1: -1.0}, {0: -1.0, 1: 1.0}]
    moved = [{seed: value + 100 * cell + 7 * seed for seed, value in row.items()} for cell, row in enumerate(noise)]
    assert residual_spread(noise) == residual_spread(moved) == (pytest.approx(2.0), 1)
    assert residual_spread([{0: 1.0}]) == (0.0, 0)


def test_of_cells_without_effect_one_in_twenty_lies_outside():
    draw = np.random.default_rng(0)
    outside = 0
    for _ in range(400):
        accuracy = [dict(enumerate(row)) for row in draw.normal(size=(11, 3)) + draw.normal(size=3)]
        half = student_half_width(3, 2**0.5 * residual_spread(accuracy)[0], residual_spread(accuracy)[1])
        means = [np.mean([*row.values()]) for row in accuracy]
        outside += sum(abs(mean - means[0]) > half for mean in means[1:])
    assert 0.04 < outside / 4000 < 0.06


def test_without_two_runs_of_a_cell_there_is_no_interval(study):
    suite, runs = study
    rows, notes = findings(suite, [run for run in runs if run.seed == 0])
    assert rows.set_index("cell").loc["thin", ["n", "difference", "95 %", "shown"]].tolist() == [
        "1 of 3", "-10.00", "", "",
    ]  # fmt: skip
    assert len(notes) == 2


def test_only_a_study_has_findings(study, tmp_path):
    suite, runs = study
    plain = Suite(suite.name, suite.title, suite.seeds, suite.cells)
    assert write_findings([plain], runs, tmp_path) == []
    assert [path.name for path in write_findings([suite, plain], runs, tmp_path)] == ["study_findings.md"]
    assert (tmp_path / "study_findings.md").read_text() == markdown(suite, runs)
    with pytest.raises(DataError, match="the suite study has no reference"):
        findings(plain, runs)


def test_a_run_without_validation_images_is_refused(tmp_path):
    run = read_run(write_run(tmp_path / "other", "psap", dataset="cifar10", suite="study", cell="psap"))
    cells = (Cell("psap", setting_of(run.config), None),)
    with pytest.raises(DataError, match="psap, seed 0 of study was trained without validation images"):
        findings(Suite("study", "A study", (0,), cells, "psap"), [run])
