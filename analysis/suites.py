"""Suites as tables and figures see them: what each cell trains, and which runs are its."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from analysis.recorded import read_suite_runs
from analysis.results import RESULTS, Run
from experiments.runs.files import DataError
from experiments.runs.identity import digest, settings
from experiments.suites.method_styles import method_styles
from experiments.suites.runs import cell_config
from experiments.suites.spec import Cell, Suite, read_suite, suite_names

DATASETS = {
    "cifar10": "CIFAR-10",
    "imagenet": "ImageNet",
    "imagenette": "Imagenette",
    "digits": "handwritten digits",
}
MODELS = {"vgg16_bn": "VGG-16", "mobilenet_v2": "MobileNetV2"}  # and resnet<depth>
PUBLISHED_PIXELS = {"cifar10": 32, "imagenet": 224}  # what published figures are about
SCOPES = ("coupled", "all", "inner")  # in a table, a later one is compared with an earlier one


@dataclass(frozen=True)
class Setting:
    """What a configuration trains, as far as tables compare it."""

    dataset: str
    image_size: int  # pixels
    train_images: int | None  # None: all
    model: str
    width: float
    pretrained: bool
    method: str
    target: float | None  # share of the MACs to remove; None: the method is given none
    epochs: int

    @property
    def dataset_title(self) -> str:
        """The data set as the literature calls it."""
        return DATASETS.get(self.dataset, self.dataset)

    @property
    def model_title(self) -> str:
        """The network as the literature calls it."""
        return MODELS.get(self.model, re.sub(r"^resnet(\d+)$", r"ResNet-\1", self.model))

    @property
    def network_title(self) -> str:
        """The network, and its width where that is not the literature's."""
        return self.model_title + ("" if self.width == 1 else f" of width {self.width:g}")

    @property
    def start(self) -> str:
        return "pretrained" if self.pretrained else "from scratch"

    @property
    def full_size(self) -> bool:
        """Whether published figures are comparable: all images in their size, a network of full width."""
        pixels = PUBLISHED_PIXELS.get(self.dataset)
        return self.image_size == pixels and self.train_images is None and self.width == 1


@dataclass(frozen=True)
class PlannedCell:
    """One row of a table, and what it trains.

    Attributes:
        target: share of the MACs to remove; of a network of another cell's plan, that cell's.
        settings: what changes the result, as `experiments.runs.identity.settings` says.
        against: the cell that a study compares it with.
        goal: the mean top-1 in percent that is aimed at.
    """

    name: str
    setting: Setting
    target: float | None
    settings: Mapping[str, Any] = field(default_factory=dict)
    has_default_switches: bool = True
    against: str | None = None
    goal: float | None = None


@dataclass(frozen=True)
class PlannedSuite:
    """A suite whose cells' configurations are composed; see `experiments.suites.spec.Suite`."""

    name: str
    title: str
    seeds: tuple[int, ...]
    cells: tuple[PlannedCell, ...]
    reference: str | None = None
    effects: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)


def setting_of(identity: Mapping[str, Any]) -> Setting:
    """The setting of a run's identity, or of a cell's settings."""
    data, model, method = identity["data"], identity["model"], identity["method"]
    return Setting(
        dataset=data["name"],
        image_size=data["image_size"],
        train_images=data.get("train_images"),
        model=model["name"],
        width=model.get("width", 1.0),
        pretrained=model.get("weights") is not None,
        method=method["name"],
        target=method.get("target_macs_cut"),
        epochs=identity["epochs"],
    )


def plan_suites() -> list[PlannedSuite]:
    """All suites that come with the project, by name."""
    return [_planned(name) for name in suite_names()]


def plan_suite(suite: Suite) -> PlannedSuite:
    """Compose every cell.

    Raises:
        InputError: there is no such configuration.
        DataError: a goal is of a cell without a target.
    """
    cell_settings = {cell.name: settings(cell_config(cell)) for cell in suite.cells}
    cells = []
    for cell in suite.cells:
        target = setting_of(cell_settings[cell.plan_of or cell.name]).target
        if cell.goal is not None and target is None:
            raise DataError(f"{suite.name}: the goal of cell {cell.name!r} is of no target")
        cells.append(
            PlannedCell(
                cell.name,
                setting_of(cell_settings[cell.name]),
                target,
                cell_settings[cell.name],
                _has_default_switches(cell),
                cell.against,
                cell.goal,
            )
        )
    return PlannedSuite(
        suite.name, suite.title, suite.seeds, tuple(cells), suite.reference, suite.effects
    )


def suites_of(runs: Iterable[Run]) -> list[tuple[PlannedSuite, list[Run]]]:
    """The suites that runs belong to, with their runs.

    Runs of no suite, or of one whose file is elsewhere, stand together where they trained alike but for the method.
    """
    of_suites: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        trained = digest({key: value for key, value in run.identity.items() if key != "method"})
        place = run.suite or run.recipe, trained
        if run.suite in suite_names():
            place = run.suite, ""
        of_suites.setdefault(place, []).append(run)
    names = Counter(name for name, _ in of_suites)
    found = []
    for (name, trained), members in of_suites.items():
        if not trained:
            found.append((_planned(name), members))
        elif names[name] == 1:
            found.append(_made_of_runs(name, members))
        else:
            found.append(_made_of_runs(f"{name}_{trained}", members))
    return found


def _made_of_runs(name: str, runs: Sequence[Run]) -> tuple[PlannedSuite, list[Run]]:
    """A suite with a cell for every configuration of the runs, and the runs under its names."""
    by_hash: dict[str, list[Run]] = {}
    for run in runs:
        by_hash.setdefault(run.summary.config_hash, []).append(run)
    labels = Counter(_label(members[0]) for members in by_hash.values())
    switches: dict[tuple[str, float | None], set[str]] = {}
    for members in by_hash.values():
        kind = members[0].method, _own_target(members[0])
        switches.setdefault(kind, set()).add(_without_scope(members[0]))
    cells, renamed = [], []
    for config_hash, members in by_hash.items():
        run, label = members[0], _label(members[0])
        if labels[label] > 1:
            label = f"{label} {config_hash}"
        cells.append(
            PlannedCell(
                label,
                setting_of(run.identity),
                _own_target(run),
                run.identity,
                has_default_switches=len(switches[run.method, _own_target(run)]) == 1,
            )
        )
        for member in members:
            summary = replace(member.summary, suite=name, cell=label)
            renamed.append(replace(member, summary=summary))
    seeds = tuple(sorted({run.seed for run in runs}))
    places = {method: place for place, method in enumerate(method_styles())}

    def order(cell: PlannedCell) -> tuple[int, int, str]:
        place = places.get(cell.setting.method, len(places))
        scope = cell.settings["method"].get("scope", "all")
        return place, SCOPES.index(scope), cell.name

    cells.sort(key=order)
    title = "runs of no suite of the project, a row a configuration"
    return PlannedSuite(name, title, seeds, tuple(cells)), renamed


def _without_scope(run: Run) -> str:
    """A digest over what the run trained, whatever its scope, and whether that made it small in training."""
    method = dict(run.identity["method"])
    method.pop("scope", None)
    method.pop("compact", None)
    return digest({**run.identity, "method": method})


def _label(run: Run) -> str:
    """Its cell, or its method and target."""
    target = _own_target(run)
    return run.cell or (run.method if target is None else f"{run.method} {100 * target:g}")


def _own_target(run: Run) -> float | None:
    """The share of the MACs to remove; of a network of another run's plan, what that removed."""
    target = setting_of(run.identity).target
    if target is None and run.method != "dense":
        return round(run.summary.macs_cut, 3)
    return target


def _has_default_switches(cell: Cell) -> bool:
    """Does the cell train its method as it is without overrides, whatever the target and the scope?"""
    for override in cell.overrides:
        key = override.partition("=")[0]
        if key.startswith("method.") and key not in ("method.target_macs_cut", "method.scope"):
            return False
    return True


def find_suite(name: str) -> PlannedSuite | None:
    """The suite of that name; None without such a file. Raises InputError if it is no suite."""
    return _planned(name) if name in suite_names() else None


@cache
def _planned(name: str) -> PlannedSuite:
    return plan_suite(read_suite(name))


def runs_of_cells(
    suite: PlannedSuite, runs: Iterable[Run]
) -> tuple[dict[str, dict[int, Run]], list[str]]:
    """The runs of each cell by seed, and what claims to be of a cell and is not.

    Raises DataError if two runs are of the same cell and seed, or the runs of a cell of different configurations.
    """
    cells = {cell.name: cell for cell in suite.cells}
    of_cells: dict[str, dict[int, Run]] = {name: {} for name in cells}
    left_out = []
    for run in runs:
        if run.suite != suite.name:
            continue
        name = f"{run.cell}, seed {run.seed}"
        if run.cell not in cells or run.seed not in suite.seeds:
            left_out.append(f"{name}: the suite has no such cell and seed")
        elif differences := _differences(run, cells[run.cell]):
            left_out.append(
                f"{name}: it was not trained as the suite says ({'; '.join(differences)})"
            )
        elif run.seed in of_cells[run.cell]:
            raise DataError(
                f"there are two runs of suite {suite.name}, cell {name}: move one of them away"
            )
        else:
            of_cells[run.cell][run.seed] = run
    for name, by_seed in of_cells.items():
        refuse_different(f"cell {name} of suite {suite.name}", by_seed.values())
    return of_cells, left_out


def _differences(run: Run, cell: PlannedCell) -> list[str]:
    """What a run's configuration has otherwise than its cell."""
    identity, wanted = _flat(run.identity), _flat(cell.settings)
    return [
        f"{key} {identity.get(key, 'not said')}, not {wanted.get(key, 'said')}"
        for key in sorted(identity.keys() | wanted.keys())
        if identity.get(key, "not said") != wanted.get(key, "said")
    ]


def _flat(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Values by their dotted keys; of weights only whether there are some, of another run nothing."""
    flat: dict[str, Any] = {}
    for section, content in identity.items():
        if isinstance(content, dict):
            flat |= {f"{section}.{key}": value for key, value in content.items()}
        else:
            flat[section] = content
    flat["model.weights"] = flat.get("model.weights") is not None
    flat.pop("method.run", None)
    return flat


def refuse_different(what: str, runs: Iterable[Run]) -> None:
    """Raise DataError if runs that are to be averaged are of different configurations."""
    seeds: dict[str, list[int]] = {}
    for run in runs:
        seeds.setdefault(run.summary.config_hash, []).append(run.seed)
    if len(seeds) > 1:
        labels = [
            f"{name} (seed{'s' * (len(of) > 1)} {', '.join(map(str, sorted(of)))})"
            for name, of in seeds.items()
        ]
        raise DataError(
            f"{what} has runs of different configurations: {' and '.join(labels)}: move those that do not belong away"
        )


def target_of(run: Run) -> float | None:
    """The share of the MACs that a run was to remove, as its suite's file says, else as its own configuration does."""
    suite = find_suite(run.suite) if run.suite else None
    targets = {cell.name: cell.target for cell in suite.cells} if suite else {}
    return targets.get(str(run.cell), setting_of(run.identity).target)


def runs_of_suite(name: str, runs: Iterable[Run]) -> tuple[list[Run], list[str]]:
    """The runs that stand in a suite's table, and what is left out and why; without a file of the suite all runs."""
    suite = find_suite(name)
    if suite is None:
        return list(runs), []
    of_cells, left_out = runs_of_cells(suite, runs)
    return [run for by_seed in of_cells.values() for run in by_seed.values()], left_out


def suite_runs(name: str, results: Path = RESULTS) -> list[Run]:
    """What is recorded of a suite, as far as it stands in its table; prints how many runs that are."""
    folder = results / name
    runs, left_out = runs_of_suite(
        name, read_suite_runs(folder, pulses=True) if folder.is_dir() else []
    )
    print(
        "\n".join([f"{name}: {len(runs)} finished runs" if runs else f"{name}: not run", *left_out])
    )
    return runs
