"""Pictures of finished runs.

python -m analysis.plots OUT.png RUN_FOLDER ...      what happened in these runs, one of them PSAP's
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.collect import Run, read_run

# Okabe and Ito's colours; line styles and markers tell the methods apart without them.
STYLES = {
    "dense": {"color": "#000000", "linestyle": ":", "marker": "s"},
    "thin": {"color": "#E69F00", "linestyle": "-.", "marker": "D"},
    "sfp": {"color": "#56B4E9", "linestyle": "--", "marker": "^"},
    "psap": {"color": "#D55E00", "linestyle": "-", "marker": "o"},
}


def what_happened(runs: Sequence[Run]) -> Figure:
    """One page that explains a comparison: what PSAP measured, what it removed, how all runs learned.

    Raises ValueError unless exactly one of the runs is PSAP's.
    """
    of_psap = [run for run in runs if run.method == "psap"]
    if len(of_psap) != 1:
        raise ValueError(f"the picture needs exactly one run of psap, not {len(of_psap)}")
    psap = of_psap[0]
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(11, 8.4), layout="constrained")
        axes = figure.subplot_mosaic(
            [["sparsity", "ratio"], ["cut", "accuracy"], ["filters", "accuracy"]], height_ratios=[2.2, 1, 1]
        )
        figure.suptitle(
            f"{psap.summary['model']} on {psap.summary['dataset']}: PSAP removes "
            f"{psap.summary['macs_cut']:.0%} of the MACs while it trains (seed {psap.summary['seed']})"
        )
        _draw_map(axes["sparsity"], psap.layers("weight_sparsity_ratio"), "share of small weights")
        axes["sparsity"].set_title("1  Measured: weight sparsity ratio (eq. 1)")
        axes["sparsity"].set_ylabel("layer, from input to output")
        _draw_map(axes["ratio"], psap.layers("prune_ratio"), "share of filters removed")
        axes["ratio"].set_title("2  Decided: prune ratio of each layer (eq. 2)")
        _draw_cut(axes["cut"], psap)
        _draw_filters(axes["filters"], psap)
        _draw_accuracy(axes["accuracy"], runs)
        axes["cut"].sharex(axes["filters"])
        for panel in ("sparsity", "ratio", "filters"):
            axes[panel].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _draw_map(axes: Axes, values: pd.DataFrame, unit: str) -> None:
    """Layers down, pruning steps across; light is little, dark is much, in grey as well."""
    epochs = values.index.to_numpy()
    columns = np.append(epochs, epochs[-1] + 1) - 0.5
    rows = np.arange(values.shape[1] + 1) - 0.5
    image = axes.pcolormesh(columns, rows, values.to_numpy().T, cmap="cividis_r")
    axes.set_yticks(range(values.shape[1]), list(values.columns), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("pruning step, in completed epochs; the last one freezes the plan")
    axes.figure.colorbar(image, ax=axes, label=unit)


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
        steps.index, steps["psap/restored"], bottom=steps["psap/suspended"], color="#D55E00", hatch="////",
        edgecolor="white", label="proposed, but restored",
    )  # fmt: skip
    axes.set_ylabel("filters")
    axes.set_xlabel("epochs completed")
    axes.set_title("4  Filters: suspended, and restored by the pulse")
    axes.set_ylim(0, 1.35 * steps.sum(axis=1).max())
    axes.legend(loc="upper center", frameon=False, ncols=2)


def _draw_accuracy(axes: Axes, runs: Sequence[Run]) -> None:
    """Curves of eval/top1, and beside them the exported networks' final accuracy on the test images."""
    epochs = max(len(run.metrics) for run in runs)
    for run in runs:
        style = STYLES[run.method]
        axes.plot(run.metrics["eval/top1"], color=style["color"], linestyle=style["linestyle"], linewidth=1.3)
    ranked = sorted(runs, key=lambda run: run.summary["top1"])
    for place, run in enumerate(ranked):
        axes.plot(
            epochs * (1.05 + 0.06 * place), run.summary["top1"], linestyle=STYLES[run.method]["linestyle"],
            color=STYLES[run.method]["color"], marker=STYLES[run.method]["marker"], markersize=8,
            label=f"{run.method}: {run.summary['top1']:.1f} % at {run.summary['macs_cut']:.0%} cut",
        )  # fmt: skip
    axes.axvline(epochs * 1.02, color="#999999", linewidth=0.8)
    second_half = min(run.metrics["eval/top1"].iloc[len(run.metrics) // 2 :].min() for run in runs)
    low = min(second_half, ranked[0].summary["top1"])
    axes.set_ylim(max(0, low - 0.4 * (100 - low)), 101.5)  # room for the legend below the curves
    curves = "validation" if runs[0].config["data"]["validation_images"] > 0 else "test"
    axes.set_title("5  Accuracy: while training, and of the exported network")
    axes.set_xlabel(f"epochs completed (lines: {curves} images; markers: test images)")
    axes.set_ylabel("top-1 [%]")
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= epochs])
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="lower right", title="exported, last epoch", handlelength=3)


def main(arguments: Sequence[str]) -> None:
    if len(arguments) < 2:
        sys.exit(__doc__)
    out, *folders = map(Path, arguments)
    try:
        what_happened([read_run(folder) for folder in folders]).savefig(out, dpi=110)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
