import subprocess
import sys

import numpy as np
import pytest

from analysis.collect import read_run
from analysis.plots import STYLES, what_happened
from tests.analysis.runs import LAYERS, write_run

TOP1 = {"dense": 97.0, "sfp": 92.5, "thin": 94.0, "psap": 95.5}


@pytest.fixture
def runs(tmp_path):
    return [read_run(write_run(tmp_path / method, method, top1=top1)) for method, top1 in TOP1.items()]


@pytest.fixture
def panels(runs):
    return {axes.get_title(loc="left")[:1]: axes for axes in what_happened(runs).axes}


def test_read_run_keeps_layers_in_network_order_and_only_the_epochs_with_a_value(runs):
    ratios = runs[-1].layers("prune_ratio")
    assert list(ratios.columns) == list(LAYERS)
    assert list(ratios.index) == [1, 2, 3, 4]
    assert ratios.loc[3, "layer1.0.conv2"] == pytest.approx(0.5)


def test_an_unfinished_run_is_refused_by_name(tmp_path):
    folder = write_run(tmp_path / "run", "dense")
    (folder / "done").unlink()
    with pytest.raises(FileNotFoundError, match="run is not the folder of a finished run"):
        read_run(folder)


@pytest.mark.parametrize(("panel", "quantity"), [("1", "weight_sparsity_ratio"), ("2", "prune_ratio")])
def test_maps_show_the_layer_values_of_every_step(panels, runs, panel, quantity):
    (mesh,) = panels[panel].collections
    np.testing.assert_allclose(mesh.get_array(), runs[-1].layers(quantity).to_numpy().T)
    assert [label.get_text() for label in panels[panel].get_yticklabels()] == list(LAYERS)


def test_cut_shows_what_was_asked_and_what_was_reached(panels):
    asked, reached = (line.get_xydata() for line in panels["3"].lines)
    np.testing.assert_allclose(asked, [(e, 100 * e / 8) for e in range(1, 5)])
    np.testing.assert_allclose(reached, [(e, 100 * e / 8 + 1) for e in range(1, 5)])


def test_bars_stack_restored_filters_on_suspended_ones(panels):
    suspended, restored = panels["4"].containers
    assert [bar.get_height() for bar in suspended] == [10, 20, 30, 40]
    assert [bar.get_height() for bar in restored] == [2, 4, 6, 8]
    assert [bar.get_y() for bar in restored] == [10, 20, 30, 40]


def test_accuracy_shows_every_curve_and_every_exported_network(panels, runs):
    by_colour = {}
    for line in panels["5"].lines:
        by_colour.setdefault(line.get_color(), []).append(line)
    for run in runs:
        curve, exported = by_colour[STYLES[run.method]["color"]]
        np.testing.assert_allclose(curve.get_ydata(), run.metrics["eval/top1"])
        assert list(exported.get_ydata()) == [TOP1[run.method]]
        assert exported.get_xdata()[0] > len(run.metrics)
        assert f"{run.method}: {TOP1[run.method]:.1f} %" in exported.get_label()
    low, high = panels["5"].get_ylim()
    assert low < min(TOP1.values())
    assert high > max(TOP1.values())


def test_lightness_alone_tells_the_methods_apart():
    marks = {(style["linestyle"], style["marker"]) for style in STYLES.values()}
    assert len(marks) == len(STYLES)


def test_the_command_writes_a_picture_or_says_in_one_line_what_is_wrong(tmp_path):
    folders = [write_run(tmp_path / method, method) for method in ("dense", "psap")]
    command = [sys.executable, "-m", "analysis.plots", str(tmp_path / "out.png")]
    subprocess.run([*command, *map(str, folders)], check=True)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    refused = subprocess.run([*command, str(folders[0])], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr == "error: the picture needs exactly one run of psap, not 0\n"
