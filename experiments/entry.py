"""From a command line to a function with a typed configuration."""

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments import schema
from experiments.configuration import CONF, explanation, typed
from experiments.exits import plain_exits
from psap_core import InputError


def entry_point(config_name: str) -> Callable[[Callable[[Any], object]], Callable[[], None]]:
    """Make a command, with the exits of `plain_exits`, of a function that takes a typed configuration."""

    def decorate(function: Callable[[Any], object]) -> Callable[[], None]:
        @functools.wraps(function)
        def command() -> None:
            with plain_exits():
                for cfg in _from_command_line(config_name):
                    function(cfg)

        return command

    return decorate


def _from_command_line(config_name: str) -> list[Any]:
    """What Hydra makes of sys.argv; nothing where it only answers, as for --help.

    Hydra composes and no more: it would decorate whatever is raised inside it with lines of its own.
    """
    schema.register_types()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, do not print
    composed: list[DictConfig] = []
    try:
        hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(composed.append)()
        return [typed(cfg) for cfg in composed]
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise InputError(explanation(error, config_name, sys.argv[1:])) from error
