"""Many runs as one experiment: a suite is a list of cells, each a recipe and overrides, times seeds."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from experiments.configuration import compose
from experiments.runs.folder import Record, State
from experiments.runs.summary import read_summary
from psap_core import InputError

SUITES = Path(__file__).parents[1] / "conf" / "suite"


@dataclass(frozen=True)
class Cell:
    """One row of a table: a recipe of conf/experiment, and overrides (the method among them).

    `plan_of` names the cell whose exported architecture a thin_plan cell trains, seed by seed; `against` the one that
    a study compares this one with, where that is not the suite's reference. In a suite's file a cell may have a `goal`,
    the mean top-1 that is aimed at, too; only `analysis` reads it.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    plan_of: str | None = None
    against: str | None = None


@dataclass(frozen=True)
class Suite:
    """Cells times seeds.

    Attributes:
        source: what it was asked for by.
        extra: overrides that hold for every run.
        pattern, some_seeds: whose cells and which seeds are `chosen`; indices and tables know all of them.
    """

    source: str
    title: str
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    extra: tuple[str, ...] = ()
    pattern: str = "*"
    some_seeds: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return Path(self.source).stem

    @cached_property
    def runs(self) -> list["SuiteRun"]:
        """All runs, in the order of their index."""
        pairs = [(cell, seed) for cell in self.cells for seed in self.seeds]
        return [SuiteRun(self, index, cell, seed) for index, (cell, seed) in enumerate(pairs)]

    @property
    def chosen(self) -> list["SuiteRun"]:
        """The runs that a person wants to see or to launch."""
        seeds = self.seeds if self.some_seeds is None else self.some_seeds
        return [
            run
            for run in self.runs
            if fnmatchcase(run.cell.name, self.pattern) and run.seed in seeds
        ]

    def choose(self, pattern: str, seeds: str | None) -> "Suite":
        """The suite with other `chosen` runs; `seeds` as in 0,1. Raises InputError if there are no such ones."""
        known = {str(seed): seed for seed in self.seeds}
        wanted = [*known] if seeds is None else seeds.split(",")
        if unknown := [seed for seed in wanted if seed not in known]:
            raise InputError(
                f"--seeds={seeds}: the seeds of {self.name} are {','.join(known)}, not {unknown[0]!r}"
            )
        suite = replace(self, pattern=pattern, some_seeds=tuple(known[seed] for seed in wanted))
        if not suite.chosen:
            raise InputError(
                f"--cells={pattern!r} fits no cell of {self.name}: `plan {self.source}` lists them"
            )
        return suite

    def run(self, index: int) -> "SuiteRun":
        """One run. Raises InputError if the index is out of range."""
        if not 0 <= index < len(self.runs):
            raise InputError(
                f"run {index} does not exist: the suite has runs 0 to {len(self.runs) - 1}"
            )
        return self.runs[index]


@dataclass(frozen=True)
class SuiteRun:
    """One cell with one seed."""

    suite: Suite
    index: int
    cell: Cell
    seed: int

    def __str__(self) -> str:
        return f"{self.cell.name}, seed {self.seed}"

    @property
    def plan_of(self) -> "SuiteRun | None":
        """The run whose architecture this one trains."""
        found = [
            run
            for run in self.suite.runs
            if (run.cell.name, run.seed) == (self.cell.plan_of, self.seed)
        ]
        return found[0] if found else None

    @cached_property
    def overrides(self) -> list[str]:
        """Those of its training command."""
        own = [f"experiment={self.cell.recipe}", *self.cell.overrides, f"seed={self.seed}"]
        if self.plan_of is not None:
            own.append(f"method.run={self.plan_of.record.folder}")
        return [*own, f"suite={self.suite.name}", f"cell='{self.cell.name}'", *self.suite.extra]

    @cached_property
    def record(self) -> Record:
        return Record(self.config)

    @cached_property
    def config(self) -> Any:
        return compose("train", self.overrides)

    @cached_property
    def refusal(self) -> str | None:
        """Why the run cannot even be looked for, as without the weights that it starts from; None: it can.

        Raises:
            InputError: there is no such configuration.
        """
        if self.plan_of is not None and self.plan_of.refusal is not None:
            return self.plan_of.refusal
        _ = self.config
        try:
            _ = self.record
        except InputError as error:
            return str(error)
        return None

    @property
    def state(self) -> State:
        """Where the run stands."""
        return self.record.state if self.refusal is None else State.refused

    @property
    def reason(self) -> str:
        """Why it has failed or was refused, or for which other suite it is done; nothing in any other state."""
        if self.refusal is not None:
            return self.refusal
        if self.state in (State.failed, State.refused):
            return self.record.error
        if self.counts and (other := read_summary(self.record.folder)["suite"]) != self.suite.name:
            return f"in the table of {other}, and in no other"
        return ""

    @property
    def counts(self) -> bool:
        """Is it done, and for this suite's table?"""
        return self.record.done and read_summary(self.record.folder).get("suite") is not None


def read_suite(name: str, extra: Sequence[str] = ()) -> Suite:
    """The suite of a name or of a file.

    Raises:
        InputError: there is no such suite, or its file is not one.
    """
    path = Path(name) if name.endswith(".yaml") else SUITES / f"{name}.yaml"
    try:
        content: Any = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        known = ", ".join(sorted(file.stem for file in SUITES.glob("*.yaml")))
        raise InputError(
            f"there is no suite {name!r}: it must be one of {known}, or the path of a file"
        ) from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} is no suite: {' '.join(str(error).split())}") from error
    try:
        cells = tuple(_cell(entry) for entry in content.pop("cells"))
        suite = Suite(name, content.pop("title"), cells, tuple(content.pop("seeds")), tuple(extra))
        names = {None, *(cell.name for cell in cells)}
        effects = list(content.pop("effects", {}).values())
        if not all(
            pairs and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
            for pairs in effects
        ):
            raise ValueError(
                "an effect has pairs of cells, the first less the second, at least one"
            )
        paired = {name for pairs in effects for pair in pairs for name in pair}
        reference = content.pop("reference", None)
        if not {reference, *(cell.against for cell in cells), *paired} <= names or (
            paired and reference is None
        ):
            raise ValueError(
                "its `reference`, what a cell is `against`, or what an effect compares, is no cell"
            )
        if content or not all(type(seed) is int for seed in suite.seeds) or not suite.runs:
            raise ValueError(
                "it has a `title`, `seeds`, a list of integers, `cells`, each at least one, perhaps a `reference` and "
                "`effects`, and nothing else"
            )
        counts = Counter([*(cell.name for cell in cells), *suite.seeds])
        if twice := [what for what, number in counts.items() if number > 1]:
            raise ValueError(f"{twice[0]!r} stands there twice")
        _refuse_contradictions(cells)
    except KeyError as error:
        raise InputError(f"{path} is no suite: it has no {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no suite: {error}") from error
    return suite


def _refuse_contradictions(cells: Sequence[Cell]) -> None:
    plans_of = {cell.name: cell.plan_of for cell in cells}
    for cell in cells:
        if cell.plan_of is not None and plans_of.get(cell.plan_of, "none") is not None:
            raise ValueError(
                f"cell {cell.name!r} takes its plan from {cell.plan_of!r}, which is no cell or takes one itself"
            )
        twins = [other.name for other in cells if content(other) == content(cell)]
        if len(twins) > 1:
            raise ValueError(f"cells {twins[0]!r} and {twins[1]!r} train the same")


def content(cell: Cell) -> tuple[object, ...]:
    """What a cell trains, whatever its name."""
    return cell.recipe, sorted(cell.overrides), cell.plan_of


def _cell(entry: Any) -> Cell:
    needed = {"name", "recipe", "overrides"}
    if not needed <= {*entry} <= needed | {"plan_of", "against", "goal"}:
        raise ValueError(
            f"a cell has name, recipe, overrides and perhaps plan_of, against and goal, not {sorted(entry)}"
        )
    if not re.fullmatch(r"[\w%.-]+( [\w%.-]+)*", entry["name"]):
        raise ValueError(
            f"the cell's name {entry['name']!r} must be words of letters, digits, _ % . and -"
        )
    overrides = tuple(map(str, entry["overrides"]))
    return Cell(
        entry["name"], entry["recipe"], overrides, entry.get("plan_of"), entry.get("against")
    )
