"""What foresees the loss reduction: correlations within layers, their picture, and reports that are none."""

import json

import pandas as pd
import pytest

from analysis import build
from analysis.collect import DataError
from analysis.utility import CRITERIA, correlations, main, picture, read_report


def filters(seed=0, epoch=5, layers=("a", "b")):
    """Two layers of four filters: utility in the order of the reduction, the norm against it, gamma neither."""
    return [
        {"seed": seed, "epoch": epoch, "layer": layer, "filter": f, "norm": 9.0 - f, "gamma": (2.0, 4.0, 1.0, 3.0)[f],
         "utility": 0.1 * f, "standard_error": 0.01, "reduction": 0.05 * f + 7 * number}
        for number, layer in enumerate(layers) for f in range(4)
    ]  # fmt: skip


REPORT = {"machine": {"commit": "0123456789"}, "recipe": ["experiment=x"], "share": 0.2, "batches": 10,
          "filters": filters() + filters(seed=1) + filters(epoch=10)}  # fmt: skip


def test_filters_are_ranked_within_their_layers_only():
    found = correlations(pd.DataFrame(REPORT["filters"]))
    assert found.index.tolist() == [(5, 0), (5, 1), (10, 0)]
    assert found["utility"].tolist() == pytest.approx(
        [1, 1, 1]
    )  # though layer b lies 7 higher
    assert found["norm"].tolist() == pytest.approx([-1, -1, -1])
    assert found["gamma"].tolist() == pytest.approx([0, 0, 0])


def test_a_layer_with_one_filter_says_nothing():
    alone = [row | {"reduction": -100.0} for row in filters(layers=("c",))[:1]]
    pd.testing.assert_frame_equal(correlations(pd.DataFrame(filters() + alone)), correlations(pd.DataFrame(filters())))


def test_the_picture_shows_every_filter_and_every_seed():
    left, right = picture(REPORT).axes
    assert [len(line.get_xdata()) for line in left.lines] == [16, 8, 2]
    assert [len(line.get_xdata()) for line in right.lines] == [3] * len(CRITERIA) + [2]
    assert left.lines[1].get_xydata()[5].tolist() == pytest.approx([0.1, 7.05])


def test_recorded_reports_become_pictures(tmp_path, capsys):
    path = tmp_path / "results" / "utility" / "small.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(REPORT))
    build.main(["figures", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "utility" / "small.png").stat().st_size > 10_000
    main([str(path), str(tmp_path / "one.png")])
    assert (tmp_path / "one.png").stat().st_size > 10_000
    assert "| (10, 0) |      1.00 |  -1.00 |" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps(REPORT | {"filters": []}), '{"filters": [{}]}'])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=r"x\.json is not a report of `experiments.utility_check`: measure again"):
        read_report(tmp_path / "x.json")
