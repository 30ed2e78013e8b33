"""From a command line to a function with a typed configuration, and from an exception to one sentence."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from experiments import schema
from experiments.configuration import CONF, one_sentence, typed
from experiments.training.signals import Interrupted
from psap_core import InputError

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues the run


@contextmanager
def plain_exits() -> Iterator[None]:
    """What is meant for a person leaves as `error: <sentence>`, exit code 2; an interrupted run with 75."""
    try:
        yield
    except Interrupted:
        print("interrupted: the same command continues this run", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except (InputError, OSError) as error:
        rank = os.environ.get("RANK", "0")
        print(
            f"{'error' if rank == '0' else f'error on rank {rank}'}: {one_sentence(error)}",
            file=sys.stderr,
        )
        sys.exit(EXIT_REFUSED)


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
    schema.register()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, do not print
    composed: list[DictConfig] = []
    try:
        hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)(composed.append)()
        return [typed(cfg) for cfg in composed]
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise InputError(one_sentence(error)) from error
