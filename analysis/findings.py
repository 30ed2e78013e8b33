"""What a study found: every cell against the suite's reference, paired by seed.

python -m analysis.findings SUITE [FOLDER]
    prints it; FOLDER holds runs, or recorded results: analysis/recorded if absent
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, inf
from pathlib import Path
from statistics import fmean, stdev

import pandas as pd

from analysis.collect import read_runs
from analysis.results import RESULTS, Run, named, training_hours
from analysis.stats import f_limit, student_half_width, verdict
from analysis.suites import PlannedSuite, plan_suite, runs_of_cells
from experiments.exits import plain_exits
from experiments.runs.files import DataError
from experiments.suites.spec import read_suite

NOTES = (
    "Accuracy: top-1 in percent of the last epoch on the validation images, which neither train nor test. Seeds vary "
    "initialisation, order and augmentation; the training and validation images are one draw for all.",
    "Difference: to the cell `against`, paired by seed, and its standard deviation. Interval: Student's, 95 %, of one "
    "cell.{shared} Cells that are compared with the same runs err together.",
    "Verdict: what holds for all intervals of its kind together when every cell has run (Bonferroni: {inside} with "
    "the shared standard deviation, {outside} others{effects}). What is to become a default needs fresh seeds.",
    "Plan: by how many filters the layers' widths differ from those of `against`, summed, and which share of its "
    "pruned filters a cell keeps; means over seeds, last plans. A cell that changes little cannot show much.",
    "Test: top-1 of the exported networks on the test images, and differences there; this study chooses nothing by it.",
)
SHARED = (
    " Cells of {method} and its variants have one standard deviation, {sd:.2f} points once the means of cells and "
    "seeds are off ({degrees} degrees of freedom; cells without all seeds of {reference} do not count); the others, "
    "which share less with it, their own{apart}."
)
APART = ", and so has {names}: what the means leave of it is more than the other cells allow (F tests, 5 % in all)"
EFFECT_COLUMNS = (
    "effect",
    "mean of",
    "n",
    "difference",
    "95 %",
    "verdict",
    "above zero",
    "test difference",
)
COLUMNS = (
    "cell",
    "n",
    "accuracy [%]",
    "against",
    "difference",
    "95 %",
    "verdict",
    "plan",
    "test [%]",
    "MACs cut [%]",
)


@dataclass(frozen=True)
class Difference:
    """A cell less another, or the mean of such pairs, in points of validation accuracy, seed by seed.

    Attributes:
        half: half of the 95 % interval of this one alone; None without a spread.
        together: half of the interval that holds for all intervals of its kind together (Bonferroni).
    """

    by_seed: Mapping[int, float]
    half: float | None
    together: float | None

    @property
    def mean(self) -> float:
        return fmean(self.by_seed.values())

    @property
    def verdict(self) -> str:
        return verdict(self.mean, self.together)


@dataclass(frozen=True)
class Spread:
    """A standard deviation that cells share, with its degrees of freedom; the cells `apart` from it have these F."""

    sd: float
    degrees: int
    apart: Mapping[str, float]


@dataclass(frozen=True)
class Study:
    """A suite with a reference, its runs, and what they say of its cells and of its effects.

    Attributes:
        runs, accuracy: by cell and seed; the accuracy in percent of the last epoch on the validation images.
        differences: by cell, to the one it is compared with; None without a seed in common.
        effects: by name; None without a seed that all its cells have.
        method: the reference's.
        spread: of the method's cells and its variants'.
        inside, outside: number of comparisons of cells that share it and of others.
        left_out: which runs claim to be the suite's and are not, and why.
    """

    suite: PlannedSuite
    runs: Mapping[str, Mapping[int, Run]]
    accuracy: Mapping[str, Mapping[int, float]]
    differences: Mapping[str, Difference | None]
    effects: Mapping[str, Difference | None]
    method: str
    spread: Spread
    inside: int
    outside: int
    left_out: Sequence[str]


def compare(suite: PlannedSuite, runs: Iterable[Run]) -> Study:
    """What the runs of a suite with a reference say of its cells.

    Raises:
        DataError: the suite has no reference, runs have no validation accuracy, or start from weights.
    """
    if suite.reference is None:
        raise DataError(f"the suite {suite.name} has no reference: name a cell in its file")
    of_cells, left_out = runs_of_cells(suite, runs)
    accuracy = {
        name: {seed: _validation(run) for seed, run in runs_by_seed.items()}
        for name, runs_by_seed in of_cells.items()
    }
    reference = accuracy[suite.reference]
    method = next(cell.setting.method for cell in suite.cells if cell.name == suite.reference)
    family = {
        cell.name for cell in suite.cells if cell.setting.method in (method, f"{method}_variant")
    }
    whole = {name: accuracy[name] for name in family if reference.keys() <= accuracy[name].keys()}
    spread = shared_spread(whole, suite.reference)
    family -= spread.apart.keys()
    inside, outside = len(family) - 1, len(suite.cells) - len(family)

    def mean_difference(pairs: Sequence[tuple[str, str]], comparisons: int) -> Difference | None:
        weights: dict[str, float] = defaultdict(float)
        for one, other in pairs:
            weights[one] += 1 / len(pairs)
            weights[other] -= 1 / len(pairs)
        seeds = sorted(set.intersection(*(set(accuracy[name]) for name in weights)))
        if not seeds:
            return None
        by_seed = {
            seed: sum(weight * accuracy[name][seed] for name, weight in weights.items())
            for seed in seeds
        }
        if weights.keys() <= family:
            own, freedom = hypot(*weights.values()) * spread.sd, spread.degrees
        else:
            own, freedom = (stdev(by_seed.values()) if len(seeds) > 1 else 0.0), len(seeds) - 1
        halves = [
            student_half_width(len(seeds), own, freedom, k) if freedom else None
            for k in (1, comparisons)
        ]
        return Difference(by_seed, *halves)

    differences = {
        cell.name: mean_difference(
            [(cell.name, cell.against)], inside if cell.name in family else outside
        )
        for cell in suite.cells
        if cell.against is not None
    }
    effects = {
        name: mean_difference(pairs, len(suite.effects)) for name, pairs in suite.effects.items()
    }
    return Study(
        suite, of_cells, accuracy, differences, effects, method, spread, inside, outside, left_out
    )


def findings(study: Study) -> tuple[pd.DataFrame, list[str]]:
    """One row per cell, as text, and what a reader must know."""
    rows = []
    for cell in study.suite.cells:
        runs_by_seed = study.runs[cell.name]
        row = dict.fromkeys(COLUMNS, "") | {
            "cell": cell.name,
            "n": f"{len(runs_by_seed)} of {len(study.suite.seeds)}",
        }
        row |= _standing(runs_by_seed, study.accuracy[cell.name])
        if cell.against is not None and (difference := study.differences[cell.name]):
            row |= {"against": cell.against, "plan": _moved(runs_by_seed, study.runs[cell.against])}
            row |= _difference_texts(difference)
        rows.append(row)
    every = [run for runs_by_seed in study.runs.values() for run in runs_by_seed.values()]
    facts = {name: getattr(study, name) for name in ("method", "inside", "outside")}
    facts |= {
        "reference": study.suite.reference,
        "sd": study.spread.sd,
        "degrees": study.spread.degrees,
    }
    facts["effects"] = f", {len(study.effects)} effects" if study.effects else ""
    apart = named(f"{name} (F = {ratio:.1f})" for name, ratio in study.spread.apart.items())
    facts["apart"] = APART.format(names=apart) if apart else ""
    facts["shared"] = SHARED.format(**facts) if study.spread.degrees else ""
    notes = [note.format(**facts) for note in NOTES]
    if every:
        notes.append(
            f"Hardware: {named(run.provenance.device for run in every)}; training: "
            f"{training_hours(every)} in all; commits: {named(run.provenance.commit for run in every)}."
        )
    return pd.DataFrame(rows), notes + [f"Left out: {why}." for why in study.left_out]


def effect_rows(study: Study) -> pd.DataFrame:
    """One row per effect, as text."""
    top1 = {
        name: {seed: run.summary.top1 for seed, run in runs.items()}
        for name, runs in study.runs.items()
    }
    rows = []
    for name, pairs in study.suite.effects.items():
        mean_of = "; ".join(f"{one} - {other}" for one, other in pairs)
        row = dict.fromkeys(EFFECT_COLUMNS, "") | {"effect": name, "mean of": mean_of, "n": "0"}
        if difference := study.effects[name]:
            test = [
                fmean(top1[one][seed] - top1[other][seed] for one, other in pairs)
                for seed in difference.by_seed
            ]
            above = sum(value > 0 for value in difference.by_seed.values())
            row |= {"n": str(len(test)), "above zero": f"{above} of {len(test)}"}
            row |= {"test difference": f"{fmean(test):+.2f}{_plus_minus(test)}"}
            row |= _difference_texts(difference)
        rows.append(row)
    return pd.DataFrame(rows)


def shared_spread(accuracy: Mapping[str, Mapping[int, float]], reference: str) -> Spread:
    """The standard deviation of what the means of cells and of seeds do not explain, over the cells that share it.

    A cell stands apart if it adds more to the sum of squares than the others allow: an F test, 5 % over all cells
    together (Bonferroni), one cell after the other, the worst first. The reference never stands apart.
    """
    table = pd.DataFrame(accuracy).dropna()
    if min(table.shape) < 2:
        return Spread(0.0, 0, {})
    own, apart = len(table) - 1, dict[str, float]()
    while (others := own * (table.shape[1] - 2)) > 0:
        rests = {
            name: _residual_squares(table.drop(columns=name))
            for name in table.columns.drop(reference)
        }
        worst, rest = min(rests.items(), key=lambda item: item[1])
        excess = (_residual_squares(table) - rest) / own
        if excess * others <= f_limit(own, others, tests=len(rests)) * rest:
            break
        apart[worst] = excess * others / rest if rest else inf
        table = table.drop(columns=worst)
    degrees = own * (table.shape[1] - 1)
    return Spread((_residual_squares(table) / degrees) ** 0.5, degrees, apart)


def _residual_squares(table: pd.DataFrame) -> float:
    """Of what the means of rows and of columns do not explain."""
    values = table.to_numpy()
    residuals = values - values.mean(axis=0) - values.mean(axis=1, keepdims=True) + values.mean()
    return float((residuals**2).sum())


def _plus_minus(values: Collection[float]) -> str:
    return f" ± {stdev(values):.2f}" if len(values) > 1 else ""


def _standing(runs: Mapping[int, Run], accuracy: Mapping[int, float]) -> dict[str, str]:
    """What a cell reached, seen alone."""
    if not runs:
        return {"accuracy [%]": "not run"}
    return {
        "accuracy [%]": f"{fmean(accuracy.values()):.2f}{_plus_minus(accuracy.values())}",
        "test [%]": f"{fmean(run.summary.top1 for run in runs.values()):.2f}",
        "MACs cut [%]": f"{100 * fmean(run.summary.macs_cut for run in runs.values()):.1f}",
    }


def _difference_texts(difference: Difference) -> dict[str, str]:
    mean, half = difference.mean, difference.half
    return {
        "difference": f"{mean:+.2f}{_plus_minus(difference.by_seed.values())}",
        "95 %": "" if half is None else f"[{mean - half:+.2f}, {mean + half:+.2f}]",
        "verdict": difference.verdict,
    }


def _moved(ours: Mapping[int, Run], theirs: Mapping[int, Run]) -> str:
    """How far the last plans of two cells lie apart; nothing without plans of the same layers."""
    widths, others = [], []
    for seed in ours.keys() & theirs.keys():
        pruned, before = _pruned(ours[seed]), _pruned(theirs[seed])
        if pruned.keys() != before.keys() or not any(before.values()):
            return ""
        widths.append(
            sum(abs(len(pruned[name]) - len(filters)) for name, filters in before.items())
        )
        kept = sum(len(filters - pruned[name]) for name, filters in before.items())
        others.append(kept / sum(map(len, before.values())))
    return f"{fmean(widths):.0f} filters, {100 * fmean(others):.0f} %"


def _pruned(run: Run) -> dict[str, set[int]]:
    return {layer["name"]: set(layer["pruned"]) for layer in run.plan["layers"]} if run.plan else {}


def _validation(run: Run) -> float:
    """The last epoch's accuracy on the validation images."""
    if not run.identity["data"].get("validation_images"):
        raise DataError(
            f"{run.cell}, seed {run.seed} of {run.suite} was trained without validation images"
        )
    if run.identity["model"].get("weights"):
        raise DataError(
            f"{run.cell}, seed {run.seed} of {run.suite} starts from weights that may have seen its validation images"
        )
    return float(run.metrics["eval/top1"].iloc[-1])


def study_markdown(study: Study) -> str:
    rows, notes = findings(study)
    tables = [rows, effect_rows(study)] if study.effects else [rows]
    parts = [table.to_markdown(index=False, disable_numparse=True) for table in tables]
    return (
        "\n\n".join([f"# {study.suite.title}", *parts, "\n".join(f"- {note}" for note in notes)])
        + "\n"
    )


def write_findings(suites: Iterable[PlannedSuite], runs: Sequence[Run], out: Path) -> list[Path]:
    """Write <suite>_findings.md of each suite that has a reference."""
    written = []
    for suite in suites:
        if suite.reference is not None:
            written.append(out / f"{suite.name}_findings.md")
            written[-1].write_text(study_markdown(compare(suite, runs)), encoding="utf-8")
    return written


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite")
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS)
    options = parser.parse_args(arguments)
    with plain_exits():
        suite = plan_suite(read_suite(options.suite))
        print(study_markdown(compare(suite, read_runs(options.folder))))


if __name__ == "__main__":
    main(sys.argv[1:])
