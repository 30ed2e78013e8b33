"""Everything that is made of recorded results and published figures.

python -m analysis.build tables       analysis/reports/tables/<suite>.{md,tex,csv}, <suite>_findings.md of studies,
                                      and the tables in README.md and docs/
python -m analysis.build figures      analysis/reports/figures
python -m analysis.build verify       each cell's accuracy beside the best comparable published one, and beside its goal
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.findings import write_findings
from analysis.pages import Sources, filled_pages
from analysis.published import read_published
from analysis.recorded import read_results
from analysis.results import RESULTS
from analysis.suites import PlannedSuite, plan_suites
from analysis.tables import Table, make_table, write_tables
from analysis.verdicts import GOALS_RULE, RULE, goals, verdicts
from experiments.exits import plain_exits
from experiments.runs.files import write_atomically

REPORTS = Path(__file__).parent / "reports"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tables", "figures", "verify"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument(
        "--out",
        type=Path,
        help="folder to write to; analysis/reports/tables or analysis/reports/figures if absent",
    )
    parser.add_argument("--pdf", action="store_true", help="figures as .pdf, too")
    options = parser.parse_args(arguments)
    out = options.out or REPORTS / options.what
    with plain_exits():
        runs = read_results(options.results, pulses=options.what == "figures")
        if options.what == "figures":
            # The others need none of what these import.
            from analysis import figures
            from analysis.figures import growth, utility

            written = figures.write_figures(runs, out, options.results, pdf=options.pdf)
            written += growth.write_growth(options.results, out / "benchmark")
            written += utility.write_pictures(options.results, out / "utility")
            print("\n".join(map(str, written)) or "no recorded run: no figure")
            return
        published = read_published()
        suites = plan_suites()
        tables = [make_table(suite, runs, published) for suite in suites]
        if options.what == "verify":
            _print_verdicts(suites, tables)
            return
        pages: dict[Path, str] = {}
        if options.out is None and options.results == RESULTS:
            by_name = {table.name: table for table in tables}
            pages = filled_pages(Sources({s.name: s for s in suites}, runs, by_name, RESULTS))
        written = [*write_tables(tables, out), *write_findings(suites, runs, out)]
        for path, text in pages.items():
            write_atomically(path, text.encode())
            written.append(path)
        print("\n".join(map(str, written)))


def _print_verdicts(suites: Sequence[PlannedSuite], tables: Sequence[Table]) -> None:
    aimed_at = map(goals, suites, tables)
    parts = []
    for frames, rule in ((map(verdicts, tables), RULE), (aimed_at, GOALS_RULE)):
        rows = pd.concat(frames)
        parts += [rows.to_markdown(index=False, tablefmt="simple", disable_numparse=True), rule]
    print("\n\n".join(parts))


if __name__ == "__main__":
    main(sys.argv[1:])
