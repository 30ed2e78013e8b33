"""Everything that is made of recorded results and published figures.

python -m analysis.build tables       <suite>.{md,tex,csv}, and <suite>_findings.md of studies
python -m analysis.build figures      pictures, a folder a suite
python -m analysis.build verify       prints how many goals are reached, and where our cells lie beside published ones

They go to results/tables and results/figures, or to --out. With --record they are the repository's own:
analysis/reports, and the tables in README.md and docs/.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.collect import read_runs
from analysis.findings import write_findings
from analysis.pages import Sources, filled_pages
from analysis.published import read_published
from analysis.results import OWN, RESULTS, Run
from analysis.suites import PlannedSuite, plan_suite, plan_suites
from analysis.tables import Table, make_table, write_tables
from analysis.verdicts import print_verdicts
from experiments.exits import plain_exits
from experiments.runs.files import DataError, write_atomically
from experiments.suites.spec import read_suite

REPORTS = Path(__file__).parent / "reports"


def main(arguments: Sequence[str]) -> None:
    options = _options(arguments)
    out = options.out or (REPORTS if options.record else OWN) / options.what
    with plain_exits():
        if options.record and options.results != RESULTS:
            raise DataError("--record builds from analysis/recorded: leave out --results")
        suites = [plan_suite(read_suite(options.suite))] if options.suite else []
        runs = read_runs(options.results, pulses=options.what == "figures")
        if options.what == "figures":
            names = {suite.name for suite in suites}
            chosen = [run for run in runs if not names or run.suite in names]
            written = _write_figures(chosen, out, options)
            print("\n".join(map(str, written)) or "no recorded run: no figure")
            return
        suites = suites or plan_suites()
        published = read_published()
        tables = [make_table(suite, runs, published) for suite in suites]
        if options.what == "verify":
            print_verdicts(suites, tables)
            return
        pages: dict[Path, str] = {}
        if options.record and not options.suite:
            pages = _pages(suites, runs, tables)
        written = [*write_tables(tables, out), *write_findings(suites, runs, out)]
        for path, text in pages.items():
            write_atomically(path, text.encode())
            written.append(path)
        print("\n".join(map(str, written)))


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tables", "figures", "verify"])
    parser.add_argument("--suite", help="only this one: a name, or the path of a suite's file")
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="of recorded results or of runs; analysis/recorded if absent",
    )
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--out", type=Path, metavar="FOLDER", help="folder to write to")
    place.add_argument(
        "--record", action="store_true", help="write the repository's own files, the pages too"
    )
    parser.add_argument("--pdf", action="store_true", help="figures as .pdf, too")
    return parser.parse_args(arguments)


def _write_figures(runs: Sequence[Run], out: Path, options: argparse.Namespace) -> list[Path]:
    """The figures of the runs' suites and, where no suite is named, of the benchmarks."""
    # Tables need none of what these import.
    from analysis import figures
    from analysis.figures import growth, utility

    written = figures.write_figures(runs, out, options.results, pdf=options.pdf)
    if not options.suite:
        written += growth.write_growth(options.results, out / "benchmark")
        written += utility.write_pictures(options.results, out / "utility")
    return written


def _pages(
    suites: Sequence[PlannedSuite], runs: Sequence[Run], tables: Sequence[Table]
) -> dict[Path, str]:
    by_name = {table.name: table for table in tables}
    return filled_pages(Sources({suite.name: suite for suite in suites}, runs, by_name, RESULTS))


if __name__ == "__main__":
    main(sys.argv[1:])
