"""How cost grows with the work, from a benchmark's report: python -m analysis.figures.growth REPORT.json OUT.png"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from analysis.figures.style import save_picture
from experiments.exits import plain_exits
from experiments.runs.files import DataError

WHATS = {
    "depth": "layers of the network",
    "batch": "batch size",
    "layers": "pruned layers of ResNet-56",
    "ranks": "processes on two cores",
}
IMAGES = "an epoch has 50,000 images of 32x32 pixels"
PARTS = {"epoch": "epoch and its pruning step [s]", "step": "pruning step alone [s]"}


def draw_growth(figures: Mapping[str, Any], device: str) -> Figure:
    """Seconds of an epoch (above) and of its pruning step (below) against each kind of work.

    Args:
        figures: those of a report of `experiments.benchmark growth`.
        device: that they were measured on.

    Raises:
        DataError: the report has no growth.
    """
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    figure.suptitle(
        f"PSAP in ResNet-20 at batch size 32, unless the axis says otherwise; {IMAGES}; {device}"
    )
    panels = figure.subplots(len(PARTS), len(WHATS))
    for row, (part, label) in zip(panels, PARTS.items(), strict=True):
        for axes, (what, title) in zip(row, WHATS.items(), strict=True):
            prefix, suffix = f"growth_{what}_", f"_{part}_seconds"
            names = [name for name in figures if name.startswith(prefix) and name.endswith(suffix)]
            points = sorted(
                (int(name[len(prefix) : -len(suffix)]), figures[name]["median"]) for name in names
            )
            if not points:
                raise DataError(
                    f"the report has no {prefix}*{suffix}: run `python -m experiments.benchmark growth`"
                )
            (first, seconds), (last, _) = points[0], points[-1]
            axes.plot(
                [first, last],
                [seconds, seconds * last / first],
                color="#999999",
                linestyle=":",
                label="in proportion",
            )
            axes.plot(*zip(*points, strict=True), color="#D55E00", marker="o", label="measured")
            axes.set(xlabel=title, ylim=(0, None), xticks=[amount for amount, _ in points])
        row[0].set_ylabel(label)
    panels[0][0].legend()
    return figure


def _read_report(path: Path) -> tuple[dict[str, Any], str]:
    """A report's figures, and the device that they were measured on."""
    try:
        report = json.loads(path.read_text())
        figures: dict[str, Any] = report["figures"]
        device: str = report["machine"]["device"]
        if not all(isinstance(figure["median"], int | float) for figure in figures.values()):
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a report of `experiments.benchmark`: measure again"
        ) from error
    return figures, device


def write_growth(results: Path, out: Path) -> list[Path]:
    """Write out/<report>_growth.png for every recorded report of results/benchmark that has growth."""
    written = []
    for path in sorted((results / "benchmark").glob("*.json")):
        figures, device = _read_report(path)
        if any(name.startswith("growth_") for name in figures):
            out.mkdir(parents=True, exist_ok=True)
            written.append(out / f"{path.stem}_growth.png")
            draw_growth(figures, device).savefig(written[-1], metadata={"Software": None})
    return written


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path, metavar="REPORT.json")
    parser.add_argument("out", type=Path, metavar="OUT.png")
    options = parser.parse_args(arguments)
    with plain_exits():
        figures, device = _read_report(options.report)
        save_picture(draw_growth(figures, device), options.out)
        print(options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
