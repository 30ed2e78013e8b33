"""How well criteria foresee what giving a filter back does: python -m analysis.utility REPORT.json OUT.png

The report is one of `experiments.utility_check`. Prints the correlations and draws the picture.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.style
import pandas as pd
from matplotlib.figure import Figure

from analysis.collect import DataError, plain_exits
from analysis.plots import STYLE

CRITERIA = {
    "utility": {"color": "#D55E00", "marker": "o", "label": "utility (eq. 5)"},
    "norm": {"color": "#0072B2", "marker": "s", "label": "norm of the weights"},
    "gamma": {"color": "#009E73", "marker": "^", "label": "|gamma|"},
}
EPOCHS = ("#000000", "#E69F00", "#56B4E9", "#CC79A7", "#009E73")
PLACE = ["epoch", "seed", "layer"]

matplotlib.style.use(STYLE)


def correlations(filters: pd.DataFrame) -> pd.DataFrame:
    """Rank correlation of every criterion with the loss reduction, by epoch and seed, in [-1, 1].

    Filters are ranked within their layer, as PSAP compares them; of all layers together it is the correlation of what
    their ranks lie above or below their layer's middle.
    """
    columns = [*CRITERIA, "reduction"]
    ranks = filters.groupby(PLACE)[columns].rank()
    centred = ranks - ranks.groupby([filters[name] for name in PLACE]).transform("mean")
    of_run = centred.groupby([filters["epoch"], filters["seed"]])
    return of_run.corr()["reduction"].unstack()[[*CRITERIA]]


def picture(report: dict[str, Any]) -> Figure:
    filters = pd.DataFrame(report["filters"])
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for color, (epoch, of_epoch) in zip(EPOCHS, filters.groupby("epoch"), strict=False):
        when = f"after epoch {epoch}" if epoch else "at the start"
        left.plot(of_epoch["utility"], of_epoch["reduction"], "o", markersize=2.5, color=color, alpha=0.6, label=when)
    left.axline((0, 0), slope=1, color="#999999", linestyle=":", label="equal")
    left.set(xlabel="utility of a suspended filter (eq. 5)", ylabel="the loss falls by, when it is given back")
    left.legend(title="a filter")
    found = correlations(filters)
    epochs = list(found.index.unique("epoch"))
    for shift, (criterion, style) in zip((-0.12, 0, 0.12), CRITERIA.items(), strict=True):
        places = [epochs.index(epoch) + shift for epoch in found.index.get_level_values("epoch")]
        right.plot(places, found[criterion], linestyle="", **style)
    right.axhline(0, color="#000000", linewidth=0.8)
    right.set(xlabel="epochs completed", ylabel="rank correlation with what the loss falls by", ylim=(-1.05, 1.05))
    right.set_xticks(range(len(epochs)), [str(epoch) for epoch in epochs])
    right.set_xlim(-0.5, len(epochs) - 0.5)
    right.legend(title="within layers; a mark is a seed")
    figure.suptitle(
        f"{' '.join(report['recipe'])}\n{len(filters)} filters, {report['share']:.0%} of a layer's live ones at once, "
        f"{report['batches']} batches; commit {report['machine']['commit'][:7]}", x=0.01, ha="left", fontsize=10,
    )  # fmt: skip
    return figure


def read_report(path: Path) -> dict[str, Any]:
    """Raises DataError if the file holds something else."""
    try:
        report: dict[str, Any] = json.loads(path.read_text())
        missing = {*PLACE, "reduction", *CRITERIA} - {*report["filters"][0]}
        if missing or not {"machine", "recipe", "share", "batches"} <= report.keys():
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a report of `experiments.utility_check`: measure again") from error
    return report


def write_pictures(results: Path, out: Path) -> list[Path]:
    """Write out/<report>.png for every recorded report of results/utility."""
    written = []
    for path in sorted((results / "utility").glob("*.json")):
        out.mkdir(parents=True, exist_ok=True)
        written.append(out / f"{path.stem}.png")
        picture(read_report(path)).savefig(written[-1], metadata={"Software": None})
    return written


def main(arguments: Sequence[str]) -> None:
    if len(arguments) != 2:
        sys.exit(__doc__)
    path, out = map(Path, arguments)
    with plain_exits(DataError, OSError):
        report = read_report(path)
        picture(report).savefig(out)
    print(correlations(pd.DataFrame(report["filters"])).to_markdown(floatfmt=".2f"))


if __name__ == "__main__":
    main(sys.argv[1:])
