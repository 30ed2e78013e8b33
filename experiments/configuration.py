"""From overrides to a typed configuration."""

import copy
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import schema
from experiments.exits import one_sentence
from experiments.mistakes import mistake_in
from psap_core import InputError


def _from_weights(trained: float, fresh: float, *, _root_: DictConfig) -> float:
    """`${from_weights:trained,fresh}`: one value for a run that starts from weights, another for one that does not."""
    return fresh if _root_.model.weights is None else trained


OmegaConf.register_new_resolver("from_weights", _from_weights)
CONF = str(Path(__file__).parent / "conf")


PATH_KEYS = ("data.root", "runs_dir", "run", "model.weights", "method.run")


def compose(config_name: str, overrides: Sequence[str]) -> Any:
    """The typed configuration (a dataclass of experiments.schema) that these overrides describe.

    Raises:
        InputError: an unknown key or choice, a value of the wrong type, a missing value.
    """
    schema.register_types()
    overrides = prepared(overrides)
    choices = [override for override in overrides if _is_choice(override)]
    values = [override for override in overrides if not _is_choice(override)]
    try:
        composed = _choose(config_name, choices)
        if not _set_values(composed, values):
            composed = _hydra(config_name, overrides)
        return typed(composed)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise InputError(explanation(error, config_name, overrides)) from error


def compose_raw(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """What these overrides describe, values that are missing included.

    Raises:
        InputError: an unknown key or choice, or a value of the wrong type.
    """
    schema.register_types()
    overrides = prepared(overrides)
    try:
        return _hydra(config_name, overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise InputError(explanation(error, config_name, overrides)) from error


def prepared(overrides: Sequence[str]) -> list[str]:
    """Overrides as Hydra takes them: paths quoted.

    Raises:
        InputError: one is of Hydra itself or reads a file from elsewhere, which may run anything, or holds a null
            character, which no path takes.
    """
    for override in overrides:
        _refuse_foreign(override)
    return [quoted_path(override) for override in overrides]


def _refuse_foreign(override: str) -> None:
    key, _, value = override.partition("=")
    key = key.lstrip("+~")
    if "\0" in override:
        raise InputError(f"{override!r}: it holds a null character: leave that out")
    if re.split(r"[./:]", key)[0] == "hydra" or "@" in key:
        raise InputError(f"{override}: Hydra's own settings are not changed here: leave it out")
    if (Path(CONF) / key).is_dir() and "/" in value:
        raise InputError(f"{override}: it is a name, no path; --help lists the names")


def quoted_path(word: str) -> str:
    """`key=path` with the quotes that Hydra wants around spaces, brackets and the like, and `~` written out."""
    key, _, path = word.partition("=")
    is_plain = re.fullmatch(r"[\w./-]*", path) is not None
    is_hydras = path.startswith(("'", '"')) or "${" in path
    if key not in PATH_KEYS or is_plain or is_hydras:
        return word
    escaped = os.path.expanduser(path).replace("'", "\\'")
    return f"{key}='{escaped}'"


def explanation(error: Exception, config_name: str, overrides: Sequence[str]) -> str:
    """What is wrong with the overrides, in a sentence: what was probably meant, or what Hydra says."""
    try:
        mistake = mistake_in(
            overrides, error, Path(CONF), lambda choices: _choose_once(config_name, tuple(choices))
        )
    except (HydraException, OmegaConfBaseException, ValueError):  # of the choices themselves
        mistake = None
    return mistake or one_sentence(error)


def _is_choice(override: str) -> bool:
    """Does it choose a file of a group, as `method=psap` does?"""
    key = override.partition("=")[0]
    return (Path(CONF) / key).is_dir()


def _choose(config_name: str, choices: Sequence[str]) -> DictConfig:
    """What Hydra composes of files alone.

    That takes it a fifth of a second, and a suite has many cells. Recipe and method are composed once each.
    """
    methods = [choice for choice in choices if choice.startswith("method=")]
    others = [choice for choice in choices if choice not in methods]
    composed = copy.deepcopy(_choose_once(config_name, tuple(others)))
    if methods and _raw_method(composed) != _raw_method(_choose_once(config_name, ())):
        return _hydra(config_name, choices)  # a recipe that does set something of a method
    for method in methods:
        composed.method = _choose_once(config_name, (method,)).method
    return composed


def _raw_method(config: DictConfig) -> Any:
    return OmegaConf.to_container(config.method, resolve=False)


@cache
def _choose_once(config_name: str, choices: tuple[str, ...]) -> DictConfig:
    return _hydra(config_name, choices)


def _hydra(config_name: str, overrides: Sequence[str]) -> DictConfig:
    with hydra.initialize_config_dir(CONF, version_base="1.3"):
        return hydra.compose(config_name, [*overrides])


def _set_values(config: DictConfig, overrides: Sequence[str]) -> bool:
    """Set keys as Hydra does; False where an override is not simply `key=value`, which is left to Hydra itself."""
    for override in OverridesParser.create().parse_overrides([*overrides]):
        is_plain = override.type is OverrideType.CHANGE and not override.is_sweep_override()
        if not is_plain or override.package is not None:
            return False
        try:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        except OmegaConfBaseException:
            return False  # Hydra's message names the override
    return True


def typed(cfg: DictConfig) -> Any:
    """The dataclass instance behind a composed configuration; `+key=value` cannot add to it."""
    _refuse_unknown(cfg, "")
    return OmegaConf.to_object(cfg)


def _refuse_unknown(cfg: DictConfig, path: str) -> None:
    kind = OmegaConf.get_type(cfg)
    if kind is None or not is_dataclass(kind):
        return  # names that nobody knows beforehand
    known = {field.name for field in fields(kind)}
    for key in map(str, cfg):
        if key not in known:
            raise InputError(f"unknown key {path}{key}")
        if not OmegaConf.is_missing(cfg, key) and isinstance(cfg._get_node(key), DictConfig):
            _refuse_unknown(cfg[key], f"{path}{key}.")
