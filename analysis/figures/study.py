"""A study at a glance."""

from collections.abc import Sequence
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures.style import NothingToDrawError
from analysis.findings import Difference, Study, compare
from analysis.results import Run, named
from analysis.suites import find_suite

# A study's differences, by their verdicts (none without an interval), and what the seeds show singly.
JUDGED: dict[str, dict[str, Any]] = {
    "not shown": {"color": "#666666", "marker": "o", "linewidth": 3},
    "better": {"color": "#0072B2", "marker": "D", "linewidth": 3},
    "worse": {"color": "#D55E00", "marker": "D", "linewidth": 3},
    "": {"color": "#666666", "marker": "o", "linestyle": "", "fillstyle": "none"},
}
SEED: dict[str, Any] = {"color": "#000000", "marker": "|", "linestyle": "", "markersize": 7}


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
    for place, (_, difference) in enumerate(rows):
        if difference:
            _draw_difference(axes, place, difference)
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
    axes.set_yticks(
        range(len(rows)), [label + _seeds(study, difference) for label, difference in rows]
    )
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


def _draw_difference(axes: Axes, place: int, difference: Difference) -> None:
    style = JUDGED[difference.verdict]
    for half, width in ((difference.together, 1), (difference.half, 3)):
        if half is not None:
            axes.hlines(
                place,
                difference.mean - half,
                difference.mean + half,
                color=style["color"],
                linewidth=width,
            )
    seeds = list(difference.by_seed.values())
    axes.plot(seeds, [place] * len(seeds), zorder=4, **SEED)
    axes.plot([difference.mean], [place], zorder=3, **style)


def _row_label(study: Study, cell: str, against: str) -> str:
    """A cell, and what it is compared with, if not with the reference."""
    return (
        cell
        if against == study.suite.reference
        else f"{cell.removeprefix(f'{against} and ')}, against {against}"
    )


def _seeds(study: Study, difference: Difference | None) -> str:
    """The number of seeds, if not all have run."""
    return (
        f" (n = {len(difference.by_seed)})"
        if difference and len(difference.by_seed) < len(study.suite.seeds)
        else ""
    )
