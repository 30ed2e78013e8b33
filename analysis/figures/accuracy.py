"""Accuracy of the exported networks against what they cost."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.style import (
    STYLES,
    NothingToDrawError,
    SeedGroup,
    add_legend,
    add_to_title,
    beside,
    grid,
    seed_groups,
    within_reach,
)
from analysis.published import usable
from analysis.results import Run
from analysis.suites import setting_of

# Published points of methods that we do not run.
PUBLISHED: dict[str, dict[str, Any]] = {
    "pretrained start": {"color": "#888888", "marker": "+", "markersize": 5},
    "from scratch": {"color": "#888888", "marker": "x", "markersize": 4},
    "start not said": {"color": "#888888", "marker": "o", "markersize": 3},
}
# Percentage points of the MACs.
ONE_CUT = 0.5  # marks of cuts that are closer stand side by side
NARROWEST = 4  # the horizontal axis covers at least as much
# Points on paper from one mark at a cut to the next, where a panel has several cuts, and where it has one.
APART = 3
APART_AT_ONE_CUT = 6


def accuracy_against_macs(runs: Sequence[Run], published: pd.DataFrame | None = None) -> Figure:
    """Test accuracy of the exported networks against the share of the MACs that went, by network.

    `published` (of read_published) is drawn beside full-size runs of the same data set and network. A panel is
    fitted to our cells within REACH of the best and nine tenths of the published points; its title says what lies
    below.
    """
    cells = seed_groups(runs)
    networks = {name: [*group] for name, group in groupby(cells, key=lambda cell: cell.network)}
    figure, panels = grid(networks, width=5.8, height=4.6)
    for axes, group in zip(panels, networks.values(), strict=True):
        group = within_reach(axes, group, [fmean(cell.values("top1")) for cell in group])
        low = min(run.summary.top1 for cell in group for run in cell.runs)
        if published is not None and (setting := setting_of(group[0].runs[0].identity)).full_size:
            rows = usable(published, setting).dropna(subset=["pruned_top1", "flops_reduction_pct"])
            low = min([low, *rows["pruned_top1"].quantile([0.1], interpolation="lower").dropna()])
            shown = rows[rows["pruned_top1"] >= low]
            _draw_published(axes, shown)
            add_to_title(
                axes,
                f"{len(rows)} published points, {len(rows) - len(shown)} of them below the axis",
            )
        pruned = sorted((cell for cell in group if cell.target is not None), key=_cut)
        for label in dict.fromkeys(cell.label for cell in pruned):
            points = [cell for cell in pruned if cell.label == label]
            means = [fmean(cell.values("top1")) for cell in points]
            axes.plot([*map(_cut, points)], means, zorder=4, **{**points[0].style, "marker": ""})
        cuts = _at_one_cut(pruned)
        apart = APART_AT_ONE_CUT if len(cuts) == 1 else APART
        for neighbours in cuts:
            for number, cell in enumerate(neighbours):
                x = _cut(cell)
                top1 = cell.values("top1")
                place = beside(axes, number, len(neighbours), apart)
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
        _widen(axes)
        axes.set(xlabel="MACs cut [%]", ylabel="top-1 of the exported network [%]")
    spread = "bar"
    if any(cell.target is None for cell in cells):
        spread = "bar (of dense the grey band)"
    note = f"ours: mean of n seeds, {spread} from the lowest to the highest;"
    add_legend(figure, cells, f"{note}\nmarks at one cut stand side by side")
    return figure


def _cut(cell: SeedGroup) -> float:
    return 100 * fmean(cell.values("macs_cut"))


def _widen(axes: Axes) -> None:
    """Equal cuts look equal: the horizontal axis does not magnify what lies between them."""
    low, high = axes.get_xlim()
    if high - low < NARROWEST:
        middle = (low + high) / 2
        axes.set_xlim(middle - NARROWEST / 2, middle + NARROWEST / 2)


def _at_one_cut(of: Sequence[SeedGroup]) -> list[list[SeedGroup]]:
    """Cells in the order of their cuts, those together whose cuts are as good as the same."""
    groups: list[list[SeedGroup]] = []
    for cell in of:
        if groups and _cut(cell) - _cut(groups[-1][-1]) <= ONE_CUT:
            groups[-1].append(cell)
        else:
            groups.append([cell])
    return groups


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


def accuracy_against_training_time(runs: Sequence[Run]) -> Figure:
    """Test accuracy of the exported networks against how long their training took, beside the dense network's."""
    measured = []
    for cell in seed_groups(runs):
        shares = cell.values("train_seconds_dense_ratio")
        if None not in shares:
            measured.append((cell, [100 * share for share in shares]))
    if not measured:
        raise NothingToDrawError("no cell's runs timed the dense network beside themselves")
    return _against(measured, "training time [% of the dense network's there]")


def accuracy_against_latency(runs: Sequence[Run], latencies: Mapping[str, Any]) -> Figure:
    """Test accuracy of the exported networks against what `experiments.suite latency` measured of them."""
    latency_ms = latencies["latency_ms"]
    measured = [
        (cell, [*latency_ms[cell.runs[0].cell].values()])
        for cell in seed_groups(runs)
        if cell.runs[0].cell in latency_ms
    ]
    if not measured:
        raise NothingToDrawError("no run was measured")
    where = f"{latencies['device']}, {latencies['threads']} threads"
    return _against(measured, f"latency of one image [ms], {where}")


def _against(measured: Sequence[tuple[SeedGroup, Sequence[float]]], xlabel: str) -> Figure:
    """Accuracy against what each cell costs, a value a run; a panel for each network."""
    networks = {
        name: [*group] for name, group in groupby(measured, key=lambda each: each[0].network)
    }
    figure, panels = grid(networks, width=5.8, height=4.6)
    for axes, group in zip(panels, networks.values(), strict=True):
        top1 = [fmean(cell.values("top1")) for cell, _ in group]
        near = {id(cell) for cell in within_reach(axes, [cell for cell, _ in group], top1)}
        shown = [(cell, costs) for cell, costs in group if id(cell) in near]
        shown.sort(key=lambda each: each[0].target or 0)
        for label in dict.fromkeys(cell.label for cell, _ in shown):
            points = [(cell, costs) for cell, costs in shown if cell.label == label]
            style = points[0][0].style
            x = [fmean(costs) for _, costs in points]
            y = [fmean(cell.values("top1")) for cell, _ in points]
            axes.plot(x, y, zorder=4, **style)
            accuracies = [cell.values("top1") for cell, _ in points]
            axes.vlines(x, [*map(min, accuracies)], [*map(max, accuracies)], color=style["color"])
            lowest = [min(costs) for _, costs in points]
            axes.hlines(y, lowest, [max(costs) for _, costs in points], color=style["color"])
        axes.margins(0.08)
        axes.set(xlabel=xlabel, ylabel="top-1 of the exported network [%]")
    cells = [cell for cell, _ in measured]
    add_legend(figure, cells, "mean of n seeds, bars from the lowest to the highest")
    return figure
