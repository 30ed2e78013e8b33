"""The runs of a suite: their commands, their folders, and where each of them stands."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property

from experiments.configuration import compose
from experiments.exits import one_sentence
from experiments.runs.done import read_done
from experiments.runs.files import DataError
from experiments.runs.folder import Record, State
from experiments.runs.identity import config_hash
from experiments.runs.summary import read_summary
from experiments.schema import Config, ThinPlanConfig
from experiments.suites.spec import SET_BY_SUITE, Cell, Suite, read_suite
from psap_core import InputError


@dataclass(frozen=True, eq=False)
class SuiteRuns:
    """The runs of a suite, as a command line wants them.

    Attributes:
        source: what the suite was asked for by.
        extra: overrides that hold for every run.
        pattern, seeds: whose cells and which seeds are `chosen`; indices count all of them.
    """

    suite: Suite
    source: str
    extra: tuple[str, ...]
    pattern: str
    seeds: tuple[int, ...]

    @cached_property
    def all(self) -> list["SuiteRun"]:
        """In the order of their index."""
        pairs = [(cell, seed) for cell in self.suite.cells for seed in self.suite.seeds]
        return [SuiteRun(self, index, cell, seed) for index, (cell, seed) in enumerate(pairs)]

    @cached_property
    def by_place(self) -> dict[tuple[str, int], "SuiteRun"]:
        """By cell and seed."""
        return {(run.cell.name, run.seed): run for run in self.all}

    @cache  # noqa: B019  (a process has few suites)
    def config_of(self, cell: Cell) -> Config:
        """A cell's configuration with its first seed."""
        first = self.by_place[cell.name, self.suite.seeds[0]]
        config: Config = compose("train", first.overrides)
        return config

    @cache  # noqa: B019
    def hash_of(self, cell: Cell) -> str:
        """The hash of a cell's runs, which no seed changes.

        Raises:
            InputError: weights or images that it is taken over are missing.
        """
        return config_hash(self.by_place[cell.name, self.suite.seeds[0]].config)

    def refuse_twins(self) -> None:
        """Raise InputError where two cells describe the same run in other words."""
        cells: dict[str, str] = {}
        chosen = {run.cell.name for run in self.chosen}
        for cell in self.suite.cells:
            if cell.name not in chosen:
                continue
            try:
                digest = self.hash_of(cell)
            except InputError:
                continue  # its runs say why
            if digest in cells:
                raise InputError(
                    f"{self.source}: cells {cells[digest]!r} and {cell.name!r} train the same: leave one out"
                )
            cells[digest] = cell.name

    @property
    def chosen(self) -> list["SuiteRun"]:
        """The runs that a person wants to see or to launch."""
        return [
            run
            for run in self.all
            if fnmatchcase(run.cell.name, self.pattern) and run.seed in self.seeds
        ]

    def choose(self, pattern: str, seeds: str | None) -> "SuiteRuns":
        """With other `chosen` runs; `seeds` as in 0,1. Raises InputError if there are no such ones."""
        name = self.suite.name
        known = {str(seed): seed for seed in self.suite.seeds}
        wanted = [*known] if seeds is None else seeds.split(",")
        if unknown := [seed for seed in wanted if seed not in known]:
            raise InputError(
                f"--seeds={seeds}: the seeds of {name} are {','.join(known)}, not {unknown[0]!r}"
            )
        runs = replace(self, pattern=pattern, seeds=tuple(known[seed] for seed in wanted))
        if not runs.chosen:
            raise InputError(
                f"--cells={pattern!r} fits no cell of {name}: `plan {self.source}` lists them"
            )
        return runs

    def __getitem__(self, index: int) -> "SuiteRun":
        """One run. Raises InputError if the index is out of range."""
        if not 0 <= index < len(self.all):
            raise InputError(
                f"run {index} does not exist: the suite has runs 0 to {len(self.all) - 1}"
            )
        return self.all[index]


@dataclass(frozen=True)
class SuiteRun:
    """One cell with one seed."""

    runs: SuiteRuns
    index: int
    cell: Cell
    seed: int

    def __str__(self) -> str:
        return f"{self.cell.name}, seed {self.seed}"

    @property
    def plan_of(self) -> "SuiteRun | None":
        """The run whose architecture this one trains."""
        if self.cell.plan_of is None:
            return None
        return self.runs.by_place[self.cell.plan_of, self.seed]

    @cached_property
    def overrides(self) -> list[str]:
        """Those of its training command."""
        own = [f"experiment={self.cell.recipe}", *self.cell.overrides, f"seed={self.seed}"]
        if self.plan_of is not None:
            own.append(f"method.run={self.plan_of.record.folder}")
        place = [f"suite='{self.runs.suite.name}'", f"cell='{self.cell.name}'"]
        return [*own, *place, *self.runs.extra]

    @cached_property
    def record(self) -> Record:
        if any("${" in override for override in self.overrides):
            return Record(self.config)
        return Record(self.config, self.runs.hash_of(self.cell))

    @cached_property
    def config(self) -> Config:
        """That of its training command; composing it anew for every seed would take long."""
        if any("${" in override for override in self.overrides):  # which may follow the seed
            own: Config = compose("train", self.overrides)
            return own
        first = self.runs.config_of(self.cell)
        method = first.method
        if self.plan_of is not None and isinstance(method, ThinPlanConfig):
            method = replace(method, run=str(self.plan_of.record.folder))
        return replace(first, seed=self.seed, method=method)

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
    def damage(self) -> str | None:
        """Which file in its folder is damaged; None: none is."""
        try:
            record = self.record
        except DataError as error:
            return str(error)
        except InputError:  # see `refusal`
            return None
        if not record.done:
            return None
        try:
            read_done(record.folder)
            read_summary(record.folder)
        except (InputError, OSError) as error:
            return one_sentence(error)
        return None

    @property
    def state(self) -> State:
        """Where the run stands."""
        if self.damage is not None:
            return State.damaged
        return self.record.state if self.refusal is None else State.rejected

    @property
    def reason(self) -> str:
        """Why it has failed or was refused, or for which other suite it is done; nothing in any other state."""
        if self.damage is not None:
            return self.damage
        if self.refusal is not None:
            return self.refusal
        if self.state in (State.failed, State.rejected):
            return self.record.error
        if self.counts:
            table = read_summary(self.record.folder).suite
            if table != self.runs.suite.name:
                return f"in the table of {table}, and in no other"
        return ""

    @property
    def counts(self) -> bool:
        """Is it done, and for this suite's table?"""
        return self.record.done and read_summary(self.record.folder).suite is not None


def runs_of(source: str, extra: Sequence[str] = ()) -> SuiteRuns:
    """All runs of the suite of a name or of a file; see `read_suite`."""
    suite = read_suite(source)
    for override in extra:
        key = override.partition("=")[0].lstrip("+~")
        if key in SET_BY_SUITE:
            raise InputError(f"{override}: the suite sets {key} itself; --cells and --seeds choose")
    return SuiteRuns(suite, source, tuple(extra), "*", suite.seeds)


def cell_config(cell: Cell) -> Config:
    """A cell's configuration, whatever the seed; the run whose plan it takes stays open."""
    overrides = [f"experiment={cell.recipe}", *cell.overrides, "seed=0"]
    if cell.plan_of is not None:
        overrides.append(f"method.run='{cell.plan_of}'")
    config: Config = compose("train", overrides)
    return config
