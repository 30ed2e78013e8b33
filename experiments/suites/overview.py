"""A suite's runs, a line each."""

from collections import Counter

from experiments.runs.folder import State
from experiments.suites.runs import SuiteRun, SuiteRuns
from experiments.training.progress import epochs_written


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
        said = ": ".join(filter(None, (state, run.reason or _how_far(run, state))))
        print(f"{run.index:3} {run.cell.name:40} seed {run.seed:2}  {said}")
    counts = Counter(states)
    numbers = ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])
    print(f"{runs.suite.name}: {numbers}")


def _how_far(run: SuiteRun, state: State) -> str:
    """The epochs of a run that has begun and is not done."""
    if state not in (State.running, State.interrupted, State.incomplete):
        return ""
    return f"{epochs_written(run.record.metrics)} of {run.config.epochs} epochs"
