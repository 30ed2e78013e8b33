"""What a suite's file says: cells, each a recipe and overrides, times seeds; the one reader of such files."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.runs.checks import plain_name
from experiments.runs.files import parse_yaml
from psap_core import InputError
from psap_core.files import read_plain

SUITES = Path(__file__).parent
CELL_KEYS = {"name", "recipe", "overrides"}
MORE_CELL_KEYS = {"plan_of", "against", "goal"}
SUITE_KEYS = {"title", "seeds", "cells"}
MORE_SUITE_KEYS = {"reference", "effects"}
SET_BY_SUITE = {"experiment", "seed", "suite", "cell"}


@dataclass(frozen=True)
class Cell:
    """One row of a table: a recipe of conf/experiment, and overrides (the method among them).

    Attributes:
        plan_of: the cell whose exported architecture a thin_plan cell trains, seed by seed.
        against: the cell that a study compares this one with.
        goal: the mean top-1 in percent that is aimed at.
    """

    name: str
    recipe: str
    overrides: tuple[str, ...]
    plan_of: str | None = None
    against: str | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Suite:
    """Cells times seeds.

    Attributes:
        name: its file's, without the suffix.
        reference: the cell that a study compares all others with.
        effects: by name, the pairs of cells of which a study averages the first minus the second.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    reference: str | None = None
    effects: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)

    def cell(self, name: str) -> Cell:
        """The cell of that name."""
        return next(cell for cell in self.cells if cell.name == name)


def suite_names() -> list[str]:
    """Those of the suites that come with the project."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def read_suite(name: str) -> Suite:
    """The suite of a name, or of a file whose path ends in .yaml.

    Raises:
        InputError: there is no such suite, or its file is not one.
    """
    path = Path(name) if name.endswith(".yaml") else SUITES / f"{name}.yaml"
    try:
        content = parse_yaml(read_plain(path))
    except FileNotFoundError as error:
        raise InputError(
            f"there is no suite {name!r}: it must be one of {', '.join(suite_names())}, or the path of a file"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is no suite: {error}") from error
    try:
        suite = _suite(path.stem, content)
        _check(suite)
    except (AttributeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no suite: {error}") from error
    return suite


def _suite(name: str, content: Any) -> Suite:
    if not isinstance(content, dict):
        raise ValueError("it has title, seeds and cells; a suite of the project shows how")
    keys = {*content}
    if not SUITE_KEYS <= keys <= SUITE_KEYS | MORE_SUITE_KEYS:
        raise ValueError(
            f"it has {', '.join(sorted(SUITE_KEYS))}, perhaps {' and '.join(sorted(MORE_SUITE_KEYS))}, and nothing "
            f"else, not {', '.join(sorted(map(str, keys)))}"
        )
    if not isinstance(content["title"], str):
        raise ValueError(f"its title is a text, not {content['title']!r}")
    for key, example in (
        ("seeds", "[0, 1]"),
        ("cells", "[{name: ..., recipe: ..., overrides: [...]}]"),
    ):
        if not isinstance(content[key], list):
            raise ValueError(f"its {key} are a list like {example}, not {content[key]!r:.60}")
    if not isinstance(content.get("effects", {}), dict):
        raise ValueError(f"its effects are named pairs of cells, not {content['effects']!r:.60}")
    reference = content.get("reference")
    cells = tuple(_cell(entry, reference) for entry in content["cells"])
    effects = {
        effect: [_pair(pair) for pair in pairs]
        for effect, pairs in content.get("effects", {}).items()
    }
    return Suite(name, content["title"], cells, tuple(content["seeds"]), reference, effects)


def _cell(entry: Any, reference: str | None) -> Cell:
    if not isinstance(entry, dict) or not CELL_KEYS <= {*entry} <= CELL_KEYS | MORE_CELL_KEYS:
        wrong = f"{entry!r:.100}"
        if isinstance(entry, dict):
            odd = [str(key) for key in entry if key not in CELL_KEYS | MORE_CELL_KEYS]
            if odd:
                wrong = ", ".join(odd)
        raise ValueError(
            f"a cell has name, recipe, overrides and perhaps plan_of, against and goal, not {wrong}"
        )
    name = entry["name"]
    if not isinstance(entry["recipe"], str):
        raise ValueError(f"the recipe of cell {name!r} is a name, not {entry['recipe']!r}")
    if not isinstance(entry["overrides"], list):
        raise ValueError(
            f"the overrides of cell {name!r} are a list like [method=sfp], not {entry['overrides']!r}"
        )
    for override in entry["overrides"]:
        _check_override(name, override)
    if not plain_name(name):
        raise ValueError(
            f"the cell's name {name!r} must be words of letters, digits, _ % . + and -"
        )
    against = None if name == reference else entry.get("against", reference)
    overrides = tuple(entry["overrides"])
    return Cell(name, entry["recipe"], overrides, entry.get("plan_of"), against, entry.get("goal"))


def _check_override(cell: Any, override: Any) -> None:
    if not isinstance(override, str) or "=" not in override:
        raise ValueError(f"an override of cell {cell!r} is key=value, not {override!r}")
    key = override.partition("=")[0].lstrip("+~")
    if key in SET_BY_SUITE:
        raise ValueError(f"cell {cell!r} sets {key}, which the suite sets itself")


def _pair(pair: Any) -> tuple[str, str]:
    if not isinstance(pair, list) or len(pair) != 2:
        raise ValueError("an effect has pairs of cells, the first less the second, at least one")
    one, other = pair
    return one, other


def _check(suite: Suite) -> None:
    """Raises ValueError where the parts of a suite do not fit together."""
    if not plain_name(suite.name):
        raise ValueError(
            f"its file's name, {suite.name!r}, must be words of letters, digits, _ % . + and -"
        )
    if not suite.cells or not suite.seeds:
        raise ValueError("it needs at least one cell and one seed")
    for seed in suite.seeds:
        if type(seed) is not int:
            raise ValueError(f"a seed is an integer, not {seed!r}")
    counts = Counter[object]([*(cell.name for cell in suite.cells), *suite.seeds])
    for what, number in counts.items():
        if number > 1:
            raise ValueError(f"{what!r} stands there twice")
    _check_comparisons(suite)
    for cell in suite.cells:
        _check_cell(suite, cell)


def _check_comparisons(suite: Suite) -> None:
    names = {cell.name for cell in suite.cells}
    for name in _compared(suite):
        if name not in names:
            raise ValueError(f"{name!r}, which it compares, is no cell")
    if not all(suite.effects.values()):
        raise ValueError("an effect has pairs of cells, the first less the second, at least one")
    if suite.effects and suite.reference is None:
        raise ValueError("a suite with effects needs a reference")


def _compared(suite: Suite) -> Iterator[str]:
    """Names of all cells that something is compared with."""
    if suite.reference is not None:
        yield suite.reference
    for cell in suite.cells:
        if cell.against is not None:
            yield cell.against
    for pairs in suite.effects.values():
        for pair in pairs:
            yield from pair


def _check_cell(suite: Suite, cell: Cell) -> None:
    plans_of = {other.name: other.plan_of for other in suite.cells}
    if cell.plan_of is not None and plans_of.get(cell.plan_of, "none") is not None:
        raise ValueError(
            f"cell {cell.name!r} takes its plan from {cell.plan_of!r}, which is no cell or takes one itself"
        )
    twins = [other.name for other in suite.cells if trained(other) == trained(cell)]
    if len(twins) > 1:
        raise ValueError(f"cells {twins[0]!r} and {twins[1]!r} train the same")
    if cell.goal is not None and (type(cell.goal) not in (int, float) or not 1 < cell.goal <= 100):
        raise ValueError(f"the goal of cell {cell.name!r}, {cell.goal!r}, is no top-1 in percent")


def trained(cell: Cell) -> tuple[object, ...]:
    """What a cell trains, whatever its name."""
    return cell.recipe, sorted(cell.overrides), cell.plan_of
