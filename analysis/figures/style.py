"""What all figures share: the methods' styles, the runs that a line stands for, panels and legends."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import ceil
from pathlib import Path
from textwrap import fill
from typing import Any

import matplotlib.style
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation, Transform

from analysis.results import Run
from analysis.suites import setting_of, target_of
from experiments.runs.files import DataError
from experiments.suites.method_styles import method_styles

STYLE = Path(__file__).parent / "style.mplstyle"
NO_PROTECTION = "psap without protection"
# Okabe and Ito's colours, and two darker ones; line styles and markers tell the methods apart without them. The order
# is the legend's.
STYLES: dict[str, Mapping[str, Any]] = dict(method_styles())
PSAP_STYLE = STYLES.pop("psap")
STYLES[NO_PROTECTION] = {"color": "#CC79A7", "linestyle": (0, (10, 2, 1, 2)), "marker": "P"}
STYLES["psap"] = PSAP_STYLE
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
REACH = (
    20  # percentage points: a panel of accuracies is not fitted to cells further below the best one
)

# For good: ticks are made when a figure is drawn, so a context around the making of a figure would not reach them.
matplotlib.style.use(STYLE)


class NothingToDrawError(DataError):
    """What the runs lack, in a few words."""


@dataclass(frozen=True)
class SeedGroup:
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


def seed_groups(runs: Sequence[Run]) -> list[SeedGroup]:
    """The cells of runs, in the legend's order.

    A cell goes by its method; where its method has several cells with one target (an ablation), all cells of the method
    go by their names without the target. Dense networks have no target; one of a plan that no suite's file names
    (thin_plan) has its own cut.
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
        places[name] = (method, network_title(run), None if run.method == "dense" else target)
    ablated = {place[:2] for place, cells in Counter(places.values()).items() if cells > 1}
    spare = cycle(SPARE_STYLES)
    styles: dict[str, Mapping[str, Any]] = {**STYLES}
    cells = []
    for name, (method, network, target) in places.items():
        label = method
        if (method, network) in ablated and target is not None:
            label = name.removesuffix(f" {100 * target:g}")
        if label not in styles:
            styles[label] = next(spare)
        cells.append(SeedGroup(label, styles[label], network, target, tuple(groups[name])))
    order = {label: place for place, label in enumerate(STYLES)}
    return sorted(cells, key=lambda cell: (cell.network, order.get(cell.label, len(order))))


def network_title(run: Run) -> str:
    setting, images = setting_of(run.identity), run.summary.train_images
    small = (
        "" if setting.full_size else f"\nsmall set-up: {setting.image_size} px, {images:,} images"
    )
    return f"{setting.network_title} on {setting.dataset_title}\n{setting.start}, {setting.epochs} epochs{small}"


def panels_of(of: Sequence[SeedGroup]) -> dict[str, list[SeedGroup]]:
    """The cells that are compared with each other, by the panel's title: one network, one target."""
    panels: dict[str, list[SeedGroup]] = {}
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


def within_reach(axes: Axes, group: Sequence[SeedGroup], top1: Sequence[float]) -> list[SeedGroup]:
    """The cells that a panel is fitted to, by their accuracies; its title names the others."""
    low, of_label = max(top1) - REACH, Counter(cell.label for cell in group)
    far = [
        f"{cell.label} {value:.1f}"
        + (f" at {100 * (cell.target or 0):g} %" if of_label[cell.label] > 1 else "")
        for cell, value in zip(group, top1, strict=True)
        if value < low
    ]
    if far:
        add_to_title(axes, f"below the axis: {', '.join(far)}")
    return [cell for cell, value in zip(group, top1, strict=True) if value >= low]


def add_to_title(axes: Axes, line: str) -> None:
    axes.set_title(f"{axes.get_title(loc='left')}\n{fill(line, 64)}")


def beside(axes: Axes, number: int, count: int, points: float) -> Transform:
    """Data coordinates, moved sideways so that `count` marks at one place stand side by side."""
    return axes.transData + ScaledTranslation(
        (number - (count - 1) / 2) * points / 72, 0, axes.figure.dpi_scale_trans
    )


def draw_band(axes: Axes, x: Any, values: pd.DataFrame, cell: SeedGroup) -> None:
    """From the lowest to the highest of the seeds (rows)."""
    axes.fill_between(
        x, values.min(), values.max(), color=cell.style["color"], alpha=0.15, linewidth=0
    )


def of_psap(runs: Sequence[Run]) -> list[SeedGroup]:
    cells = [cell for cell in seed_groups(runs) if cell.runs[0].method == "psap"]
    if not cells:
        raise NothingToDrawError("no run is PSAP's")
    return cells


def panel_title(cell: SeedGroup) -> str:
    return f"{cell.network}\n{cell.label}, {100 * (cell.target or 0):g} % of the MACs cut"


def grid(
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


def add_legend(
    figure: Figure,
    of: Sequence[SeedGroup],
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


def save_picture(figure: Figure, path: Path) -> None:
    """Write a picture, in the format of its suffix. Raises DataError where there is no such format."""
    try:
        figure.savefig(path)
    except ValueError as error:
        raise DataError(f"{path} cannot be drawn: {error}") from error
