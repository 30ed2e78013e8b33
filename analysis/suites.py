"""Suites as tables see them: what each cell trains, read from the YAML files and not from runs."""

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from analysis.collect import DataError

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
DATASETS = {"cifar10": "CIFAR-10", "imagenet": "ImageNet", "imagenette": "Imagenette", "digits": "handwritten digits"}
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
    def start(self) -> str:
        return "pretrained" if self.pretrained else "from scratch"

    @property
    def full_size(self) -> bool:
        """Whether published figures are comparable: all images in their size, a network of full width."""
        pixels = PUBLISHED_PIXELS.get(self.dataset)
        return self.image_size == pixels and self.train_images is None and self.width == 1


@dataclass(frozen=True)
class Cell:
    """One row of a table; for a thin network of another cell's plan, the target is that cell's."""

    name: str
    setting: Setting
    target: float | None


@dataclass(frozen=True)
class Suite:
    name: str
    title: str
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]


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


def read_suites(folder: Path = EXPERIMENTS / "suites", conf: Path = EXPERIMENTS / "conf") -> list[Suite]:
    """All suites of a folder, by name. Raises DataError if a file is no suite."""
    return [read_suite(path, conf) for path in sorted(folder.glob("*.yaml"))]


def read_suite(path: Path, conf: Path = EXPERIMENTS / "conf") -> Suite:
    """A suite's file, with recipes and choices from `conf`. Raises DataError if it is no suite."""
    try:
        content = yaml.safe_load(path.read_text())
        settings = {
            entry["name"]: setting_of(compose(entry["recipe"], entry["overrides"], conf)) for entry in content["cells"]
        }
        plans_of = {entry["name"]: entry.get("plan_of", entry["name"]) for entry in content["cells"]}
        cells = [Cell(name, settings[name], settings[plans_of[name]].target) for name in settings]
        return Suite(path.stem, content.get("title", path.stem), tuple(content["seeds"]), tuple(cells))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"the suite {path} cannot be read: {' '.join(str(error).split())}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no suite: {type(error).__name__} {error}") from error


def compose(recipe: str, overrides: list[str], conf: Path = EXPERIMENTS / "conf") -> dict[str, Any]:
    """The configuration of a recipe, with its interpolations left as they stand.

    Hydra's composition as far as this suite's files use it: defaults lists, groups, and overrides `key=value`.
    """
    config = _merge(_load(conf / "base.yaml", conf), _load(conf / "experiment" / f"{recipe}.yaml", conf))
    for override in overrides:
        key, _, text = str(override).lstrip("+").partition("=")
        value = yaml.safe_load(text)
        if (conf / key).is_dir():
            config[key] = _load(conf / key / f"{value}.yaml", conf)
            continue
        *sections, name = key.split(".")
        section = config
        for each in sections:
            section = section.setdefault(each, {})
        section[name] = value
    return config


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
            yield from ((group.removeprefix("override").strip(" /"), name) for group, name in entry.items() if name)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
