"""What is wrong with the words of a command, and what was probably meant."""

import copy
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import OverrideParseException
from omegaconf import (
    BooleanNode,
    DictConfig,
    EnumNode,
    FloatNode,
    IntegerNode,
    ListConfig,
    OmegaConf,
    UnionNode,
)
from omegaconf.errors import MissingMandatoryValue, ValidationError

from experiments.help import options

WANTED = {  # what a recipe may leave open
    "data.root": "<folder with a folder of images per class>",
    "method.run": "<folder of a finished run>",
}
Compose = Callable[[Sequence[str]], DictConfig]


def mistake_in(words: Sequence[str], error: Exception, conf: Path, compose: Compose) -> str | None:
    """One sentence about what was probably meant; None: Hydra's own is the best there is.

    Args:
        words: overrides, as on a command line.
        error: what Hydra says of them.
        conf: folder whose folders are the groups.
        compose: makes a configuration of choices of groups alone.
    """
    for cause in (error, error.__cause__):
        if isinstance(cause, OverrideParseException):
            return _unreadable(cause.override)
    groups = {path.name for path in conf.iterdir() if path.is_dir()}
    choices, values = [], []
    for override in _assignments(words):
        if override.key_or_group in groups:
            choices.append(override)
        else:
            values.append(override)
    for choice in choices:
        sentence = _wrong_choice(choice, conf)
        if sentence is not None:
            return sentence
    config = compose([str(choice.input_line) for choice in choices])
    keys = _keys(config)
    for override in values:
        sentence = _wrong_value(override, config, keys)
        if sentence is not None:
            return sentence
    if isinstance(error, MissingMandatoryValue):
        has_recipe = any(choice.key_or_group == "experiment" for choice in choices)
        return _missing(error, has_recipe, conf)
    return None


def _unreadable(word: str) -> str:
    key, _, value = word.partition("=")
    if key and value:
        return f"{word}: its value cannot be read; quotes inside quotes keep it whole: \"{key}='{value}'\""
    return f"{word}: write key=value, as in seed=1"


def _missing(error: MissingMandatoryValue, has_recipe: bool, conf: Path) -> str | None:
    if error.key == "name" and not has_recipe:
        return f"no recipe is chosen: add experiment=<{'|'.join(options(conf, 'experiment'))}>"
    if error.full_key in WANTED:
        return f"{error.full_key} is missing: add {error.full_key}={WANTED[error.full_key]}"
    return None


def _assignments(words: Sequence[str]) -> list[Override]:
    """The words that are simply `key=value`, not Hydra's own, a sweep, or an addition."""
    parser = OverridesParser.create()
    assignments = []
    for word in words:
        try:
            (override,) = parser.parse_overrides([word])
        except OverrideParseException:
            continue  # a flag, or what belongs to one
        is_plain = override.type is OverrideType.CHANGE and not override.is_sweep_override()
        if is_plain and not override.key_or_group.startswith("hydra"):
            assignments.append(override)
    return assignments


def _wrong_choice(choice: Override, conf: Path) -> str | None:
    group, value = choice.key_or_group, choice.value()
    if value is None:
        return None
    name = str(value).removesuffix(".yaml")
    known = options(conf, group)
    if name in known:
        return None
    noun = "recipe" if group == "experiment" else group
    if group == "model" and _is_of_timm(name):
        return (
            f"model={name}: there is no such model, but timm has it: model=timm model.name={name}"
        )
    nearest = get_close_matches(name, known, n=1)
    meant = f"did you mean {nearest[0]}? " if nearest else ""
    return f"{group}={name}: there is no such {noun}; {meant}choose from {', '.join(known)}"


def _is_of_timm(name: str) -> bool:
    if find_spec("timm") is None:
        return False
    import timm

    return bool(timm.is_model(name))


def _wrong_value(override: Override, config: DictConfig, keys: Collection[str]) -> str | None:
    key = override.key_or_group
    if not key:
        return _unreadable(str(override.input_line))
    return (
        _unknown_key(key, keys) or _wrong_member(override, config) or _wrong_kind(override, config)
    )


def _wrong_member(override: Override, config: DictConfig) -> str | None:
    """What is wrong with the value of a key that takes a few words only, or a list."""
    node = _node(config, override.key_or_group)
    value = override.value()
    if isinstance(node, ListConfig) and value is not None and not isinstance(value, list):
        key = override.key_or_group
        return f"{key}={value}: it takes a list, as in {key}=[{value}]"
    if not isinstance(node, EnumNode) or value is None:
        return None
    members = [*node.enum_type.__members__]
    if str(value) in members:
        return None
    nearest = get_close_matches(str(value), members, n=1)
    meant = f"did you mean {nearest[0]}? " if nearest else ""
    return f"{override.key_or_group}={value}: {meant}choose from {', '.join(members)}"


def _wrong_kind(override: Override, config: DictConfig) -> str | None:
    """What is wrong with the value of a key that takes numbers, or yes and no."""
    kind = _kind(_node(config, override.key_or_group))
    try:
        OmegaConf.update(copy.deepcopy(config), override.key_or_group, override.value())
    except ValidationError:
        if kind is not None:
            return f"{override.input_line}: it takes {kind}"
    return None


def _kind(node: Any) -> str | None:
    """What values a key takes; None: words of its own."""
    if isinstance(node, ListConfig):
        return "a list of numbers" if node._metadata.element_type is float else "a list of names"
    if isinstance(node, BooleanNode):
        return "true or false"
    if isinstance(node, IntegerNode):
        return "a whole number"
    if isinstance(node, FloatNode | UnionNode):
        return "a number"
    return None


def _node(config: DictConfig, key: str) -> Any:
    node: Any = config
    for name in key.split("."):
        node = node._get_node(name)
    return node


def mistaken_option(words: Sequence[str], known: Collection[str]) -> str | None:
    """What is wrong with a word like `--hlep`; None: nothing is."""
    for word in words:
        option = word.partition("=")[0]
        if option.startswith("-") and option not in known:
            nearest = get_close_matches(option, known, n=1, cutoff=0.7)
            meant = f"did you mean {nearest[0]}?" if nearest else "--help says what there is"
            return f"{option}: there is no such option; {meant}"
    return None


def _keys(config: DictConfig) -> list[str]:
    """All keys, dotted."""
    keys = []
    for name in map(str, config):
        keys.append(name)
        part = config._get_node(name)
        if isinstance(part, DictConfig) and not OmegaConf.is_missing(config, name):
            keys += [f"{name}.{key}" for key in _keys(part)]
    return keys


def _unknown_key(key: str, keys: Collection[str]) -> str | None:
    path, _, last = key.rpartition(".")
    inner = {known.rpartition(".")[0] for known in keys}
    if key in keys or (path in keys and path not in inner):  # the latter: an element of a list
        return None
    if key == "run":  # a key of evaluate and export alone
        return "run: there is no such key; a run is named by the words that it is trained with"
    siblings = {k.rpartition(".")[2]: k for k in keys if k.rpartition(".")[0] == path}
    nearest = [k for k in keys if path == "" and k.rpartition(".")[2] == last]
    if not nearest:
        nearest = [siblings[name] for name in get_close_matches(last, siblings, n=1, cutoff=0.75)]
    if nearest:
        return f"{key}: there is no such key; did you mean {' or '.join(nearest)}?"
    return f"{key}: there is no such key; there are {', '.join(siblings.values())}"
