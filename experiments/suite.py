"""Many runs as one experiment: a suite is a list of cells, each a recipe and overrides, times seeds.

`python -m experiments.suite list <suite>`            its runs: index, cell, seed, where each stands
`python -m experiments.suite show <suite> <index>`    the training command's overrides of one run, one a line
`python -m experiments.suite run <suite> <index>`     train one run, here

A suite is a name in experiments/suites, or a path of such a file. Overrides after these arguments hold for
every run. The index counts the seeds of the first cell, then those of the second.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from experiments.harness.entry import compose, plain_exits
from experiments.harness.record import Record, read_summary
from psap_core import InputError

SUITES = Path(__file__).parent / "suites"


@dataclass(frozen=True)
class Cell:
    """One row of a table: a recipe of conf/experiment, and overrides (the method among them)."""

    name: str
    recipe: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Suite:
    """Cells times seeds."""

    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]

    @property
    def runs(self) -> list[tuple[Cell, int]]:
        """All runs, each a cell and a seed, in the order of their index."""
        return [(cell, seed) for cell in self.cells for seed in self.seeds]


def read_suite(name: str) -> Suite:
    """The suite of a name or of a file.

    Raises:
        InputError: there is no such suite, or its file is not one.
    """
    path = Path(name) if name.endswith(".yaml") else SUITES / f"{name}.yaml"
    try:
        content: Any = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in SUITES.glob("*.yaml")))
        raise InputError(f"there is no suite {name!r}: it must be one of {known}, or the path of a file") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is no suite: {' '.join(str(error).split())}") from error
    try:
        cells = tuple(_cell(entry) for entry in content.pop("cells"))
        suite = Suite(cells, tuple(content.pop("seeds")))
        if content or not all(type(seed) is int for seed in suite.seeds) or not suite.runs:
            raise ValueError("it has `seeds`, a list of integers, and `cells`, each at least one, and nothing else")
        if len({cell.name for cell in cells}) < len(cells) or len(set(suite.seeds)) < len(suite.seeds):
            raise ValueError("a cell or a seed stands there twice")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no suite: {error}") from error
    return suite


def _cell(entry: Any) -> Cell:
    if {*entry} != {field.name for field in fields(Cell)}:
        raise ValueError(f"a cell has name, recipe and overrides, not {sorted(entry)}")
    return Cell(entry["name"], entry["recipe"], tuple(map(str, entry["overrides"])))


def overrides(suite: Suite, index: int, extra: Sequence[str] = ()) -> list[str]:
    """The training overrides of one run.

    Raises:
        InputError: the index is out of range.
    """
    if not 0 <= index < len(suite.runs):
        raise InputError(f"run {index} does not exist: the suite has runs 0 to {len(suite.runs) - 1}")
    cell, seed = suite.runs[index]
    return [f"experiment={cell.recipe}", *cell.overrides, f"seed={seed}", *extra]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("list", "show", "run"):
        command = commands.add_parser(name)
        command.add_argument("suite")
        if name != "list":
            command.add_argument("index", type=int)
        command.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    with plain_exits():
        suite = read_suite(given.suite)
        if given.command == "list":
            for index, (cell, seed) in enumerate(suite.runs):
                state = Record(compose("train", overrides(suite, index, given.overrides))).state
                print(f"{index:3} {cell.name:40} seed {seed:2}  {state.value}")
        elif given.command == "show":
            print("\n".join(overrides(suite, given.index, given.overrides)))
        else:
            from experiments import train  # the others need none of what it imports

            print(json.dumps(read_summary(train.run(overrides(suite, given.index, given.overrides)))))


if __name__ == "__main__":
    main()
