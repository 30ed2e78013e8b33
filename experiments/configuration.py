"""From overrides to a typed configuration."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import schema
from psap_core import InputError

CONF = str(Path(__file__).parent / "conf")


def compose(config_name: str, overrides: Sequence[str]) -> Any:
    """The typed configuration (a dataclass of experiments.schema) that these overrides describe.

    Raises:
        InputError: an unknown key or choice, a value of the wrong type, a missing value.
    """
    schema.register()
    try:
        with hydra.initialize_config_dir(CONF, version_base="1.3"):
            return typed(hydra.compose(config_name, list(overrides)))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise InputError(one_sentence(error)) from error


def typed(cfg: DictConfig) -> Any:
    """The dataclass instance behind a composed configuration; `+key=value` cannot add to it."""
    _refuse_unknown(cfg, "")
    return OmegaConf.to_object(cfg)


def _refuse_unknown(cfg: DictConfig, path: str) -> None:
    known = {field.name for field in fields(OmegaConf.get_type(cfg))}  # type: ignore[arg-type]
    for key in map(str, cfg):
        if key not in known:
            raise InputError(f"unknown key {path}{key}")
        if not OmegaConf.is_missing(cfg, key) and isinstance(cfg._get_node(key), DictConfig):
            _refuse_unknown(cfg[key], f"{path}{key}.")


def one_sentence(error: BaseException) -> str:
    """What went wrong, on one line: the first paragraph of the error and of the one that caused it."""
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return f"{error.filename or 'a file'!s} cannot be used: {error.strerror or error}"
    parts = [_first_paragraph(error)]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        parts.append(_first_paragraph(error.__cause__))
    return ": ".join(parts)


def _first_paragraph(error: BaseException) -> str:
    text = str(error)
    for noise in ("\nTo append to your config", "\n    full_key", "Config search path:"):
        text = text.split(noise)[0]
    return " ".join(text.split()).rstrip(".")
