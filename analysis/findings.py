"""What a study found: every cell against the suite's reference, paired by seed.

python -m analysis.findings SUITE [--runs RUNS_DIR]    prints it, of the recorded runs or of those below RUNS_DIR
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import pandas as pd

from analysis.collect import RESULTS, DataError, Run, plain_exits, read_runs
from analysis.stats import student_half_width
from analysis.suites import Suite, read_suites, runs_of_cells

NOTES = (
    "Accuracy: top-1 in percent of the last epoch on the validation images, which neither train nor test.",
    "Difference: to {reference}, paired by seed. Interval: Student's, 95 %, with one standard deviation for all cells, "
    "{sd:.2f} points once the means of cells and seeds are taken off ({degrees} degrees of freedom; cells without all "
    "seeds of {reference} do not count). It is of one cell: of 20 cells without any effect one lies outside on "
    "average, and they err together, as all are compared with the same runs.",
    "Test: top-1 of the exported networks on the test images; nothing was chosen by it.",
)


def findings(suite: Suite, runs: Iterable[Run]) -> tuple[pd.DataFrame, list[str]]:
    """One row per cell, as text, and what a reader must know.

    Raises:
        DataError: the suite has no reference, or runs of the reference have no validation accuracy.
    """
    if suite.reference is None:
        raise DataError(f"the suite {suite.name} has no reference: name a cell in its file")
    of_cells, left_out = runs_of_cells(suite, runs)
    accuracy = {name: {seed: _validation(run) for seed, run in found.items()} for name, found in of_cells.items()}
    reference = accuracy[suite.reference]
    differences = {
        name: [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
        for name, values in accuracy.items()
        if name != suite.reference
    }
    sd, degrees = residual_spread([values for values in accuracy.values() if reference.keys() <= values.keys()])
    rows = [_row(name, found, accuracy[name], differences.get(name, []), sd, degrees, len(suite.seeds))
            for name, found in of_cells.items()]  # fmt: skip
    facts = {"reference": suite.reference, "sd": sd, "degrees": degrees}
    notes = [note.format(**facts) for note in NOTES] if degrees else [NOTES[0], NOTES[2]]
    return pd.DataFrame(rows), notes + [f"Left out: {why}." for why in left_out]


def residual_spread(cells: Sequence[Mapping[int, float]]) -> tuple[float, int]:
    """Standard deviation of what the means of cells and of seeds do not explain, and its degrees of freedom."""
    table = pd.DataFrame(cells).dropna(axis=1)
    degrees = (table.shape[0] - 1) * (table.shape[1] - 1)
    if degrees <= 0:
        return 0.0, 0
    residuals = table.sub(table.mean(axis=1), axis=0).sub(table.mean(axis=0), axis=1) + table.to_numpy().mean()
    return float((residuals**2).to_numpy().sum() / degrees) ** 0.5, degrees


def _row(
    name: str, runs: Mapping[int, Run], accuracy: Mapping[int, float], differences: Sequence[float], sd: float,
    degrees: int, seeds: int,
) -> dict[str, str]:  # fmt: skip
    row = {"cell": name, "n": f"{len(runs)} of {seeds}", "accuracy [%]": "not run", "difference": "", "95 %": "",
           "shown": "", "test [%]": "", "MACs cut [%]": ""}  # fmt: skip
    if not runs:
        return row
    spread = f" ± {stdev(accuracy.values()):.2f}" if len(runs) > 1 else ""
    row["accuracy [%]"] = f"{fmean(accuracy.values()):.2f}{spread}"
    row["test [%]"] = f"{fmean(run.summary['top1'] for run in runs.values()):.2f}"
    row["MACs cut [%]"] = f"{100 * fmean(run.summary['macs_cut'] for run in runs.values()):.1f}"
    if differences:
        row["difference"] = f"{fmean(differences):+.2f}"
    if differences and degrees:
        half = student_half_width(len(differences), 2**0.5 * sd, degrees)
        low, high = fmean(differences) - half, fmean(differences) + half
        row["95 %"] = f"[{low:+.2f}, {high:+.2f}]"
        row["shown"] = "better" if low > 0 else "worse" if high < 0 else "nothing"
    return row


def _validation(run: Run) -> float:
    """The last epoch's accuracy on the validation images."""
    if not run.config["data"].get("validation_images"):
        raise DataError(f"{run.cell}, seed {run.seed} of {run.suite} was trained without validation images")
    return float(run.metrics["eval/top1"].iloc[-1])


def markdown(suite: Suite, runs: Iterable[Run]) -> str:
    rows, notes = findings(suite, runs)
    table = rows.to_markdown(index=False, disable_numparse=True)
    return "\n\n".join([f"# {suite.title}", table, "\n".join(f"- {note}" for note in notes)]) + "\n"


def write_findings(suites: Iterable[Suite], runs: Sequence[Run], out: Path) -> list[Path]:
    """Write <suite>_findings.md of each suite that has a reference."""
    written = []
    for suite in suites:
        if suite.reference is not None:
            written.append(out / f"{suite.name}_findings.md")
            written[-1].write_text(markdown(suite, runs), encoding="utf-8")
    return written


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite")
    parser.add_argument("--runs", type=Path, default=RESULTS, metavar="RUNS_DIR")
    given = parser.parse_args(arguments)
    with plain_exits(DataError):
        suites = {suite.name: suite for suite in read_suites()}
        if given.suite not in suites:
            raise DataError(f"there is no suite {given.suite!r}: it must be one of {', '.join(suites)}")
        print(markdown(suites[given.suite], read_runs(given.runs)))


if __name__ == "__main__":
    main(sys.argv[1:])
