import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from analysis import figures
from analysis.figures import FIGURES, accuracy, curves, layers, overview, pulses
from analysis.figures.overview import what_happened
from analysis.figures.style import (
    NO_PROTECTION,
    SPARE_STYLES,
    STYLES,
    NothingToDrawError,
    seed_groups,
)
from analysis.published import read_published
from analysis.results import NotFinishedError, read_run
from analysis.suites import find_suite, runs_of_suite
from analysis.tables import make_table
from experiments.runs.files import DataError
from experiments.suites.method_styles import METHODS
from tests.analysis.runs import LAYERS, PULSE_SUSPENDED, write_run

TOP1 = {"dense": 97.0, "sfp": 92.5, "thin": 94.0, "psap": 95.5}


@pytest.fixture
def runs(tmp_path):
    return [
        read_run(write_run(tmp_path / method, method, top1=top1)) for method, top1 in TOP1.items()
    ]


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
    with pytest.raises(NotFinishedError, match="run is not the folder of a finished run"):
        read_run(folder)


@pytest.mark.parametrize(
    ("panel", "quantity"), [("1", "weight_sparsity_ratio"), ("2", "prune_ratio")]
)
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


def test_line_style_or_marker_alone_tell_all_methods_apart():
    methods = {path.stem for path in METHODS.glob("*.yaml")} - {"psap_variant", "psap_finetune"}
    assert set(STYLES) == {*methods, NO_PROTECTION}
    for mark in ("linestyle", "marker"):
        assert len({str(style[mark]) for style in STYLES.values()}) == len(STYLES)
    assert len({style["marker"] for style in [*STYLES.values(), *SPARE_STYLES]}) == len(
        STYLES
    ) + len(SPARE_STYLES)


@pytest.fixture
def make(tmp_path):
    """Makes a read run: make(method, **what write_run takes)."""
    made = iter(range(1000))

    def make(method, **how):
        return read_run(write_run(tmp_path / f"run{next(made)}", method, **how))

    return make


def suite(make, **how):
    """Two seeds of dense, thin, sfp and psap with and without protection, 54 % of the MACs cut."""
    return [
        make(
            method,
            cell=cell,
            seed=seed,
            top1=90 + place + seed,
            protection=cell != NO_PROTECTION,
            **{"suite": "table", "macs_cut": 0.54, **how},
        )
        for place, (cell, method) in enumerate(
            [
                ("dense", "dense"),
                ("thin", "thin"),
                ("sfp", "sfp"),
                (NO_PROTECTION, "psap"),
                ("psap", "psap"),
            ]
        )
        for seed in (0, 1)
    ]


def by_colour(axes):
    return {line.get_color(): line for line in axes.lines}


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_cells_go_by_method_and_protection_and_hold_their_seeds(make):
    found = seed_groups(suite(make))
    assert [cell.label for cell in found] == ["dense", "thin", "sfp", NO_PROTECTION, "psap"]
    assert [cell.target for cell in found] == [None, 0.54, 0.54, 0.54, 0.54]
    assert all([run.seed for run in cell.runs] == [0, 1] for cell in found)


@pytest.mark.parametrize("ending", ["", " 60"])
def test_cells_of_one_method_and_target_go_by_their_names_in_styles_of_their_own(make, ending):
    names = {"psap": 90, "kappa 1": 91, "margin 1": 92}
    found = seed_groups(
        [make("psap", cell=name + ending, top1=top1) for name, top1 in names.items()]
    )
    assert [cell.label for cell in found] == ["psap", "kappa 1", "margin 1"]
    assert found[0].style == STYLES["psap"]
    assert len({cell.style["marker"] for cell in found}) == 3


def test_a_cell_has_one_name_at_all_targets_where_its_method_has_several_at_one(make):
    cuts = {"coupled 54": 0.54, "all 54": 0.54, "coupled 95": 0.95}
    runs = [make("psap", cell=name, macs_cut=cut) for name, cut in cuts.items()]
    found = {(cell.label, cell.target): cell.style for cell in seed_groups(runs)}
    assert [*found] == [("coupled", 0.54), ("all", 0.54), ("coupled", 0.95)]
    assert found["coupled", 0.54] == found["coupled", 0.95]


def test_one_method_at_several_targets_keeps_its_name_and_a_network_of_a_plan_has_its_suites_target(
    make,
):
    runs = [make("psap", cell=f"psap {cut}", macs_cut=cut) for cut in (0.42, 0.54)]
    alone = make("thin_plan", cell="thin_plan", macs_cut=0.5301)
    found = seed_groups([*runs, alone, make("psap", cell="other", model="resnet56", macs_cut=0.53)])
    assert [(cell.label, cell.target) for cell in found if "ResNet-20" in cell.network] == [
        ("thin_plan", 0.53),
        ("psap", 0.42),
        ("psap", 0.54),
    ]
    (of_suite,) = seed_groups(
        [make("thin_plan", suite="cifar16_comparison", cell="thin_plan 85", macs_cut=0.80)]
    )
    assert of_suite.target == 0.85


def test_networks_go_by_the_names_of_the_literature_and_runs_of_other_length_apart(make):
    runs = [
        make("psap", cell=f"{epochs}", epochs=epochs, dataset="cifar10", image_size=32)
        for epochs in (8, 9)
    ]
    assert [cell.network for cell in seed_groups(runs)] == [
        "ResNet-20 on CIFAR-10\nfrom scratch, 8 epochs",
        "ResNet-20 on CIFAR-10\nfrom scratch, 9 epochs",
    ]
    (small,) = seed_groups([make("psap", cell="small", width=0.5)])
    assert small.network == (
        "ResNet-20 of width 0.5 on handwritten digits\nfrom scratch, 8 epochs\nsmall set-up: 8 px, 1,000 images"
    )


def test_every_network_and_target_has_a_panel_with_the_dense_network_in_it(make):
    runs = [make("dense", cell="dense")]
    runs += [make("psap", cell=f"psap {cut}", macs_cut=cut) for cut in (0.42, 0.54)]
    figure = curves.training_curves(runs)
    assert [axes.get_title(loc="left").splitlines()[3] for axes in figure.axes] == [
        "42 % of the MACs cut",
        "54 % of the MACs cut",
    ]
    assert all(len(axes.lines) == 2 for axes in figure.axes)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("training_curves", "eval/top1"),
        ("training_loss", "train/loss"),
        ("mask_churn", "psap/mask_churn"),
    ],
)
def test_curves_are_means_over_seeds_in_a_band_from_the_lowest_to_the_highest(make, name, key):
    runs = suite(make)
    figure = FIGURES[name](runs)
    lines = by_colour(figure.axes[0])
    drawn = [cell for cell in seed_groups(runs) if key in cell.runs[0].metrics]
    assert len(lines) == len(drawn) == len(figure.axes[0].collections)
    for cell, band in zip(drawn, figure.axes[0].collections, strict=True):
        values = pd.concat([run.metrics[key] for run in cell.runs], axis=1, keys=(0, 1)).dropna()
        line = lines[cell.style["color"]]
        np.testing.assert_allclose(
            line.get_xydata(), [*zip(values.index, values.mean(axis=1), strict=True)]
        )
        corners = {(x, round(y, 9)) for x, y in band.get_paths()[0].vertices}
        assert {(x, round(y, 9)) for x, y in values.stack().droplevel(1).items()} <= corners
    assert legend_of(figure) == [f"{cell.label} (n = 2)" for cell in drawn]


def test_the_legend_says_when_cells_have_different_numbers_of_seeds(make):
    runs = [make("psap", cell="psap 42", macs_cut=0.42)]
    runs += [make("psap", cell="psap 54", macs_cut=0.54, seed=seed) for seed in (0, 1, 2)]
    assert legend_of(curves.training_curves(runs)) == ["psap (n = 1 to 3)"]


PUBLISHED = pd.DataFrame(
    [
        ("CIFAR-10", "ResNet-20", "sfp", "no", 90.83, 42.2, None),
        ("CIFAR-10", "ResNet-20", None, "yes", 91.5, 50.0, None),
        ("CIFAR-10", "ResNet-20", "asfp", None, 91.0, 51.0, None),
        ("CIFAR-10", "ResNet-20", None, "no", 92.0, 52.0, "unusable"),
        ("CIFAR-10", "ResNet-56", None, "no", 93.0, 50.0, None),
        ("ImageNet", "ResNet-20", None, "no", 70.0, 50.0, None),
    ],
    columns=[
        "dataset",
        "model",
        "peer",
        "pretrained",
        "pruned_top1",
        "flops_reduction_pct",
        "excluded",
    ],
)
FULL = {"dataset": "cifar10", "image_size": 32}


def test_accuracy_against_macs_draws_means_spreads_and_the_usable_published_rows(make):
    runs = suite(make, **FULL)
    (axes,) = accuracy.accuracy_against_macs(runs, PUBLISHED).axes
    ours = {line.get_color(): line for line in axes.lines if line.get_fillstyle() == "full"}
    for cell in seed_groups(runs):
        mean = np.mean([run.summary.top1 for run in cell.runs])
        expected = (54, mean) if cell.target else mean
        drawn = ours[cell.style["color"]]
        np.testing.assert_allclose(
            drawn.get_xydata()[0] if cell.target else drawn.get_ydata()[0], expected
        )
    bars = [tuple(path.vertices[:, 1]) for lines in axes.collections for path in lines.get_paths()]
    assert sorted(bars) == [(90 + place, 91 + place) for place in (1, 2, 3, 4)]
    published = {line.get_label(): line for line in axes.lines if line.get_fillstyle() == "none"}
    assert {label: [*map(tuple, line.get_xydata())] for label, line in published.items()} == {
        "published sfp": [(42.2, 90.83)],
        "published others, pretrained start": [(50.0, 91.5)],
        "published others, start not said": [(51.0, 91.0)],
    }
    assert "3 published points, 0 of them below" in axes.get_title(loc="left")


def marks(axes):
    """Where our marks of pruned networks stand, by their colours, in data coordinates."""
    axes.figure.draw_without_rendering()
    single = [line for line in axes.lines if len(line.get_xdata()) == 1 and line.get_marker()]
    of_ours = [line for line in single if line.get_fillstyle() == "full"]
    places = {
        line.get_color(): line.get_transform().transform(line.get_xydata()) for line in of_ours
    }
    return {color: axes.transData.inverted().transform(place)[0] for color, place in places.items()}


def test_marks_stand_at_their_cuts_and_side_by_side_only_at_one_cut(make):
    cuts = {"thin": 0.575, "sfp": 0.566, "fpgm": 0.5669, "psap": 0.54}
    runs = [make(method, cell=method, macs_cut=cut, target=0.54) for method, cut in cuts.items()]
    (axes,) = accuracy.accuracy_against_macs(runs).axes
    found = {method: marks(axes)[STYLES[method]["color"]][0] for method in cuts}
    assert (found["thin"], found["psap"]) == (pytest.approx(57.5), pytest.approx(54.0))
    assert found["sfp"] < 56.6 - 1e-6
    assert found["fpgm"] > 56.69 + 1e-6


def test_cuts_that_are_almost_equal_do_not_fill_the_axis(make):
    cuts = {"dense": 0.0, "thin": 0.5401, "psap": 0.5399}
    runs = [make(method, cell=method, macs_cut=cut, target=0.54) for method, cut in cuts.items()]
    figure = accuracy.accuracy_against_macs(runs)
    low, high = figure.axes[0].get_xlim()
    assert high - low >= 4
    assert (low + high) / 2 == pytest.approx(54.0)
    assert "of dense the grey band" in figure.legends[0].get_title().get_text()


def test_every_methods_colour_is_seen_on_white_and_the_two_thin_networks_differ():
    for method, style in STYLES.items():
        red, green, blue = (part**2.2 for part in to_rgb(style["color"]))
        luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        assert (1 + 0.05) / (luminance + 0.05) > 2, method
    assert STYLES["thin"]["color"] != STYLES["thin_plan"]["color"]


def test_a_cell_far_below_the_others_is_named_and_squeezes_nothing(make):
    top1 = {"dense": 90.0, "psap": 88.0, "thin": 70.1, "sfp": 17.9}
    runs = [make(method, cell=method, macs_cut=0.54, top1=value) for method, value in top1.items()]
    for name in ("accuracy_against_macs", "training_curves"):
        (axes,) = FIGURES[name](runs).axes
        low = (
            17.9 - 10 / 8 if name == "training_curves" else 17.9
        )  # the last epoch's, or the exported network's
        assert f"\nbelow the axis: sfp {low:.1f}" in axes.get_title(loc="left")
        assert 50 < axes.get_ylim()[0] < 70
        assert 90 <= axes.get_ylim()[1] + 10 / 8 < 95
    assert STYLES["sfp"]["color"] not in marks(accuracy.accuracy_against_macs(runs).axes[0])
    (axes,) = accuracy.accuracy_against_latency(
        runs, latencies(**{name: {"0": 1.0} for name in top1})
    ).axes
    assert "below the axis: sfp 17.9" in axes.get_title(loc="left")
    again = make("sfp", cell="sfp 42", macs_cut=0.42, top1=87.0)
    (axes,) = accuracy.accuracy_against_macs([*runs, again]).axes
    assert "below the axis: sfp 17.9 at 54 %" in axes.get_title(loc="left")
    (axes,) = accuracy.accuracy_against_macs(runs[:-1]).axes
    assert "below" not in axes.get_title(loc="left")


def test_training_curves_say_where_their_axis_starts_and_curves_end_with_the_axis(make):
    runs = suite(make)
    for name in ("training_curves", "training_loss", "mask_churn"):
        (axes,) = FIGURES[name](runs).axes
        assert axes.get_xlim() == (0, 8)
    (axes,) = curves.training_curves(runs).axes
    low = axes.get_ylim()[0]
    assert (
        f"\naxis from {low:.0f} %: at most a tenth of each curve shown is below"
        in axes.get_title(loc="left")
    )
    means = [line.get_ydata() for line in axes.lines]
    assert all(np.mean(np.asarray(curve) < low - 1e-9) <= 1 / 8 for curve in means)


@pytest.mark.parametrize(
    ("low", "high", "labels"), [(0.8, 2.2, ["1", "1.5", "2"]), (0.001, 2.2, ["0.001", "0.01"])]
)
def test_losses_have_plain_numbers_on_their_axis(make, low, high, labels):
    runs = suite(make)
    for run in runs:
        run.metrics["train/loss"] = np.linspace(high, low, 8)
    figure = curves.training_loss(runs)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.get_yticklabels()]
    assert set(labels) <= set(texts)
    assert all(float(text) for text in texts)
    assert not [text for text in axes.get_yticklabels(minor=True) if text.get_text()]
    assert axes.yaxis.get_offset_text().get_text() == ""


def test_all_our_marks_lie_within_the_panel(make):
    runs = [*suite(make), *suite(make, macs_cut=0.42)]
    figure = accuracy.accuracy_against_macs(runs)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    tops = [run.summary.top1 for run in runs]
    assert axes.get_ylim()[0] < min(tops)
    assert axes.get_ylim()[1] > max(tops)
    for line in axes.lines:
        x, y = line.get_transform().transform(line.get_xydata()).T
        assert x.min() >= axes.bbox.x0 - 1e-6 and x.max() <= axes.bbox.x1 + 1e-6  # noqa: PT018
        assert y.min() >= axes.bbox.y0 and y.max() <= axes.bbox.y1  # noqa: PT018


def test_published_points_far_below_are_counted_and_not_drawn(make):
    far = PUBLISHED.iloc[[0] * 20].assign(pruned_top1=[10.0, *[91.0] * 19])
    (axes,) = accuracy.accuracy_against_macs(suite(make, **FULL), far).axes
    assert "20 published points, 1 of them below" in axes.get_title(loc="left")
    assert axes.get_ylim()[0] > 80


@pytest.mark.parametrize(
    "small", [{"image_size": 16}, {"train_images": 1000}, {"dataset": "digits"}]
)
def test_small_set_ups_say_so_and_have_no_published_points_beside_them(make, small):
    (axes,) = accuracy.accuracy_against_macs(suite(make, **(FULL | small)), PUBLISHED).axes
    assert "small set-up" in axes.get_title(loc="left")
    assert not [line for line in axes.lines if "published" in str(line.get_label())]


def test_kept_filters_are_those_of_the_final_plan(make):
    runs = suite(make)
    figure = layers.kept_filters(runs)
    (axes,) = figure.axes
    assert legend_of(figure) == ["sfp (n = 2)", f"{NO_PROTECTION} (n = 2)", "psap (n = 2)"]
    expected = [
        100 - 100 * len(layer["pruned"]) / layer["filters"] for layer in runs[-1].plan["layers"]
    ]
    np.testing.assert_allclose(by_colour(axes)[STYLES["psap"]["color"]].get_ydata(), expected)
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        f"{name} ({n})" for name, n in LAYERS.items()
    ]


def test_kept_filters_stand_above_their_layers_where_scopes_name_others(make):
    coupled, every = (make("psap", suite="table", cell=name) for name in ("coupled", "all"))
    del coupled.plan["layers"][2]  # it goes with the stem
    (axes,) = layers.kept_filters([coupled, every]).axes
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == [f"{name} ({n})" for name, n in LAYERS.items()]
    drawn = {len(line.get_xdata()): list(line.get_xdata()) for line in axes.lines}
    assert drawn == {3: [0, 1, 3], 4: [0, 1, 2, 3]}


@pytest.mark.parametrize("quantity", ["prune_ratio", "weight_sparsity_ratio"])
def test_every_psap_cell_has_a_map_of_its_layers_on_one_scale(make, quantity):
    runs = suite(make)
    for run in runs[-4:-2]:  # both seeds without protection
        run.metrics.loc[:, run.metrics.columns.str.startswith("layer/")] /= 2
    figure = FIGURES[
        "layer_prune_ratios" if quantity == "prune_ratio" else "weight_sparsity_ratios"
    ](runs)
    meshes = [mesh for axes in figure.axes[:2] for mesh in axes.collections]
    for mesh, run in zip(meshes, (runs[-3], runs[-1]), strict=True):
        np.testing.assert_allclose(mesh.get_array(), run.layers(quantity).to_numpy().T)
    assert meshes[0].get_clim() == meshes[1].get_clim()


def test_of_a_study_the_pulses_of_its_reference_are_shown(make):
    cells = {"coupled 54": 0.54, "coupled 85": 0.85, "all 85": 0.85}
    runs = [
        make("psap", suite="cifar16_scopes", cell=name, macs_cut=cut) for name, cut in cells.items()
    ]
    title = pulses.pulses(runs).axes[0].get_title(loc="left")
    assert "coupled, 85 % of the MACs cut" in title
    assert len([axes for axes in pulses.pulses(runs).axes if "seed" in axes.get_title("left")]) == 1


def test_pulses_show_every_utility_and_who_was_restored(make):
    figure = pulses.pulses(suite(make))
    left, right = figure.axes[:2]
    lines = {line.get_label(): line.get_ydata() for line in left.lines}
    utility = PULSE_SUSPENDED["utility"]
    of_all_layers = [[epoch * u for epoch in range(1, 5) for _ in LAYERS] for u in utility]
    np.testing.assert_allclose(sorted(lines["restored"]), sorted(of_all_layers[0]))
    np.testing.assert_allclose(
        sorted(lines["stays suspended"]), sorted(of_all_layers[1] + of_all_layers[2])
    )
    np.testing.assert_allclose(
        lines["median, restored"], [epoch * utility[0] for epoch in range(1, 5)]
    )
    assert right.get_title(loc="left") == "who was restored (white: nothing was suspended)"
    (mesh,) = right.collections
    np.testing.assert_allclose(mesh.get_array(), np.full((len(LAYERS), 4), 1 / 3))


def latencies(**cells: dict[str, float]) -> dict:
    return {"device": "a CPU", "threads": 1, "latency_ms": cells}


def test_a_cells_style_is_the_same_at_every_cut(make):
    runs = [
        make("psap", suite="table", cell=f"{name} {cut}", macs_cut=cut / 100, target=cut / 100)
        for name in ("coupled", "all")
        for cut in (54, 85)
    ]
    styles = {}
    for cell in seed_groups(runs):
        styles.setdefault(cell.label, []).append(cell.style)
    assert {*styles} == {"coupled", "all"}
    assert styles["coupled"][0] == styles["coupled"][1] != styles["all"][0] == styles["all"][1]


def test_latency_figure_draws_the_means_of_measured_cells(make):
    runs = [
        make("dense", suite="table", cell="dense", seed=seed, top1=90.0 + seed) for seed in (0, 1)
    ]
    runs += [
        make("psap", suite="table", cell="ours"),
        make("thin", suite="table", cell="not measured"),
    ]
    measured = latencies(dense={"0": 4.0, "1": 5.0}, ours={"0": 2.5})
    axes = accuracy.accuracy_against_latency(runs, measured).axes[0]
    assert [tuple(line.get_xydata()[0]) for line in axes.lines] == [(4.5, 90.5), (2.5, 90.0)]
    assert "a CPU, 1 threads" in axes.get_xlabel()


def test_training_times_are_drawn_where_all_of_a_cells_runs_have_one(make):
    runs = [
        make("psap", suite="table", cell="ours", seed=seed, top1=90.0 + seed, time_share=share)
        for seed, share in ((0, 0.7), (1, 0.8))
    ]
    runs += [
        make("thin", suite="table", cell="timed in part", seed=seed, time_share=share)
        for seed, share in ((0, 0.4), (1, None))
    ]
    (axes,) = accuracy.accuracy_against_training_time(runs).axes
    ((x, top1),) = [tuple(line.get_xydata()[0]) for line in axes.lines]
    assert (x, top1) == (pytest.approx(75), 90.5)
    with pytest.raises(NothingToDrawError, match="timed the dense network"):
        accuracy.accuracy_against_training_time(runs[2:])


@pytest.mark.long
def test_write_figures_writes_the_same_bytes_again(make, tmp_path):
    runs = suite(make, time_share=0.8)[-1:]
    (tmp_path / "results" / "table").mkdir(parents=True)
    (tmp_path / "results" / "table" / "latency.json").write_text(
        json.dumps(latencies(psap={"0": 1.0}))
    )
    first, second = (
        figures.write_figures(runs, tmp_path / name, tmp_path / "results", pdf=True)
        for name in ("a", "b")
    )
    names = {*FIGURES, "accuracy_against_latency"} - {"study_differences"}  # the suite is no study
    expected = {f"table/{name}.{kind}" for name in names for kind in ("png", "pdf")}
    assert {str(path.relative_to(tmp_path / "a")) for path in first} == expected
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.long
def test_figures_are_of_the_runs_that_stand_in_the_suites_table(make, tmp_path, capsys):
    of_suite = {
        "suite": "digits_demo",
        "recipe": "digits_small",
        "macs_cut": 0.6,
        "width": 0.5,
    }
    runs = [make("psap", cell="psap", seed=seed, **of_suite) for seed in (0, 1, 99)]
    runs += [
        make("psap", cell="psap", seed=2, **of_suite | {"epochs": 5}),
        make("psap", cell="gone", **of_suite),
    ]
    kept, left_out = runs_of_suite("digits_demo", runs)
    assert [run.seed for run in kept] == [0, 1]
    table = make_table(find_suite("digits_demo"), runs, read_published())
    assert [f"Left out: {why}." for why in left_out] == [
        note for note in table.notes if note.startswith("Left out")
    ]
    figures.write_figures(runs, tmp_path / "all", tmp_path)
    said = capsys.readouterr().out
    assert all(f"digits_demo: left out: {why}\n" in said for why in left_out)
    figures.write_figures(kept, tmp_path / "kept", tmp_path)
    for path in (tmp_path / "kept").rglob("*.png"):
        assert path.read_bytes() == (tmp_path / "all" / "digits_demo" / path.name).read_bytes()
    mixed = [
        make("thin_plan", cell="thin_plan", seed=seed, method_changes={"run": plan}, **of_suite)
        for seed, plan in ((0, "01234567"), (1, "89abcdef"))
    ]
    with pytest.raises(
        DataError, match="cell thin_plan of suite digits_demo has runs of different configurations"
    ):
        figures.write_figures([*kept, *mixed], tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


def test_figures_without_data_are_left_out_with_a_reason(make, tmp_path, capsys):
    runs = [make("dense", suite="table", cell="dense"), make("thin", recipe="alone")]
    written = figures.write_figures(runs, tmp_path / "out", tmp_path)
    assert {path.stem for path in written} == {
        "accuracy_against_macs",
        "training_curves",
        "training_loss",
    }
    assert {path.parent.name for path in written} == {"table", "alone"}
    said = capsys.readouterr().out
    for name in (
        "mask_churn",
        "layer_prune_ratios",
        "weight_sparsity_ratios",
        "pulses",
        "kept_filters",
    ):
        assert f"table: {name} is left out: no run" in said
    assert "table: study_differences is left out: the suite is no study" in said
    assert "table: accuracy_against_latency is left out: there is no table/latency.json" in said
    assert figures.drawn("pulses", []) == "pulses is left out: not run"
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "latency.json").write_text(json.dumps(latencies(other={"0": 1.0})))
    figures.write_figures(runs, tmp_path / "out", tmp_path)
    assert (
        "table: accuracy_against_latency is left out: no run was measured"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[1]",
        '{"latency_ms": {}}',
        json.dumps(latencies(dense={"0": 0})),
        '{"latency_ms": {"dense": 1}}',
    ],
)
def test_damaged_latencies_are_refused_before_anything_is_written(make, tmp_path, content):
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "latency.json").write_text(content)
    with pytest.raises(
        DataError, match=r"latency\.json is not what `experiments.suite latency` prints"
    ):
        figures.write_figures(
            [make("dense", suite="table", cell="dense")], tmp_path / "out", tmp_path
        )
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_picture_or_says_in_one_line_what_is_wrong(tmp_path, capsys):
    folders = [str(write_run(tmp_path / method, method)) for method in ("dense", "psap")]
    out = tmp_path / "out.png"
    overview.main([str(out), *folders])
    assert out.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{out}\n"
    for wrong, sentence in (
        (folders[0], "the picture needs exactly one run of psap, not 0"),
        (str(tmp_path), f"{tmp_path} is not the folder of a finished run: it has no file `done`"),
    ):
        with pytest.raises(SystemExit) as refused:
            overview.main([str(out), wrong])
        assert refused.value.code == 2
        assert capsys.readouterr().err == f"error: {sentence}\n"
    for arguments, words in (
        (["no/such/folder.png", *folders], "error: "),
        ([str(out)], "usage: "),
    ):
        with pytest.raises(SystemExit) as refused:
            overview.main(arguments)
        assert refused.value.code == 2
        assert capsys.readouterr().err.startswith(words)


def test_a_method_without_a_style_of_its_own_can_stand_beside_psap(tmp_path):
    runs = [read_run(write_run(tmp_path / "psap", "psap"))]
    runs.append(replace(runs[0], summary=replace(runs[0].summary, method="psap_variant")))
    (accuracy,) = (
        axes for axes in what_happened(runs).axes if axes.get_title(loc="left").startswith("5")
    )
    assert [text.get_text().partition(":")[0] for text in accuracy.get_legend().get_texts()] == [
        "psap_variant",
        "psap",
    ]
