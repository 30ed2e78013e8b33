"""A suite's runs, a line each."""

from collections import Counter

from experiments.runs.folder import State
from experiments.suites.runs import SuiteRuns


def print_plan(runs: SuiteRuns) -> None:
    """One line per run: its folder, or why there is none."""
    runs.refuse_twins()
    for run in runs.chosen:
        place = run.refusal or run.record.folder
        print(f"{run.index:3} {run.cell.name:40} seed {run.seed:2}  {place}")


def print_status(runs: SuiteRuns) -> None:
    """One line per run, and how many stand where."""
    runs.refuse_twins()
    states = [run.state for run in runs.chosen]
    for run, state in zip(runs.chosen, states, strict=True):
        said = ": ".join(filter(None, (state, run.reason)))
        print(f"{run.index:3} {run.cell.name:40} seed {run.seed:2}  {said}")
    counts = Counter(states)
    numbers = ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])
    print(f"{runs.suite.name}: {numbers}")
