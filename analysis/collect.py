"""Recording finished runs: what tables and figures need of them, in a handful of files a suite.

python -m analysis.collect RUNS_DIR [--results FOLDER | --record]
    records every finished run of a suite below RUNS_DIR, in results/recorded or FOLDER, or with --record in the
    repository's analysis/recorded; what is recorded is never overwritten
python -m analysis.collect RUNS_DIR --tidy OUT.csv
    records nothing; writes one row of numbers per finished run below RUNS_DIR, of suites or not
"""

import argparse
import fcntl
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from analysis.recorded import DERIVED, read_results, read_suite_runs, suite_files, write_suite
from analysis.results import OWN, RESULTS, NotFinishedError, Run, scan, tidy
from experiments.exits import plain_exits
from experiments.runs.files import DataError

# Suites that had another name when runs of them were trained.
RENAMED = {
    "small_table": "cifar16_comparison",
    "small_study": "cifar16_study",
    "small_defaults": "cifar16_defaults",
    "short_table": "cifar10_short_comparison",
    "demo_table": "digits_demo",
}


def read_runs(root: Path, *, pulses: bool = False) -> list[Run]:
    """All runs below a folder: recorded suites, or finished runs in the order of suite, cell, seed and path.

    Of recorded suites, pulses only where they are asked for. Runs that have not finished are left out; a line on
    stderr says how many. Raises DataError if there is no such folder or a finished run is damaged.
    """
    if (root / "runs.csv").is_file():
        return read_suite_runs(root, pulses=pulses)
    if any(root.glob("*/runs.csv")):
        return read_results(root, pulses=pulses)
    runs, errors = scan(root)
    for error in errors:
        if not isinstance(error, NotFinishedError):
            raise error
    if errors:
        others = f", and {len(errors) - 1} more" if len(errors) > 1 else ""
        print(f"left out: {errors[0]}{others}", file=sys.stderr)
    return [renamed(run) for run in runs.values()]


def renamed(run: Run) -> Run:
    """The run with its suite's name of today."""
    suite = RENAMED.get(str(run.suite), run.suite)
    return replace(run, summary=replace(run.summary, suite=suite))


def record(runs_dir: Path, results: Path) -> tuple[list[Run], list[str]]:
    """Record every finished run of a suite below `runs_dir` in results/<suite>.

    Returns the recorded runs, those that were recorded before among them, and what was left out and why.

    Raises:
        DataError: another run is recorded in a run's place, or two runs have the same; nothing is written then.
    """
    with _alone_in(results):
        return _record(runs_dir, results)


def _record(runs_dir: Path, results: Path) -> tuple[list[Run], list[str]]:
    runs_by_folder, errors = scan(runs_dir)
    left_out = [str(error) for error in errors]
    of_suites: dict[str, dict[Path, Run]] = defaultdict(dict)
    for folder, run in runs_by_folder.items():
        if run.suite is None or run.cell is None:
            left_out.append(f"{folder} belongs to no suite")
        else:
            run = renamed(run)
            of_suites[str(run.suite)][folder] = run
    merged = {suite: _merged(results / suite, runs) for suite, runs in of_suites.items()}
    for suite, all_runs in merged.items():
        write_suite(results / suite, all_runs)
    return [run for runs in of_suites.values() for run in runs.values()], left_out


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """While another process records there, this one waits: both read what is recorded, and add to it."""
    existed = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
        if not existed:
            with suppress(OSError):
                folder.rmdir()  # if nothing was recorded


def _merged(place: Path, new: dict[Path, Run]) -> list[Run]:
    """What is recorded already, and what is new."""
    known = read_suite_runs(place, pulses=True) if (place / "runs.csv").is_file() else []
    merged = {(run.cell, run.seed): run for run in known}
    sources: dict[tuple[str | None, int], Path] = {}
    for folder, run in new.items():
        key = run.cell, run.seed
        if key in merged and not _same(merged[key], run):
            if key in sources:
                raise DataError(
                    f"{sources[key]} and {folder} are different runs of the same suite, cell and seed: move one away"
                )
            raise DataError(
                f"{place} records another run of {run.cell}, seed {run.seed}, than {folder}: move that away, nothing "
                "is overwritten"
            )
        if key not in merged or key in sources:
            merged[key] = run
        sources[key] = folder
    _refuse_two_configurations(place, merged.values())
    return list(merged.values())


def _refuse_two_configurations(place: Path, runs: Iterable[Run]) -> None:
    """A cell is one configuration: a run with an override of its own is of no cell."""
    hashes: dict[str | None, str] = {}
    for run in runs:
        digest = hashes.setdefault(run.cell, run.summary.config_hash)
        if digest != run.summary.config_hash:
            raise DataError(
                f"{place.name}, cell {run.cell}: runs are of two configurations, {digest} and "
                f"{run.summary.config_hash}: move those away that the suite does not train"
            )


def _same(one: Run, other: Run) -> bool:
    """Would both be recorded alike, whether or not their pulses are kept, and in whatever order their metrics?

    A column that some runs lack is read back as floats, so whole numbers are compared as floats.
    """
    comparable = []
    for run in (one, other):
        kept = [name for name in run.metrics if not name.startswith(DERIVED)]
        metrics = run.metrics[sorted(kept)].astype(float)
        comparable.append(replace(run, metrics=metrics, pulses=run.pulses.iloc[:0]))
    ours, theirs = (suite_files([run]) for run in comparable)
    return ours == theirs


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs_dir", type=Path)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--results", type=Path, default=OWN / "recorded", metavar="FOLDER")
    place.add_argument("--record", action="store_true", help="into the repository")
    parser.add_argument("--tidy", type=Path, metavar="OUT.csv")
    options = parser.parse_args(arguments)
    with plain_exits():
        if options.tidy:
            tidy(read_runs(options.runs_dir)).to_csv(options.tidy, index=False)
            return
        results = RESULTS if options.record else options.results
        recorded, left_out = record(options.runs_dir, results)
        if not recorded:
            first = f": {left_out[0]} ({len(left_out)} left out)" if left_out else ""
            raise DataError(f"{options.runs_dir} holds no finished run of a suite{first}")
    for run in recorded:
        print(f"recorded: {run.suite}, {run.cell}, seed {run.seed}")
    print(f"in {results}")
    for why in left_out:
        print(f"left out: {why}")


if __name__ == "__main__":
    main(sys.argv[1:])
