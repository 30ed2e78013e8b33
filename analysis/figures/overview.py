"""A few runs on one page.

python -m analysis.figures.overview OUT.png RUN_FOLDER ...
    what PSAP measured, decided and reached; one of the runs is PSAP's
python -m analysis.figures.overview OUT.png --report REPORT.json
    what pruning bought, and what it cost; the report is the demo's
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures.layers import draw_map
from analysis.figures.style import SPARE_STYLES, STYLES, save_picture
from analysis.results import Run, read_run
from analysis.suites import setting_of
from experiments.exits import plain_exits
from experiments.runs.files import DataError


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
        figure.colorbar(draw_map(axes[panel], psap.layers(quantity)), ax=axes[panel], label=unit)
    axes["sparsity"].set_title("1  Measured: weight sparsity ratio (eq. 1)")
    axes["sparsity"].set_ylabel("layer, from input to output")
    axes["ratio"].set_title("2  Decided: prune ratio of each layer (eq. 2)")
    _draw_cut(axes["cut"], psap)
    _draw_filters(axes["filters"], psap)
    _draw_accuracy(axes["accuracy"], runs)
    axes["cut"].sharex(axes["filters"])
    axes["filters"].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


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
            **{**styles[run.method], "markersize": 8},
            label=f"{run.method}: {run.summary.top1:.1f} % at {run.summary.macs_cut:.0%} cut",
        )
    axes.axvline(epochs * 1.02, color="#999999", linewidth=0.8)
    axes.set_ylim(0, 101.5)
    curves = "validation" if runs[0].identity["data"]["validation_images"] > 0 else "test"
    axes.set_title("5  Accuracy: while training, and of the exported network")
    axes.set_xlabel(f"epochs completed (lines: {curves} images; markers: test images)")
    axes.set_ylabel("top-1 [%]")
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= epochs])
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1],
        labels[::-1],
        loc="best",
        title="exported, last epoch",
        handlelength=3,
    )


# What pruning buys: of the demo's report, in percent of the dense network's.
BOUGHT = {
    "macs": "MACs",
    "params": "parameters",
    "latency_batch_ms": "time for 256 images",
    "latency_ms": "time for one image",
    "train_seconds": "training time",
}


def bought_and_paid(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """What pruning bought, beside the dense network, and the accuracy that it left.

    Args:
        rows: of the demo's report, one of them dense.
    """
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bought, paid = figure.subplots(1, 2, width_ratios=[1.5, 1])
    dense = next(row for row in rows if row["method"] == "dense")
    pruned = [row for row in rows if row is not dense]
    height = 0.8 / len(pruned)
    for number, row in enumerate(pruned):
        places = np.arange(len(BOUGHT)) + (number - (len(pruned) - 1) / 2) * height
        shares = [100 * row[key] / dense[key] for key in BOUGHT]
        color = STYLES[row["method"]]["color"]
        bars = bought.barh(places, shares, height * 0.92, color=color, label=row["method"])
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the dotted line
        bought.bar_label(bars, fmt="%.0f", padding=2, fontsize=7, bbox=paper)
    bought.axvline(100, color=STYLES["dense"]["color"], linestyle=":", label="dense")
    bought.set_yticks(range(len(BOUGHT)), BOUGHT.values())
    bought.invert_yaxis()
    bought.grid(visible=False, axis="y")
    bought.set_xlabel(
        "percent of the dense network's\n"
        "(trained one after the other: what else the machine did is in the training times)"
    )
    bought.set_title("What pruning bought: shorter is better")
    figure.legend(*bought.get_legend_handles_labels(), loc="outside lower left", ncols=len(rows))
    lowest, highest = dense["top1"] - dense["top1_noise"], dense["top1"] + dense["top1_noise"]
    paid.axhspan(lowest, highest, color="#BBBBBB", alpha=0.5)
    for number, row in enumerate(rows):
        style = {**STYLES[row["method"]], "linestyle": "", "markersize": 10}
        paid.plot([number], [row["top1"]], **style)
        paid.annotate(
            f"{row['top1']:.1f}",
            (number, row["top1"]),
            (0, -18),
            textcoords="offset points",
            ha="center",
        )
    paid.set_xticks(range(len(rows)), [row["method"] for row in rows])
    paid.set_xlim(-0.6, len(rows) - 0.4)
    low = min(row["top1"] for row in rows)
    paid.set_ylim(low - 0.2 * (102 - low), 102)
    paid.set_ylabel(f"top-1 on {dense['test_images']} test images [%]")
    paid.set_title("What it cost: in the grey band it is noise")
    return figure


def read_demo_report(path: Path) -> list[dict[str, Any]]:
    """The rows of the demo's report. Raises DataError if the file holds something else."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())
        for row in rows:
            if not all(row[key] > 0 for key in (*BOUGHT, "test_images", "top1", "top1_noise")):
                raise ValueError
        if "dense" not in [row["method"] for row in rows]:
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} is not a report of the demo: run it again") from error
    return rows


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT.png")
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN_FOLDER")
    parser.add_argument("--report", type=Path, metavar="REPORT.json")
    options = parser.parse_args(arguments)
    if (options.report is None) == (not options.runs):
        parser.error("give run folders, or --report")
    with plain_exits():
        if options.report is not None:
            save_picture(bought_and_paid(read_demo_report(options.report)), options.out)
        else:
            save_picture(what_happened([read_run(folder) for folder in options.runs]), options.out)
        print(options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
