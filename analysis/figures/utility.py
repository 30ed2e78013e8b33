"""How well criteria foresee what giving a filter back does: python -m analysis.figures.utility REPORT.json OUT.png

The report is one of `experiments.pulse_check`. Prints the correlations and draws the picture.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.figures.style import STYLE, save_picture
from experiments.exits import plain_exits
from experiments.runs.files import DataError

CRITERIA: dict[str, dict[str, Any]] = {
    "utility": {"color": "#D55E00", "marker": "o", "label": "utility (eq. 5)"},
    "norm": {"color": "#0072B2", "marker": "s", "label": "norm of the weights"},
    "gamma": {"color": "#009E73", "marker": "^", "label": "|gamma|"},
}
LAYER = ["epoch", "seed", "layer"]

matplotlib.style.use(STYLE)


def correlations(filters: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of every criterion with the loss reduction, by epoch and seed, in [-1, 1]; NaN if undefined.

    Filters are ranked within their layer, as PSAP compares them. The correlations of the layers (Spearman's) are
    averaged, each weighted with `degrees`, its number of filters less one; a layer in which a criterion is constant
    counts as 0. Without any relation the average has variance 1 / degrees.
    """
    of_layer = filters.groupby(LAYER)
    ranks = of_layer[[*CRITERIA, "reduction"]].rank()
    by_layer = ranks.groupby([filters[name] for name in LAYER])
    scores = (ranks - by_layer.transform("mean")) / by_layer.transform("std")
    products = scores[[*CRITERIA]].mul(scores["reduction"], axis=0)
    degrees = (of_layer.size() - 1).groupby(["epoch", "seed"]).sum()
    sums = products.groupby([filters["epoch"], filters["seed"]]).sum(min_count=1)
    return sums.div(degrees, axis=0).assign(degrees=degrees)


def picture(report: dict[str, Any]) -> Figure:
    filters = pd.DataFrame(report["filters"])
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = sorted(filters["epoch"].unique())
    for color, epoch in zip(
        colormaps["cividis"](np.linspace(0, 0.85, len(epochs))), epochs, strict=True
    ):
        rows, when = (
            filters[filters["epoch"] == epoch],
            f"after epoch {epoch}" if epoch else "at the start",
        )
        left.plot(
            rows["utility"],
            rows["reduction"],
            "o",
            markersize=2.5,
            color=color,
            alpha=0.6,
            label=when,
        )
    left.axline((0, 0), slope=1, color="#999999", linestyle=":", label="equal")
    left.set(
        xlabel="utility of a suspended filter (eq. 5)",
        ylabel="other batches: the loss falls by, when given back",
    )
    left.legend(title="a filter")
    coefficients = correlations(filters)
    for place, epoch in enumerate(epochs):
        of_epoch = coefficients.loc[epoch]
        null = 1.96 / of_epoch["degrees"].mean() ** 0.5
        right.fill_between([place - 0.4, place + 0.4], -null, null, color="#DDDDDD", linewidth=0)
        for shift, (criterion, style) in zip((-0.25, 0, 0.25), CRITERIA.items(), strict=True):
            places = place + shift + 0.05 * (np.arange(len(of_epoch)) - (len(of_epoch) - 1) / 2)
            right.plot(places, of_epoch[criterion], linestyle="", **style)
    right.axhline(0, color="#000000", linewidth=0.8)
    right.set(
        xlabel="epochs completed",
        ylabel="rank correlation with what the loss falls by",
        ylim=(-1.05, 1.05),
    )
    right.set_xticks(range(len(epochs)), [str(epoch) for epoch in epochs])
    right.set_xlim(-0.5, len(epochs) - 0.5)
    handles: list[Artist] = [Line2D([], [], linestyle="", **style) for style in CRITERIA.values()]
    handles.append(Patch(color="#DDDDDD", label="95 % of what has no relation"))
    right.legend(handles=handles, title="within layers; a mark is a seed")
    machine = report["machine"]
    commit = (machine["commit"] or "unknown")[:7] + (
        " with changes" if machine["dirty_diff_sha256"] else ""
    )
    figure.suptitle(
        f"{' '.join(report['recipe'])}\n{len(filters)} filters of {filters['seed'].nunique()} seeds; "
        f"{report['batches']} batches for the utilities, as many others for the losses; commit {commit}",
        x=0.01,
        ha="left",
        fontsize=10,
    )
    return figure


def read_pulse_check(path: Path) -> dict[str, Any]:
    """Raises DataError if the file holds something else."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        values = pd.DataFrame(report["filters"])[["epoch", "seed", "reduction", *CRITERIA]].apply(
            pd.to_numeric
        )
        missing = {"recipe", "batches"} - report.keys() | {"commit", "dirty_diff_sha256"} - report[
            "machine"
        ].keys()
        if (
            missing
            or values.isna().any(axis=None)
            or not all("layer" in row for row in report["filters"])
        ):
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a report of `experiments.pulse_check`: measure again"
        ) from error
    return report


def write_pictures(results: Path, out: Path) -> list[Path]:
    """Write out/<report>.png for every recorded report of results/utility."""
    written = []
    for path in sorted((results / "utility").glob("*.json")):
        out.mkdir(parents=True, exist_ok=True)
        written.append(out / f"{path.stem}.png")
        picture(read_pulse_check(path)).savefig(written[-1], metadata={"Software": None})
    return written


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, metavar="REPORT.json")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    options = parser.parse_args(arguments)
    with plain_exits():
        report = read_pulse_check(options.report)
        save_picture(picture(report), options.out)
    print(correlations(pd.DataFrame(report["filters"])).to_markdown(floatfmt=".2f"))


if __name__ == "__main__":
    main(sys.argv[1:])
