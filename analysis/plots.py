"""Figures of finished runs.

python -m analysis.plots OUT.png RUN_FOLDER ...      what happened in these runs, one of them PSAP's

Every figure is a function of runs, named in FIGURES; `write_figures` writes all of them for every suite. Runs of one
cell are its seeds: lines, markers and bars are their means, bands and error bars go from the lowest to the highest.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby
from math import ceil
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import ScaledTranslation, Transform

from analysis.findings import Difference, Study, compare
from analysis.published import read_published, usable
from analysis.results import RESULTS, Run, named, read_run
from analysis.suites import find_suite, runs_of_suite, setting_of, target_of
from experiments.exits import plain_exits
from experiments.runs.files import DataError

STYLE = Path(__file__).parent / "style.mplstyle"
NO_PROTECTION = "psap without protection"
# Okabe and Ito's colours; line styles and markers tell the methods apart without them. The order is the legend's.
STYLES: dict[str, dict[str, Any]] = {
    "dense": {"color": "#000000", "linestyle": ":", "marker": "s"},
    "thin": {"color": "#E69F00", "linestyle": "-.", "marker": "D"},
    "thin_plan": {"color": "#E69F00", "linestyle": (0, (6, 2, 1, 2, 1, 2)), "marker": "d"},
    "sfp": {"color": "#56B4E9", "linestyle": "--", "marker": "^"},
    "fpgm": {"color": "#0072B2", "linestyle": (0, (8, 2)), "marker": "v"},
    "l1": {"color": "#009E73", "linestyle": (0, (2, 2)), "marker": "<"},
    "l2": {"color": "#009E73", "linestyle": (0, (4, 2, 2, 2)), "marker": ">"},
    "random": {"color": "#999999", "linestyle": (0, (1, 3)), "marker": "X"},
    NO_PROTECTION: {"color": "#CC79A7", "linestyle": (0, (10, 2, 1, 2)), "marker": "P"},
    "psap": {"color": "#D55E00", "linestyle": "-", "marker": "o"},
}
# For the cells of an ablation, which share a method: each a letter.
SPARE_STYLES: list[dict[str, Any]] = [
    {"color": color, "linestyle": linestyle, "marker": rf"$\mathbf{{{letter}}}$", "markersize": 7}
    for letter, color, linestyle in zip(
        "ABCDEFGHJKLMNPQRSTUVWXYZ",
        cycle(["#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]),
        cycle(["-", "--", "-.", ":"]),
        strict=False,
    )
]
# Published points of methods that we do not run.
PUBLISHED: dict[str, dict[str, Any]] = {
    "pretrained start": {"color": "#888888", "marker": "+", "markersize": 5},
    "from scratch": {"color": "#888888", "marker": "x", "markersize": 4},
    "start not said": {"color": "#888888", "marker": "o", "markersize": 3},
}
# A study's differences, by their verdicts (none without an interval), and what the seeds show singly.
JUDGED: dict[str, dict[str, Any]] = {
    "not shown": {"color": "#666666", "marker": "o", "linewidth": 3},
    "better": {"color": "#0072B2", "marker": "D", "linewidth": 3},
    "worse": {"color": "#D55E00", "marker": "D", "linewidth": 3},
    "": {"color": "#666666", "marker": "o", "linestyle": "", "fillstyle": "none"},
}
SEED: dict[str, Any] = {"color": "#000000", "marker": "|", "linestyle": "", "markersize": 7}
MAP_COLUMNS = 3
RESTORED = "who was restored (white: nothing was suspended)"
REACH = (
    20  # percentage points: a panel of accuracies is not fitted to cells further below the best one
)
ONE_CUT = 0.2  # percentage points: marks of cuts that are closer stand side by side


class NothingToDrawError(DataError):
    """What the runs lack, in a few words."""


# For good: ticks are made when a figure is drawn, so a context around the making of a figure would not reach them.
matplotlib.style.use(STYLE)


@dataclass(frozen=True)
class Cell:
    """Runs that differ by their seed only.

    Attributes:
        label, style: of the cell's line in every figure.
        network: what was trained on what, how long, and what is small about it.
        target: share of the MACs to remove; None for dense networks.
    """

    label: str
    style: Mapping[str, Any]
    network: str
    target: float | None
    runs: tuple[Run, ...]

    def over_epochs(self, key: str) -> pd.DataFrame:
        """A metric by epoch (rows) and seed (columns); epochs without a value are left out."""
        return pd.DataFrame(
            {run.seed: run.metrics[key] for run in self.runs if key in run.metrics}
        ).dropna(how="all")

    def values(self, name: str) -> list[float]:
        """A value of summary.json, by seed."""
        return [getattr(run.summary, name) for run in self.runs]

    def plans(self) -> list[list[dict[str, Any]]]:
        """The layers of the final plans: name, filters, pruned; nothing for methods that make no plan."""
        return [run.plan["layers"] for run in self.runs if run.plan is not None]

    def layers(self, quantity: str) -> pd.DataFrame:
        """A quantity of the layers by epoch (rows) and layer, mean over the seeds."""
        return pd.concat([run.layers(quantity) for run in self.runs]).groupby(level=0).mean()


def cells(runs: Sequence[Run]) -> list[Cell]:
    """The cells of runs, in the legend's order.

    A cell goes by its method; where its method has several cells with one target (an ablation), by its name without
    the target. Dense networks have no target; one of a plan that no suite's file names (thin_plan) has its own cut.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.cell or f"{run.method} {run.summary.config_hash}", []).append(run)
    places = {}
    for name, (run, *_) in groups.items():
        method = NO_PROTECTION if run.identity["method"].get("protection") is False else run.method
        target = target_of(run)
        if target is None and run.method != "dense":
            target = round(run.summary.macs_cut, 3)
        places[name] = (method, _network(run), None if run.method == "dense" else target)
    counts = Counter(places.values())
    spare = cycle(SPARE_STYLES)
    found = []
    for name, (method, network, target) in places.items():
        label = (
            method
            if counts[places[name]] == 1 or target is None
            else name.removesuffix(f" {100 * target:g}")
        )
        style = STYLES[label] if label in STYLES else next(spare)
        found.append(Cell(label, style, network, target, tuple(groups[name])))
    order = {label: place for place, label in enumerate(STYLES)}
    return sorted(found, key=lambda cell: (cell.network, order.get(cell.label, len(order))))


def _network(run: Run) -> str:
    setting, images = setting_of(run.identity), run.summary.train_images
    small = (
        "" if setting.full_size else f"\nsmall set-up: {setting.image_size} px, {images:,} images"
    )
    return f"{setting.network_title} on {setting.dataset_title}\n{setting.start}, {setting.epochs} epochs{small}"


def _panels(of: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells that are compared with each other, by the panel's title: one network, one target."""
    panels: dict[str, list[Cell]] = {}
    for cell in of:
        rivals = {
            other.target
            for other in of
            if other.network == cell.network and other.target is not None
        }
        for target in sorted(rivals) if cell.target is None else [cell.target]:
            panels.setdefault(f"{cell.network}\n{100 * target:g} % of the MACs cut", []).append(
                cell
            )
        if not rivals:
            panels.setdefault(cell.network, []).append(cell)
    return panels


def accuracy_against_macs(runs: Sequence[Run], published: pd.DataFrame | None = None) -> Figure:
    """Test accuracy of the exported networks against the share of the MACs that went, by network.

    `published` (of read_published) is drawn beside full-size runs of the same data set and network. A panel is
    fitted to our cells within REACH of the best and nine tenths of the published points; its title says what lies
    below.
    """
    found = cells(runs)
    networks = {name: [*group] for name, group in groupby(found, key=lambda cell: cell.network)}
    figure, panels = _grid(networks, width=5.8, height=4.6)
    for axes, group in zip(panels, networks.values(), strict=True):
        group = _within_reach(axes, group, [fmean(cell.values("top1")) for cell in group])
        low = min(run.summary.top1 for cell in group for run in cell.runs)
        if published is not None and (setting := setting_of(group[0].runs[0].identity)).full_size:
            rows = usable(published, setting).dropna(subset=["pruned_top1", "flops_reduction_pct"])
            low = min([low, *rows["pruned_top1"].quantile([0.1], interpolation="lower").dropna()])
            shown = rows[rows["pruned_top1"] >= low]
            _draw_published(axes, shown)
            _add_to_title(
                axes,
                f"{len(rows)} published points, {len(rows) - len(shown)} of them below the axis",
            )
        pruned = sorted((cell for cell in group if cell.target is not None), key=_cut)
        for label in dict.fromkeys(cell.label for cell in pruned):
            points = [cell for cell in pruned if cell.label == label]
            means = [fmean(cell.values("top1")) for cell in points]
            axes.plot([*map(_cut, points)], means, zorder=4, **{**points[0].style, "marker": ""})
        for neighbours in _at_one_cut(pruned):
            for number, cell in enumerate(neighbours):
                x, top1, place = (
                    _cut(cell),
                    cell.values("top1"),
                    _beside(axes, number, len(neighbours), points=3),
                )
                axes.update_datalim([(x, value) for value in top1])
                axes.plot([x], [fmean(top1)], transform=place, zorder=4, **cell.style)
                axes.vlines(
                    [x], min(top1), max(top1), color=cell.style["color"], transform=place, zorder=3
                )
        for cell in (cell for cell in group if cell.target is None):
            dense, color = cell.values("top1"), cell.style["color"]
            axes.axhline(fmean(dense), color=color, linestyle=cell.style["linestyle"])
            axes.axhspan(min(dense), max(dense), color=color, alpha=0.1, linewidth=0)
        axes.margins(0.08)
        axes.set(xlabel="MACs cut [%]", ylabel="top-1 of the exported network [%]")
    note = "ours: mean of n seeds, bar from the lowest to the highest; marks at one cut stand side by side"
    _legend(figure, found, note)
    return figure


def _cut(cell: Cell) -> float:
    return 100 * fmean(cell.values("macs_cut"))


def _at_one_cut(of: Sequence[Cell]) -> list[list[Cell]]:
    """Cells in the order of their cuts, those together whose cuts are as good as the same."""
    found: list[list[Cell]] = []
    for cell in of:
        if found and _cut(cell) - _cut(found[-1][-1]) <= ONE_CUT:
            found[-1].append(cell)
        else:
            found.append([cell])
    return found


def _within_reach(axes: Axes, group: Sequence[Cell], top1: Sequence[float]) -> list[Cell]:
    """The cells that a panel is fitted to, by their accuracies; its title names the others."""
    low, of_label = max(top1) - REACH, Counter(cell.label for cell in group)
    far = [
        f"{cell.label} {value:.1f}"
        + (f" at {100 * (cell.target or 0):g} %" if of_label[cell.label] > 1 else "")
        for cell, value in zip(group, top1, strict=True)
        if value < low
    ]
    if far:
        _add_to_title(axes, f"below the axis: {', '.join(far)}")
    return [cell for cell, value in zip(group, top1, strict=True) if value >= low]


def _add_to_title(axes: Axes, line: str) -> None:
    axes.set_title(f"{axes.get_title(loc='left')}\n{fill(line, 64)}")


def _beside(axes: Axes, number: int, count: int, points: float) -> Transform:
    """Data coordinates, moved sideways so that `count` marks at one place stand side by side."""
    return axes.transData + ScaledTranslation(
        (number - (count - 1) / 2) * points / 72, 0, axes.figure.dpi_scale_trans
    )


def _draw_published(axes: Axes, rows: pd.DataFrame) -> None:
    """Hollow marks for methods that we run as well; small grey ones for others, by where they started from."""
    start = (
        rows["pretrained"]
        .map({"yes": "pretrained start", "no": "from scratch"})
        .fillna("start not said")
    )
    for name, members in rows.groupby(rows["peer"].where(rows["peer"].isin([*STYLES]), start)):
        style = (
            {key: STYLES[name][key] for key in ("color", "marker")}
            if name in STYLES
            else PUBLISHED[name]
        )
        axes.plot(
            members["flops_reduction_pct"],
            members["pruned_top1"],
            linestyle="",
            fillstyle="none",
            zorder=2,
            label=f"published {name}" if name in STYLES else f"published others, {name}",
            **style,
        )


def accuracy_against_latency(runs: Sequence[Run], latencies: Mapping[str, Any]) -> Figure:
    """Test accuracy of the exported networks against what `experiments.suite latency` measured of them."""
    found = [cell for cell in cells(runs) if cell.runs[0].cell in latencies["latency_ms"]]
    if not found:
        raise NothingToDrawError("no run was measured")
    networks = {name: [*group] for name, group in groupby(found, key=lambda cell: cell.network)}
    figure, panels = _grid(networks, width=5.8, height=4.6)
    for axes, group in zip(panels, networks.values(), strict=True):
        group = _within_reach(axes, group, [fmean(cell.values("top1")) for cell in group])
        for label in dict.fromkeys(cell.label for cell in group):
            points = sorted(
                (cell for cell in group if cell.label == label), key=lambda cell: cell.target or 0
            )
            x = [fmean(latencies["latency_ms"][str(cell.runs[0].cell)].values()) for cell in points]
            top1 = [cell.values("top1") for cell in points]
            axes.plot(x, [*map(fmean, top1)], zorder=4, **points[0].style)
            axes.vlines(x, [*map(min, top1)], [*map(max, top1)], color=points[0].style["color"])
        axes.margins(0.08)
        where = f"{latencies['device']}, {latencies['threads']} threads"
        axes.set(
            xlabel=f"latency of one image [ms], {where}", ylabel="top-1 of the exported network [%]"
        )
    _legend(figure, found, "mean of n seeds, bar from the lowest to the highest")
    return figure


def training_curves(runs: Sequence[Run]) -> Figure:
    """Accuracy while training.

    A panel is fitted to the cells that end within REACH of the best, and to nine tenths of their epochs; its title
    says what lies below.
    """
    images, found = (
        "validation" if runs[0].identity["data"]["validation_images"] > 0 else "test",
        cells(runs),
    )
    figure = _over_epochs(found, "eval/top1", f"top-1 on the {images} images [%]")
    for axes, group in zip(figure.axes, _panels(found).values(), strict=True):
        shown = _within_reach(
            axes, group, [cell.over_epochs("eval/top1").iloc[-1].mean() for cell in group]
        )
        curves = [cell.over_epochs("eval/top1").mean(axis=1) for cell in shown]
        # The first epochs would hide the differences that matter.
        low = min(curve.quantile(0.1) for curve in curves)
        if min(map(min, curves)) < low:
            _add_to_title(
                axes, f"axis from {low:.0f} %: at most a tenth of each curve shown is below"
            )
        high = max(cell.over_epochs("eval/top1").max(axis=None) for cell in shown)
        axes.set_ylim(low, high + max(0.05 * (high - low), 0.1))
    return figure


def training_loss(runs: Sequence[Run]) -> Figure:
    """The loss while training."""
    figure = _over_epochs(cells(runs), "train/loss", "training loss")
    for axes in figure.axes:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    return figure


def mask_churn(runs: Sequence[Run]) -> Figure:
    """Filters whose state each pruning step changed, for the methods that prune more than once."""
    pruned = [cell for cell in cells(runs) if len(cell.over_epochs("psap/mask_churn")) > 1]
    return _over_epochs(pruned, "psap/mask_churn", "mask churn [share of all filters]")


def _over_epochs(of: Sequence[Cell], key: str, label: str) -> Figure:
    if not of:
        raise NothingToDrawError(f"no run has {key} of several epochs")
    figure, panels = _grid(_panels(of))
    for axes, group in zip(panels, _panels(of).values(), strict=True):
        for number, cell in enumerate(group):
            values = cell.over_epochs(key)
            step = max(1, len(values) // 8)  # few markers, none above another's
            axes.plot(values.mean(axis=1), markevery=(2 * number % step, step), **cell.style)
            _draw_band(axes, values.index, values.T, cell)
        axes.set(xlabel="epochs completed", ylabel=label, xlim=(0, group[0].runs[0].summary.epochs))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, of)
    return figure


def _draw_band(axes: Axes, x: Any, values: pd.DataFrame, cell: Cell) -> None:
    """From the lowest to the highest of the seeds (rows)."""
    axes.fill_between(
        x, values.min(), values.max(), color=cell.style["color"], alpha=0.15, linewidth=0
    )


def kept_filters(runs: Sequence[Run]) -> Figure:
    """Share of its filters that every layer of the exported network keeps. Thin networks have no plan to draw."""
    planned = [cell for cell in cells(runs) if cell.plans()]
    if not planned:
        raise NothingToDrawError("no run has a plan")
    panels = _panels(planned)
    figure, axes = _grid(panels, columns=1, width=11, height=3.4)
    for panel, group in zip(axes, panels.values(), strict=True):
        for number, cell in enumerate(group):
            kept = pd.DataFrame(
                [
                    [100 - 100 * len(l["pruned"]) / l["filters"] for l in plan]
                    for plan in cell.plans()
                ]
            )
            place = _beside(panel, number, len(group), points=1.5)
            panel.plot(kept.mean(), transform=place, **cell.style)
            _draw_band(panel, kept.columns, kept, cell)
        layers = [f"{layer['name']} ({layer['filters']})" for layer in group[0].plans()[0]]
        panel.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
        panel.set(ylabel="filters kept [%]", ylim=(0, 104), xlim=(-0.5, len(layers) - 0.5))
    _legend(figure, planned)
    return figure


def layer_prune_ratios(runs: Sequence[Run]) -> Figure:
    """What PSAP decided at every step: the share of its filters that every layer loses, mean over the seeds."""
    return _maps(runs, "prune_ratio", "share of filters removed")


def weight_sparsity_ratios(runs: Sequence[Run]) -> Figure:
    """What PSAP measured at every step: the share of small weights in every layer, mean over the seeds."""
    return _maps(runs, "weight_sparsity_ratio", "share of small weights")


def _maps(runs: Sequence[Run], quantity: str, unit: str) -> Figure:
    found = _of_psap(runs)
    figure, panels = _grid([_title(cell) for cell in found], MAP_COLUMNS, width=5.4, height=4.6)
    values = [cell.layers(quantity) for cell in found]
    low, high = (
        min(frame.min(axis=None) for frame in values),
        max(frame.max(axis=None) for frame in values),
    )
    for number, (axes, of_cell) in enumerate(zip(panels, values, strict=True)):
        image = _draw_map(axes, of_cell, low, high)
        if number % MAP_COLUMNS and of_cell.columns.equals(values[number - 1].columns):
            axes.tick_params(labelleft=False)
    figure.colorbar(image, ax=panels, label=unit, shrink=1 / ceil(len(panels) / MAP_COLUMNS))
    return figure


def pulses(runs: Sequence[Run]) -> Figure:
    """Left, the utility (eq. 5) of every suspended filter at every pulse of one seed; right, who was restored.

    Of an ablation, only the cell psap, if there is one.
    """
    pulsed = [cell for cell in _of_psap(runs) if not cell.runs[0].pulses.empty]
    if not pulsed:
        raise NothingToDrawError("no run has pulses")
    found = [cell for cell in pulsed if cell.label == "psap"] or pulsed
    titles = [
        title for cell in found for title in (f"{_title(cell)}, seed {cell.runs[0].seed}", RESTORED)
    ]
    figure, panels = _grid(titles, columns=2, width=5.4, height=4.2)
    for left, right, cell in zip(panels[::2], panels[1::2], found, strict=True):
        pulse = cell.runs[0].pulses
        dots: dict[str, Any] = {
            "linestyle": "",
            "markersize": 3,
            "markeredgewidth": 0,
            "rasterized": True,
        }
        for restored, color, marker, shift, name in (
            (False, "#56B4E9", "o", -0.15, "stays suspended"),
            (True, "#D55E00", "^", 0.15, "restored"),
        ):
            rows = pulse[pulse["restored"] == restored]
            left.plot(
                rows["epoch"] + shift,
                rows["utility"],
                color=color,
                marker=marker,
                label=name,
                **dots,
            )
        for restored, linestyle, name in (
            (False, ":", "median, stays suspended"),
            (True, "-", "median, restored"),
        ):
            medians = pulse[pulse["restored"] == restored].groupby("epoch")["utility"].median()
            left.plot(medians, color="#000000", linestyle=linestyle, label=name)
        size = pulse["utility"].abs()
        # Half of the utilities lie in the linear part.
        linear = 10 ** ceil(np.log10(size.median() or 1.0))
        if size.max() > 10 * linear:
            left.set_yscale("symlog", linthresh=linear)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set(xlabel="epochs completed", ylabel="utility of a suspended filter (eq. 5)")
        order = [layer["name"] for layer in cell.plans()[0]]
        shares = pulse.pivot_table(
            index="epoch", columns="layer", values="restored", aggfunc="mean"
        )
        image = _draw_map(right, shares[[name for name in order if name in shares]], 0, 1)
        figure.colorbar(image, ax=right, label="restored, of the suspended")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _of_psap(runs: Sequence[Run]) -> list[Cell]:
    found = [cell for cell in cells(runs) if cell.runs[0].method == "psap"]
    if not found:
        raise NothingToDrawError("no run is PSAP's")
    return found


def study_differences(runs: Sequence[Run]) -> Figure:
    """A study at a glance: every cell's difference to what it is compared with, then every effect."""
    suite = find_suite(runs[0].suite or "")
    if suite is None or suite.reference is None:
        raise NothingToDrawError("the suite is no study")
    study = compare(suite, runs)
    if not any(study.differences.values()):
        raise NothingToDrawError("no cell has run beside the one that it is compared with")
    return draw_study(study)


def draw_study(study: Study) -> Figure:
    cells = [cell for cell in study.suite.cells if cell.name in study.differences]
    rows = [
        (_row_label(study, cell.name, str(cell.against)), study.differences[cell.name])
        for cell in cells
    ]
    rows += [(f"effect of {name}", effect) for name, effect in study.effects.items()]
    not_run = {number for number, cell in enumerate(cells) if not study.runs[cell.name]}
    figure = Figure(figsize=(9, 1.6 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (_, found) in enumerate(rows):
        if found:
            _draw_difference(axes, place, found)
        else:
            missing = "not run" if place in not_run else "no seed in common"
            axes.annotate(
                missing,
                (0, place),
                (4, 0),
                textcoords="offset points",
                va="center",
                color="#888888",
            )
    axes.axvline(0, color="#000000", linewidth=0.8)
    if study.effects:
        axes.axhline(len(cells) - 0.5, color="#BBBBBB", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [label + _seeds(study, found) for label, found in rows])
    axes.set(
        xlabel="difference in top-1 on the validation images [points]", ylim=(len(rows) - 0.5, -0.5)
    )
    axes.grid(visible=False, axis="y")
    apart = f", and {named(study.spread.apart)}," if study.spread.apart else ""
    title = f"{study.suite.title}\ndifference to {study.suite.reference}, paired by seed"
    figure.suptitle(
        "\n".join(fill(line, 110) for line in title.splitlines()), x=0.01, ha="left", fontsize=10
    )
    figure.legend(
        [Line2D([], [], **style) for style in [*JUDGED.values(), SEED]],
        [*(verdict or "no interval" for verdict in JUDGED), "a seed"],
        loc="outside lower center",
        ncols=5,
        title="mean; thick: 95 % interval of this one; thin: of all of its kind together (Bonferroni)\n"
        f"cells of {study.method} and its variants share one spread; others{apart} have their own",
    )
    return figure


def _draw_difference(axes: Axes, place: int, found: Difference) -> None:
    style = JUDGED[found.verdict]
    for half, width in ((found.together, 1), (found.half, 3)):
        if half is not None:
            axes.hlines(
                place, found.mean - half, found.mean + half, color=style["color"], linewidth=width
            )
    seeds = list(found.by_seed.values())
    axes.plot(seeds, [place] * len(seeds), zorder=4, **SEED)
    axes.plot([found.mean], [place], zorder=3, **style)


def _row_label(study: Study, cell: str, against: str) -> str:
    """A cell, and what it is compared with, if not with the reference."""
    return (
        cell
        if against == study.suite.reference
        else f"{cell.removeprefix(f'{against} and ')}, against {against}"
    )


def _seeds(study: Study, found: Difference | None) -> str:
    """The number of seeds, if not all have run."""
    return (
        f" (n = {len(found.by_seed)})"
        if found and len(found.by_seed) < len(study.suite.seeds)
        else ""
    )


def _title(cell: Cell) -> str:
    return f"{cell.network}\n{cell.label}, {100 * (cell.target or 0):g} % of the MACs cut"


def _grid(
    titles: Iterable[str], columns: int = 3, width: float = 5, height: float = 3.6
) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for every title; width and height of a panel in inches."""
    titles = list(titles)
    columns = min(columns, len(titles))
    rows = ceil(len(titles) / columns)
    figure = Figure(figsize=(max(columns * width, 7), rows * height + 0.6), layout="constrained")
    panels = [figure.add_subplot(rows, columns, number + 1) for number in range(len(titles))]
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title)
    return figure, panels


def _legend(
    figure: Figure,
    of: Sequence[Cell],
    title: str = "mean of n seeds, band from the lowest to the highest",
) -> None:
    """The one legend below the panels: our cells with their numbers of seeds, then what the panels name themselves."""
    entries: dict[str, Artist] = {}
    for label, style in {cell.label: cell.style for cell in of}.items():
        seeds = sorted(len(cell.runs) for cell in of if cell.label == label)
        n = f"{seeds[0]}" if seeds[0] == seeds[-1] else f"{seeds[0]} to {seeds[-1]}"
        entries[f"{label} (n = {n})"] = Line2D([], [], **style)
    for axes in figure.axes:
        entries |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    longest = max(map(len, entries))
    columns = max(1, int(figure.get_figwidth() * 14 / (longest + 10)))
    figure.set_figheight(figure.get_figheight() + 0.18 * ceil(len(entries) / columns))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, title=title
    )


FIGURES: dict[str, Callable[[Sequence[Run]], Figure]] = {
    make.__name__: make
    for make in (
        accuracy_against_macs,
        training_curves,
        training_loss,
        mask_churn,
        layer_prune_ratios,
        weight_sparsity_ratios,
        pulses,
        kept_filters,
        study_differences,
    )
}


def drawn(name: str, runs: Sequence[Run], latencies: Path | None = None) -> Figure | str:
    """The figure of that name, beside published.csv and latencies, or one sentence that says why there is none."""
    try:
        if not runs:
            raise NothingToDrawError("not run")
        if name == "accuracy_against_macs":
            return accuracy_against_macs(runs, read_published())
        if latencies is not None:
            if not latencies.is_file():
                raise NothingToDrawError(f"there is no {latencies.parent.name}/{latencies.name}")
            return accuracy_against_latency(runs, read_latencies(latencies))
        return FIGURES[name](runs)
    except NothingToDrawError as error:
        return f"{name} is left out: {error}"


def read_latencies(path: Path) -> dict[str, Any]:
    """What `experiments.suite latency` printed. Raises DataError if the file holds something else."""
    try:
        latencies: dict[str, Any] = json.loads(path.read_text())
        measured = [ms for cell in latencies["latency_ms"].values() for ms in cell.values()]
        if not all(ms > 0 for ms in measured) or not {"device", "threads"} <= latencies.keys():
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not what `experiments.suite latency` prints: measure again"
        ) from error
    return latencies


def write_figures(
    runs: Sequence[Run], out: Path, results: Path = RESULTS, *, pdf: bool = False
) -> list[Path]:
    """Write out/<suite>/<figure>.png, with `pdf` as .pdf too, the same bytes for the same runs; print what is left out.

    The runs are those of the suite's table. A run outside a suite counts to a suite of its recipe's name. Latencies
    are read from results/<suite>/latency.json. Raises DataError if they, or published.csv, are damaged, or a
    table would refuse the runs.
    """
    suites: dict[str, list[Run]] = {}
    for run in runs:
        suites.setdefault(run.suite or run.recipe, []).append(run)
    figures: dict[Path, Figure | str] = {}
    for suite, claimed in suites.items():
        members, left_out = runs_of_suite(suite, claimed)
        print(*(f"{suite}: left out: {why}\n" for why in left_out), sep="", end="")
        figures |= {out / suite / name: drawn(name, members) for name in FIGURES}
        name = "accuracy_against_latency"
        figures[out / suite / name] = drawn(name, members, results / suite / "latency.json")
    written = []
    for path, figure in figures.items():
        if isinstance(figure, str):
            print(f"{path.parent.name}: {figure}")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        written.append(path.with_suffix(".png"))
        figure.savefig(written[-1], metadata={"Software": None})
        if pdf:
            figure.set_layout_engine("none")  # the second file keeps the places of the first
            written.append(path.with_suffix(".pdf"))
            figure.savefig(written[-1], metadata={"CreationDate": None, "Producer": None})
    return written


def what_happened(runs: Sequence[Run]) -> Figure:
    """One page that explains a comparison: what PSAP measured, what it removed, how all runs learned.

    Raises DataError unless exactly one of the runs is PSAP's.
    """
    of_psap = [run for run in runs if run.method == "psap"]
    if len(of_psap) != 1:
        raise DataError(f"the picture needs exactly one run of psap, not {len(of_psap)}")
    psap, setting = of_psap[0], setting_of(of_psap[0].identity)
    figure = Figure(figsize=(11, 8.4), layout="constrained")
    axes = figure.subplot_mosaic(
        [["sparsity", "ratio"], ["cut", "accuracy"], ["filters", "accuracy"]],
        height_ratios=[2.2, 1, 1],
    )
    figure.suptitle(
        f"{setting.network_title} on {setting.dataset_title}: PSAP removes "
        f"{psap.summary.macs_cut:.0%} of the MACs while it trains (seed {psap.summary.seed})"
    )
    for panel, quantity, unit in (
        ("sparsity", "weight_sparsity_ratio", "share of small weights"),
        ("ratio", "prune_ratio", "share of filters removed"),
    ):
        figure.colorbar(_draw_map(axes[panel], psap.layers(quantity)), ax=axes[panel], label=unit)
    axes["sparsity"].set_title("1  Measured: weight sparsity ratio (eq. 1)")
    axes["sparsity"].set_ylabel("layer, from input to output")
    axes["ratio"].set_title("2  Decided: prune ratio of each layer (eq. 2)")
    _draw_cut(axes["cut"], psap)
    _draw_filters(axes["filters"], psap)
    _draw_accuracy(axes["accuracy"], runs)
    axes["cut"].sharex(axes["filters"])
    axes["filters"].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_map(
    axes: Axes, values: pd.DataFrame, low: float | None = None, high: float | None = None
) -> QuadMesh:
    """Layers down, pruning steps across; light is little (low), dark is much (high), in grey as well."""
    epochs = values.index.to_numpy()
    columns = np.append(epochs, epochs[-1] + 1) - 0.5
    rows = np.arange(values.shape[1] + 1) - 0.5
    image = axes.pcolormesh(
        columns, rows, values.to_numpy().T, cmap="cividis_r", vmin=low, vmax=high
    )
    step = ceil(values.shape[1] / 24)  # names that fit above each other
    axes.set_yticks(range(0, values.shape[1], step), list(values.columns[::step]), fontsize=7)
    axes.grid(False)
    axes.invert_yaxis()
    axes.set_xlabel("pruning step, in completed epochs")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return image


def _draw_cut(axes: Axes, psap: Run) -> None:
    steps = psap.metrics[["psap/macs_cut", "psap/macs_cut_target"]].dropna() * 100
    axes.plot(steps["psap/macs_cut_target"], color="#999999", linewidth=4, label="asked for")
    axes.plot(steps["psap/macs_cut"], color="#000000", marker=".", linewidth=1, label="reached")
    axes.set_ylabel("MACs cut [%]")
    axes.set_title("3  Pace: cut of the network, asked for and reached")
    axes.legend(loc="lower right", frameon=False)


def _draw_filters(axes: Axes, psap: Run) -> None:
    steps = psap.metrics[["psap/suspended", "psap/restored"]].dropna()
    axes.bar(steps.index, steps["psap/suspended"], color="#BBBBBB", label="suspended")
    axes.bar(
        steps.index,
        steps["psap/restored"],
        bottom=steps["psap/suspended"],
        color="#D55E00",
        hatch="////",
        edgecolor="white",
        label="proposed, but restored",
    )
    axes.set_ylabel("filters")
    axes.set_xlabel("epochs completed")
    axes.set_title("4  Filters: suspended, and restored by the pulse")
    axes.set_ylim(0, 1.35 * steps.sum(axis=1).max())
    axes.legend(loc="upper center", frameon=False, ncols=2)


def _draw_accuracy(axes: Axes, runs: Sequence[Run]) -> None:
    """Curves of eval/top1, and beside them the exported networks' final accuracy on the test images."""
    epochs = max(len(run.metrics) for run in runs)
    styles = {run.method: STYLES.get(run.method, SPARE_STYLES[0]) for run in runs}
    for run in runs:
        style = styles[run.method]
        axes.plot(
            run.metrics["eval/top1"],
            color=style["color"],
            linestyle=style["linestyle"],
            linewidth=1.3,
        )
    ranked = sorted(runs, key=lambda run: run.summary.top1)
    for place, run in enumerate(ranked):
        axes.plot(
            epochs * (1.05 + 0.06 * place),
            run.summary.top1,
            **styles[run.method] | {"markersize": 8},
            label=f"{run.method}: {run.summary.top1:.1f} % at {run.summary.macs_cut:.0%} cut",
        )
    axes.axvline(epochs * 1.02, color="#999999", linewidth=0.8)
    second_half = min(run.metrics["eval/top1"].iloc[len(run.metrics) // 2 :].min() for run in runs)
    low = min(second_half, ranked[0].summary.top1)
    axes.set_ylim(max(0, low - 0.4 * (100 - low)), 101.5)  # room for the legend below the curves
    curves = "validation" if runs[0].identity["data"]["validation_images"] > 0 else "test"
    axes.set_title("5  Accuracy: while training, and of the exported network")
    axes.set_xlabel(f"epochs completed (lines: {curves} images; markers: test images)")
    axes.set_ylabel("top-1 [%]")
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= epochs])
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], labels[::-1], loc="lower right", title="exported, last epoch", handlelength=3
    )


def save(figure: Figure, path: Path) -> None:
    """Write a picture, in the format of its suffix. Raises DataError where there is no such format."""
    try:
        figure.savefig(path)
    except ValueError as error:
        raise DataError(f"{path} cannot be drawn: {error}") from error


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_FOLDER")
    given = parser.parse_args(arguments)
    with plain_exits():
        save(what_happened([read_run(folder) for folder in given.runs]), given.out)


if __name__ == "__main__":
    main(sys.argv[1:])
