import json

import pytest

from analysis import build
from analysis.collect import DataError
from analysis.figures.growth import PARTS, WHATS, draw_growth, main

FIGURES = {
    f"growth_{what}_{amount}_{part}_seconds": {"median": 2.0 * amount, "spread": [1, 3], "n": 1}
    for what in WHATS
    for part in PARTS
    for amount in (10, 2)
}
DEVICE = "x86_64 CPU, 2 cores"


def test_measured_times_stand_beside_what_would_be_in_proportion():
    figure = draw_growth(FIGURES, DEVICE)
    assert "ResNet-20" in figure.get_suptitle()
    assert DEVICE in figure.get_suptitle()
    panels = figure.axes
    assert len(panels) == len(WHATS) * len(PARTS)
    for axes in panels:
        proportion, measured = axes.lines
        assert measured.get_xydata().tolist() == [[2, 4], [10, 20]]
        assert proportion.get_ydata().tolist() == [4, 20]


def test_recorded_reports_become_figures(tmp_path):
    (tmp_path / "results" / "benchmark").mkdir(parents=True)
    for name, figures in (("a_machine", FIGURES), ("without", {})):
        (tmp_path / "results" / "benchmark" / f"{name}.json").write_text(
            json.dumps({"machine": {"device": DEVICE}, "figures": figures})
        )
    build.main(["figures", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.glob("out/*/*")] == ["a_machine_growth.png"]


def test_a_report_without_growth_is_refused(tmp_path, capsys):
    with pytest.raises(DataError, match="the report has no growth_depth"):
        draw_growth({}, DEVICE)
    for content in (
        "{",
        json.dumps({"figures": FIGURES}),
        '{"figures": [1]}',
        '{"figures": {"growth_depth_20_epoch_seconds": {"median": "1"}}}',
    ):
        (tmp_path / "report.json").write_text(content)
        with pytest.raises(SystemExit) as refused:
            main([str(tmp_path / "report.json"), str(tmp_path / "growth.png")])
        assert refused.value.code == 2
        assert "report.json is not a report" in capsys.readouterr().err
    (tmp_path / "report.json").write_text(
        json.dumps({"machine": {"device": DEVICE}, "figures": FIGURES})
    )
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path / "report.json"), str(tmp_path / "growth.no_format")])
    assert refused.value.code == 2
    (tmp_path / "report.json").write_text(
        json.dumps({"machine": {"device": DEVICE}, "figures": FIGURES})
    )
    main([str(tmp_path / "report.json"), str(tmp_path / "growth.png")])
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
