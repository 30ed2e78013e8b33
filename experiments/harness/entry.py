"""From a command line to a typed configuration, and from an exception to one sentence."""

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import schema
from psap_core import InputError

CONF = str(Path(__file__).parents[1] / "conf")
EXIT_REFUSED = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues the run


class Interrupted(Exception):
    """A signal asked for a checkpoint; it is written and the run can be continued by the same command."""


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


class StopSignals:
    """While entered, SIGTERM, SIGUSR1 and a first Ctrl-C only set `received`; the loop asks after every step.

    A Ctrl-C that the loop has not answered by the end ends what comes next.
    """

    def __init__(self) -> None:
        self.received = False
        self._ctrl_c = False

    def __enter__(self) -> "StopSignals":
        numbers = signal.SIGTERM, signal.SIGUSR1, signal.SIGINT
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, raised: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._ctrl_c and raised is None:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            self._ctrl_c = True
            signal.signal(number, signal.default_int_handler)
            print(
                "stopping after this step, with a checkpoint; Ctrl-C again: at once",
                file=sys.stderr,
            )
