"""All figures by name, and writing them for every suite."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from analysis.figures.accuracy import (
    accuracy_against_latency,
    accuracy_against_macs,
    accuracy_against_training_time,
)
from analysis.figures.curves import mask_churn, training_curves, training_loss
from analysis.figures.layers import draw_prune_ratios, draw_sparsity_ratios, kept_filters
from analysis.figures.pulses import pulses
from analysis.figures.study import study_differences
from analysis.figures.style import NothingToDrawError
from analysis.published import read_published
from analysis.recorded import read_latencies
from analysis.results import RESULTS, Run
from analysis.suites import runs_of_suite

FIGURES: dict[str, Callable[[Sequence[Run]], Figure]] = {
    "accuracy_against_macs": accuracy_against_macs,
    "accuracy_against_training_time": accuracy_against_training_time,
    "training_curves": training_curves,
    "training_loss": training_loss,
    "mask_churn": mask_churn,
    "layer_prune_ratios": draw_prune_ratios,
    "weight_sparsity_ratios": draw_sparsity_ratios,
    "pulses": pulses,
    "kept_filters": kept_filters,
    "study_differences": study_differences,
}


def drawn(name: str, runs: Sequence[Run], latencies: Path | None = None) -> Figure | str:
    """The figure of that name, beside published.csv and latencies, or one sentence that says why there is none."""
    try:
        if not runs:
            raise NothingToDrawError("not run")
        if name == "accuracy_against_macs":
            return accuracy_against_macs(runs, read_published())
        if latencies is not None:
            if not latencies.is_file():
                raise NothingToDrawError(f"there is no {latencies.parent.name}/{latencies.name}")
            return accuracy_against_latency(runs, read_latencies(latencies))
        return FIGURES[name](runs)
    except NothingToDrawError as error:
        return f"{name} is left out: {error}"


def write_figures(
    runs: Sequence[Run], out: Path, results: Path = RESULTS, *, pdf: bool = False
) -> list[Path]:
    """Write out/<suite>/<figure>.png, with `pdf` as .pdf too, the same bytes for the same runs; print what is left out.

    The runs are those of the suite's table. A run outside a suite counts to a suite of its recipe's name. Latencies
    are read from results/<suite>/latency.json. Raises DataError if they, or published.csv, are damaged, or a
    table would refuse the runs.
    """
    suites: dict[str, list[Run]] = {}
    for run in runs:
        suites.setdefault(run.suite or run.recipe, []).append(run)
    figures: dict[Path, Figure | str] = {}
    for suite, claimed in suites.items():
        members, left_out = runs_of_suite(suite, claimed)
        print(*(f"{suite}: left out: {why}\n" for why in left_out), sep="", end="")
        figures |= {out / suite / name: drawn(name, members) for name in FIGURES}
        name = "accuracy_against_latency"
        figures[out / suite / name] = drawn(name, members, results / suite / "latency.json")
    written = []
    for path, figure in figures.items():
        if isinstance(figure, str):
            print(f"{path.parent.name}: {figure}")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        written.append(path.with_suffix(".png"))
        figure.savefig(written[-1], metadata={"Software": None})
        if pdf:
            figure.set_layout_engine("none")  # the second file keeps the places of the first
            written.append(path.with_suffix(".pdf"))
            figure.savefig(written[-1], metadata={"CreationDate": None, "Producer": None})
    return written
