"""From a command line to a function with a typed configuration."""

import functools
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments import schema
from experiments.configuration import CONF, compose_raw, explanation, prepared, typed
from experiments.exits import plain_exits
from experiments.help import help_text
from experiments.mistakes import mistaken_option
from psap_core import InputError

HYDRAS_OPTIONS = (  # and none that reads a configuration from elsewhere, which may run anything
    *("--hydra-help", "--version", "--shell-completion", "-sc", "--info", "-i"),
    *("--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r", "--multirun", "-m"),
)


def entry_point(
    config_name: str, *flags: str
) -> Callable[[Callable[..., object]], Callable[[], None]]:
    """Make a command, with the exits of `plain_exits`, of a function that takes a typed configuration.

    It gets a bool for each of `flags`, too: `json=True` where `--json` was given. `--help` shows the text at the top
    of the function's module.
    """

    def decorate(function: Callable[..., object]) -> Callable[[], None]:
        @functools.wraps(function)
        def command() -> None:
            with plain_exits():
                if "--help" in sys.argv or "-h" in sys.argv:
                    _print_help(config_name, sys.modules[function.__module__].__doc__ or "")
                    return
                mistake = mistaken_option(sys.argv[1:], [*HYDRAS_OPTIONS, *_options(flags)])
                if mistake is not None:
                    raise InputError(mistake)
                given = {flag: _taken(f"--{flag}") for flag in flags}
                for cfg in _from_command_line(config_name):
                    function(cfg, **given)

        return command

    return decorate


def _options(flags: Collection[str]) -> list[str]:
    return ["--help", "-h", *(f"--{flag}" for flag in flags)]


def _taken(option: str) -> bool:
    """Was the option given? Hydra does not see it."""
    if option not in sys.argv:
        return False
    sys.argv.remove(option)
    return True


def _print_help(config_name: str, about: str) -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("-")]
    print(help_text(about, compose_raw(config_name, words), Path(CONF)))


def _from_command_line(config_name: str) -> list[Any]:
    """What Hydra makes of sys.argv; nothing where it only answers, as for --help.

    Hydra composes and no more: it would decorate whatever is raised inside it with lines of its own.
    """
    schema.register_types()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, do not print
    sys.argv[1:] = prepared(sys.argv[1:])
    composed: list[DictConfig] = []
    try:
        hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(composed.append)()
        return [typed(cfg) for cfg in composed]
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise InputError(explanation(error, config_name, sys.argv[1:])) from error
