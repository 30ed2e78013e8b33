"""Suites as tables and figures see them: what each cell trains, read from the YAML files, and which runs are its."""

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from analysis.collect import RESULTS, DataError, Run, read_runs

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
DATASETS = {
    "cifar10": "CIFAR-10",
    "imagenet": "ImageNet",
    "imagenette": "Imagenette",
    "digits": "handwritten digits",
}
MODELS = {"vgg16_bn": "VGG-16", "mobilenet_v2": "MobileNetV2"}  # and resnet<depth>
PUBLISHED_PIXELS = {"cifar10": 32, "imagenet": 224}  # what published figures are about


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
class Cell:
    """One row of a table; for a thin network of another cell's plan, the target is that cell's.

    `config` is the whole configuration, as `compose` makes it; `against` the cell that a study compares it with;
    `goal` the mean top-1 in percent that is aimed at.
    """

    name: str
    setting: Setting
    target: float | None
    config: Mapping[str, Any] = field(default_factory=dict)
    against: str | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Suite:
    """A suite's file.

    Attributes:
        reference: the cell that a study compares all others with.
        effects: by name, the pairs of cells of which a study averages the first minus the second.
    """

    name: str
    title: str
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    reference: str | None = None
    effects: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)


def setting_of(config: Mapping[str, Any]) -> Setting:
    """The setting of a composed configuration or of a run's config.yaml."""
    data, model, method = config["data"], config["model"], config["method"]
    target = method.get("target_macs_cut")
    return Setting(
        dataset=data["name"],
        image_size=data["image_size"],
        train_images=data.get("train_images"),
        model=model["name"],
        width=model.get("width", 1.0),
        pretrained=model.get("weights") is not None,
        method=method["name"],
        target=config["target_macs_cut"] if target == "${target_macs_cut}" else target,
        epochs=config["epochs"],
    )


def read_suites(
    folder: Path = EXPERIMENTS / "conf" / "suite", conf: Path = EXPERIMENTS / "conf"
) -> list[Suite]:
    """All suites of a folder, by name. Raises DataError if a file is no suite."""
    return [read_suite(path, conf) for path in sorted(folder.glob("*.yaml"))]


def read_suite(path: Path, conf: Path = EXPERIMENTS / "conf") -> Suite:
    """A suite's file, with recipes and choices from `conf`. Raises DataError if it is no suite."""
    try:
        content = yaml.safe_load(path.read_text())
        configs = {
            entry["name"]: compose(entry["recipe"], entry["overrides"], conf)
            for entry in content["cells"]
        }
        settings = {name: setting_of(config) for name, config in configs.items()}
        plans_of = {
            entry["name"]: entry.get("plan_of", entry["name"]) for entry in content["cells"]
        }
        title, seeds, reference = (
            content.get("title", path.stem),
            tuple(content["seeds"]),
            content.get("reference"),
        )
        against = {entry["name"]: entry.get("against", reference) for entry in content["cells"]}
        if reference is not None:
            against[reference] = None
        goals = {entry["name"]: entry["goal"] for entry in content["cells"] if "goal" in entry}
        for name, goal in goals.items():
            if (
                type(goal) not in (int, float)
                or not 1 < goal <= 100
                or settings[plans_of[name]].target is None
            ):
                raise ValueError(
                    f"the goal of cell {name!r}, {goal!r}, is no top-1 in percent at a target"
                )
        cells = [
            Cell(
                name,
                settings[name],
                settings[plans_of[name]].target,
                configs[name],
                against[name],
                goals.get(name),
            )
            for name in settings
        ]
        effects = {
            name: [(one, other) for one, other in pairs]
            for name, pairs in content.get("effects", {}).items()
        }
        paired = {name for pairs in effects.values() for pair in pairs for name in pair}
        if unknown := {reference, *against.values(), *paired} - {None, *settings}:
            raise ValueError(f"{unknown.pop()!r}, which it compares, is no cell")
        if not all(effects.values()):
            raise ValueError("an effect has no pair of cells")
        return Suite(path.stem, title, seeds, tuple(cells), reference, effects)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(
            f"the suite {path} cannot be read: {' '.join(str(error).split())}"
        ) from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no suite: {type(error).__name__} {error}") from error


@cache
def find_suite(name: str) -> Suite | None:
    """The suite of that name; None without such a file. Raises DataError if it is no suite."""
    path = EXPERIMENTS / "conf" / "suite" / f"{name}.yaml"
    return read_suite(path) if path.is_file() else None


def runs_of_cells(suite: Suite, runs: Iterable[Run]) -> tuple[dict[str, dict[int, Run]], list[str]]:
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


def _differences(run: Run, cell: Cell) -> list[str]:
    """What a run's configuration has otherwise than its cell; keys that only one of them knows do not count."""
    pairs = {
        key: (value, asdict(cell.setting)[key])
        for key, value in asdict(setting_of(run.config)).items()
    }
    for section in ("data", "model", "method", "optim"):
        wanted = cell.config.get(section, {})
        known = {
            key
            for key in wanted.keys() & run.config.get(section, {}).keys()
            if not _is_open(wanted[key])
        }
        known -= {"name", *pairs}
        pairs |= {
            f"{section}.{key}": (run.config[section][key], wanted[key]) for key in sorted(known)
        }
    return [
        f"{key} {found}, not {wanted}" for key, (found, wanted) in pairs.items() if found != wanted
    ]


def _is_open(value: Any) -> bool:
    """Is it filled in when the run starts?"""
    return isinstance(value, str) and ("${" in value or value == "???")


def refuse_different(what: str, runs: Iterable[Run]) -> None:
    """Raise DataError if runs that are to be averaged are of different configurations."""
    seeds: dict[str, list[int]] = {}
    for run in runs:
        seeds.setdefault(run.summary["config_hash"], []).append(run.seed)
    if len(seeds) > 1:
        found = [
            f"{name} (seed{'s' * (len(of) > 1)} {', '.join(map(str, sorted(of)))})"
            for name, of in seeds.items()
        ]
        raise DataError(
            f"{what} has runs of different configurations: {' and '.join(found)}: move those that do not belong away"
        )


def target_of(run: Run) -> float | None:
    """The share of the MACs that a run was to remove, as its suite's file says, else as its own configuration does."""
    suite = find_suite(run.suite) if run.suite else None
    targets = {cell.name: cell.target for cell in suite.cells} if suite else {}
    return targets.get(str(run.cell), setting_of(run.config).target)


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
    runs, left_out = runs_of_suite(name, read_runs(folder) if folder.is_dir() else [])
    print(
        "\n".join([f"{name}: {len(runs)} finished runs" if runs else f"{name}: not run", *left_out])
    )
    return runs


def compose(recipe: str, overrides: list[str], conf: Path = EXPERIMENTS / "conf") -> dict[str, Any]:
    """The configuration of a recipe, with its interpolations left as they stand.

    Hydra's composition as far as this suite's files use it: defaults lists, groups, and overrides `key=value`.
    """
    config = _merge(
        _load(conf / "base.yaml", conf), _load(conf / "experiment" / f"{recipe}.yaml", conf)
    )
    pairs = [str(override).lstrip("+").partition("=")[::2] for override in overrides]
    for key, text in sorted(
        pairs, key=lambda pair: not (conf / pair[0]).is_dir()
    ):  # choices of groups first
        value = float(text) if re.fullmatch(r"[-+]?[\d.]+e[-+]?\d+", text) else yaml.safe_load(text)
        if (conf / key).is_dir():
            config[key] = _load(conf / key / f"{value}.yaml", conf)
            continue
        *sections, name = key.split(".")
        section = config
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = value
    return config


def has_default_switches(cell: Cell, conf: Path = EXPERIMENTS / "conf") -> bool:
    """Does the cell train its method as it is without overrides, whatever the target?"""
    default, no_target = (
        _load(conf / "method" / f"{cell.setting.method}.yaml", conf),
        {"target_macs_cut": None},
    )
    return bool(cell.config["method"] | no_target == default | no_target)


def _load(path: Path, conf: Path) -> dict[str, Any]:
    """A configuration file on top of its defaults."""
    content = copy.deepcopy(_parse(path.read_text()))
    config: dict[str, Any] = {}
    for group, name in _defaults(content.pop("defaults", [])):
        chosen = conf / group / f"{name}.yaml" if group else path.with_name(f"{name}.yaml")
        if chosen.exists():  # else it is a type of the schema, or one of Hydra's own
            config = _merge(config, {group: _load(chosen, conf)} if group else _load(chosen, conf))
    return _merge(config, content)


@cache
def _parse(text: str) -> Any:
    """YAML; a suite's cells read the same few files again and again."""
    return yaml.safe_load(text)


def _defaults(entries: list[Any]) -> Iterator[tuple[str, str]]:
    for entry in entries:
        if isinstance(entry, str):
            yield "", entry
        else:
            yield from (
                (group.removeprefix("override").strip(" /"), name)
                for group, name in entry.items()
                if name
            )


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
