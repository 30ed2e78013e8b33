"""What the pulses saw."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures.layers import draw_map
from analysis.figures.style import NothingToDrawError, grid, of_psap, panel_title
from analysis.results import Run
from analysis.suites import find_suite

RESTORED = "who was restored (white: nothing was suspended)"


def pulses(runs: Sequence[Run]) -> Figure:
    """Left, the utility (eq. 5) of every suspended filter at every pulse of one seed; right, who was restored.

    Of a study, only its reference; of another ablation, only the cells psap, if there are any.
    """
    pulsed = [cell for cell in of_psap(runs) if not cell.runs[0].pulses.empty]
    if not pulsed:
        raise NothingToDrawError("no run has pulses")
    suite = find_suite(runs[0].suite or "")
    cells = [cell for cell in pulsed if suite and cell.runs[0].cell == suite.reference]
    cells = cells or [cell for cell in pulsed if cell.label == "psap"] or pulsed
    titles = [
        title
        for cell in cells
        for title in (f"{panel_title(cell)}, seed {cell.runs[0].seed}", RESTORED)
    ]
    figure, panels = grid(titles, columns=2, width=5.4, height=4.2)
    for left, right, cell in zip(panels[::2], panels[1::2], cells, strict=True):
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
        image = draw_map(right, shares[[name for name in order if name in shares]], 0, 1)
        figure.colorbar(image, ax=right, label="restored, of the suspended")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure
