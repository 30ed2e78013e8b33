"""What foresees the loss reduction: correlations within layers, their picture, and reports that are none."""

import json

import numpy as np
import pandas as pd
import pytest

from analysis import build
from analysis.collect import DataError
from analysis.figures.utility import CRITERIA, correlations, main, picture, read_pulse_check


def filters(seed=0, epoch=5, layers=(("a", 4), ("b", 3))):
    """Utility in the order of the reduction, the norm against it; the ranks of gamma are 2, 4, 1, 3 and 1, 3, 2."""
    return [
        {
            "seed": seed,
            "epoch": epoch,
            "layer": layer,
            "filter": f,
            "norm": 9.0 - f**3,
            "gamma": float((2, 4, 1, 3)[f]),
            "utility": 10.0**f,
            "standard_error": 0.01,
            "reduction": 0.05 * f + 7 * number,
        }
        for number, (layer, count) in enumerate(layers)
        for f in range(count)
    ]


MACHINE = {"commit": "0123456789", "dirty_diff_sha256": None}
REPORT = {
    "machine": MACHINE,
    "recipe": ["experiment=x"],
    "batches": 10,
    "filters": filters() + filters(seed=1) + filters(epoch=10),
}


def test_filters_are_ranked_within_their_layers_and_layers_weighted_with_their_degrees():
    found = correlations(pd.DataFrame(REPORT["filters"]))
    assert found.index.tolist() == [(5, 0), (5, 1), (10, 0)]
    assert found["utility"].tolist() == pytest.approx([1, 1, 1])  # though layer b lies 7 higher
    assert found["norm"].tolist() == pytest.approx([-1, -1, -1])
    # Spearman's 1 - 6 sum(d^2) / (n^3 - n): layer a 1 - 6 * 10 / 60 = 0, layer b (2, 3, 1) 1 - 6 * 6 / 24 = -0.5.
    assert found["gamma"].tolist() == pytest.approx([-0.5 * 2 / 5] * 3)
    assert found["degrees"].tolist() == [5, 5, 5]


def test_a_layer_with_one_filter_says_nothing_and_a_constant_criterion_is_undefined():
    alone = [row | {"reduction": -100.0} for row in filters(layers=(("c", 1),))]
    pd.testing.assert_frame_equal(
        correlations(pd.DataFrame(filters() + alone)), correlations(pd.DataFrame(filters()))
    )
    found = correlations(pd.DataFrame(filters()).assign(gamma=1.0))
    assert found["gamma"].isna().all()
    half = [row | {"gamma": 1.0 if row["layer"] == "a" else -row["filter"]} for row in filters()]
    assert correlations(pd.DataFrame(half))["gamma"].tolist() == pytest.approx([-2 / 5])


def test_without_relation_correlations_lie_where_the_picture_says():
    draw = np.random.default_rng(0)
    rows = [
        {"seed": seed, "epoch": 1, "layer": layer}
        for seed in range(400)
        for layer in (0, 0, 0, 1, 1, 1, 1, 1, 1)
    ]
    noise = pd.DataFrame(draw.normal(size=(len(rows), 4)), columns=[*CRITERIA, "reduction"])
    found = correlations(pd.concat([pd.DataFrame(rows), noise], axis=1))
    assert found["utility"].var() == pytest.approx(1 / 7, rel=0.2)


def test_the_picture_shows_every_filter_and_every_seed():
    left, right = picture(REPORT).axes
    assert [len(line.get_xdata()) for line in left.lines] == [14, 7, 2]
    assert [len(line.get_xdata()) for line in right.lines] == [2] * len(CRITERIA) + [1] * len(
        CRITERIA
    ) + [2]
    assert left.lines[1].get_xydata()[5].tolist() == pytest.approx([10, 7.05])


def test_recorded_reports_become_pictures(tmp_path, capsys):
    path = tmp_path / "results" / "utility" / "small.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(REPORT))
    build.main(["figures", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "utility" / "small.png").stat().st_size > 10_000
    main([str(path), str(tmp_path / "one.png")])
    assert (tmp_path / "one.png").stat().st_size > 10_000
    assert "| (10, 0) |      1.00 |  -1.00 |   -0.20 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        json.dumps(REPORT | {"filters": []}),
        json.dumps(REPORT | {"machine": {}}),
        json.dumps(REPORT | {"filters": [*REPORT["filters"], {"epoch": 5}]}),
        json.dumps(REPORT | {"filters": [REPORT["filters"][0] | {"reduction": "x"}]}),
    ],
)
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(
        DataError, match=r"x\.json is not a report of `experiments.pulse_check`: measure again"
    ):
        read_pulse_check(tmp_path / "x.json")
