"""A suite's runs as lines for a person."""

from collections import Counter

from experiments.runs.folder import State
from experiments.suites.spec import Suite


def print_plan(suite: Suite) -> None:
    """One line per run: its folder, or why there is none."""
    for run in suite.chosen:
        place = run.refusal or run.record.folder
        print(f"{run.index:3} {run.cell.name:40} seed {run.seed:2}  {place}")


def print_status(suite: Suite) -> None:
    """One line per run, and how many stand where."""
    states = [run.state for run in suite.chosen]
    for run, state in zip(suite.chosen, states, strict=True):
        said = ": ".join(filter(None, (state, run.reason)))
        print(f"{run.index:3} {run.cell.name:40} seed {run.seed:2}  {said}")
    counts = Counter(states)
    numbers = ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])
    print(f"{suite.name}: {numbers}")
