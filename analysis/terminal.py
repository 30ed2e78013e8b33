"""What a person reads of a table in a terminal, at most WIDTH columns wide; all the rest is in the CSV."""

from collections.abc import Collection, Mapping, Sequence
from statistics import fmean
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid

from analysis.findings import Study
from analysis.stats import student_half_width, verdict

WIDTH = 100
NOT_SHOWN = "not shown"
LEGEND = (
    "Mean ± standard deviation over seeds; last epoch, exported network. Differences: points of top-1, paired by seed. "
    "Verdict: better or worse where zero lies outside the difference's 95 % interval, widened for all comparisons of "
    "the suite (Bonferroni). One seed shows nothing. Latency: where `experiments.suite latency` measured it. All "
    "columns, with intervals, published figures and hardware: --out FOLDER."
)


def make_console() -> Console:
    """As wide as the terminal, at most WIDTH columns; a file or a pipe gets all of them."""
    console = Console(markup=False, highlight=False)
    width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    return Console(markup=False, highlight=False, width=width)


def text_grid(rows: Sequence[Mapping[str, str]], wrapped: Collection[str]) -> Grid:
    """Rows of equal keys under their names, but for columns that are empty; those of `wrapped` give way."""
    table = Grid(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    for name in names:
        table.add_column(name, no_wrap=name not in wrapped, overflow="fold")
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def shown_rows(
    rows: pd.DataFrame,
    references: Mapping[str, str | None],
    latency_ms: Mapping[str, Mapping[str, float]],
    study: Study | None,
) -> dict[str, list[dict[str, str]]]:
    """Our rows of a table (tables.COLUMNS) by section, as text, beside what they are compared with.

    Args:
        references: by section the method that its rows are compared with; None: none.
        latency_ms: by cell and seed.
        study: if there is one, accuracies and differences are its own, of validation images.
    """
    ours = rows[rows["kind"] == "ours"]
    comparisons = max(1, len(ours) - ours["section"].nunique())  # all but each section's reference
    sections: dict[str, list[dict[str, str]]] = {}
    for row in ours.to_dict("records"):
        measured, reference = latency_ms.get(row["cell"], {}), references[row["section"]]
        if study is not None:
            top1 = _accuracy(study.accuracy[row["cell"]])
            texts = _standing(row, "validation [%]", top1, measured)
            texts |= _in_study(row["cell"], study)
        else:
            top1 = f"{row['top1']:.2f}{_plus_minus(row['top1_sd'])}"
            texts = _standing(row, "top-1 [%]", top1, measured)
            if reference is not None:
                texts |= _beside(row, reference, comparisons)
        sections.setdefault(row["section"], []).append(texts)
    return sections


def _standing(
    row: Mapping[Any, Any], heading: str, top1: str, latency_ms: Mapping[str, float]
) -> dict[str, str]:
    """What a cell reached, seen alone; its top-1 stands under the heading."""
    texts = dict.fromkeys(("method", "n", heading, "MACs cut", "parameters", "latency"), "")
    texts |= {"method": row["method"], "n": f"{row['top1_n']:.0f} of {row['seeds']:.0f}"}
    if not row["top1_n"]:
        return texts | {heading: "not run"}
    return texts | {
        heading: top1,
        "MACs cut": f"{100 * row['macs_cut']:.1f} %",
        "parameters": f"{row['params'] / 1e6:.3f} M",
        "latency": f"{fmean(latency_ms.values()):.2f} ms" if latency_ms else "",
    }


def _beside(row: Mapping[Any, Any], reference: str, comparisons: int) -> dict[str, str]:
    """A row's difference to the reference on test images, judged as one of so many comparisons."""
    mean, sd, n = (row[f"to_{reference}{part}"] for part in ("", "_sd", "_n"))
    texts = {f"to {reference}": "", "verdict": ""}
    if pd.isna(mean):
        return texts
    half = None
    if n > 1:
        half = student_half_width(int(n), sd, int(n) - 1, comparisons)
    texts[f"to {reference}"] = f"{mean:+.2f}{_plus_minus(sd)}{_other_n(n, row['top1_n'])}"
    texts["verdict"] = verdict(mean, half) or NOT_SHOWN
    return texts


def _in_study(cell: str, study: Study) -> dict[str, str]:
    """A cell's difference on validation images to what the study compares it with."""
    heading = f"to {study.suite.reference}"
    difference = study.differences.get(cell)
    if difference is None:
        return {heading: "", "verdict": ""}
    n = _other_n(len(difference.by_seed), len(study.runs[cell]))
    judged = difference.verdict or NOT_SHOWN
    against = next(other.against for other in study.suite.cells if other.name == cell)
    if against != study.suite.reference:
        judged += f"\n(to {against})"
    return {heading: _accuracy(difference.by_seed, "+.2f") + n, "verdict": judged}


def _accuracy(by_seed: Mapping[int, float], form: str = ".2f") -> str:
    values = pd.Series(by_seed, dtype=float)
    return f"{values.mean():{form}}{_plus_minus(values.std())}"


def _plus_minus(sd: float) -> str:
    return "" if pd.isna(sd) else f" ± {sd:.2f}"


def _other_n(n: float, of_row: float) -> str:
    """The number of common seeds where it is not the row's own."""
    return "" if n == of_row else f" (n = {n:.0f})"
