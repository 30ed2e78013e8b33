"""How a command ends: what is meant for a person is one sentence, with an exit code of its own."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from hydra.errors import HydraException

from psap_core import InputError

EXIT_REFUSED = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues the run


class Interrupted(Exception):
    """A signal asked for a checkpoint; it is written and the run can be continued by the same command."""


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
        speaker = "error" if rank == "0" else f"error on rank {rank}"
        print(f"{speaker}: {one_sentence(error)}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)


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
