"""What PSAP measures and decides layer by layer, and what is left of every layer."""

from collections.abc import Sequence
from math import ceil

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures.style import (
    NothingToDrawError,
    SeedGroup,
    add_legend,
    beside,
    draw_band,
    grid,
    of_psap,
    panel_title,
    panels_of,
    seed_groups,
)
from analysis.results import Run

MAP_COLUMNS = 3


def kept_filters(runs: Sequence[Run]) -> Figure:
    """Share of its filters that every layer of the exported network keeps. Thin networks have no plan to draw."""
    planned = [cell for cell in seed_groups(runs) if cell.plans()]
    if not planned:
        raise NothingToDrawError("no run has a plan")
    panels = panels_of(planned)
    figure, axes = grid(panels, columns=1, width=11, height=3.4)
    for panel, group in zip(axes, panels.values(), strict=True):
        filters = _filters_of_layers(group)
        places = {name: place for place, name in enumerate(filters)}
        for number, cell in enumerate(group):
            kept = pd.DataFrame(
                [
                    {l["name"]: 100 - 100 * len(l["pruned"]) / l["filters"] for l in plan}
                    for plan in cell.plans()
                ]
            ).rename(columns=places)
            place = beside(panel, number, len(group), points=1.5)
            panel.plot(kept.mean(), transform=place, **cell.style)
            draw_band(panel, kept.columns, kept, cell)
        labels = [f"{name} ({count})" for name, count in filters.items()]
        panel.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        panel.set(ylabel="filters kept [%]", ylim=(0, 104), xlim=(-0.5, len(labels) - 0.5))
    add_legend(figure, planned)
    return figure


def _filters_of_layers(group: Sequence[SeedGroup]) -> dict[str, int]:
    """Layer to filters, in the order of the plan that has most; scopes differ in which layers their plans name."""
    plans = sorted((cell.plans()[0] for cell in group), key=len, reverse=True)
    return {layer["name"]: layer["filters"] for plan in plans for layer in plan}


def draw_prune_ratios(runs: Sequence[Run]) -> Figure:
    """What PSAP decided at every step: the share of its filters that every layer loses, mean over the seeds."""
    return _maps(runs, "prune_ratio", "share of filters removed")


def draw_sparsity_ratios(runs: Sequence[Run]) -> Figure:
    """What PSAP measured at every step: the share of small weights in every layer, mean over the seeds."""
    return _maps(runs, "weight_sparsity_ratio", "share of small weights")


def _maps(runs: Sequence[Run], quantity: str, unit: str) -> Figure:
    cells = of_psap(runs)
    figure, panels = grid([panel_title(cell) for cell in cells], MAP_COLUMNS, width=5.4, height=4.6)
    values = [cell.layers(quantity) for cell in cells]
    low, high = (
        min(frame.min(axis=None) for frame in values),
        max(frame.max(axis=None) for frame in values),
    )
    for number, (axes, of_cell) in enumerate(zip(panels, values, strict=True)):
        image = draw_map(axes, of_cell, low, high)
        if number % MAP_COLUMNS and of_cell.columns.equals(values[number - 1].columns):
            axes.tick_params(labelleft=False)
    figure.colorbar(image, ax=panels, label=unit, shrink=1 / ceil(len(panels) / MAP_COLUMNS))
    return figure


def draw_map(
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
