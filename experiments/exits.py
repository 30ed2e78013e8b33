"""How a command ends: what is meant for a person is one sentence, with an exit code of its own."""

import io
import os
import select
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TextIO

from hydra.errors import HydraException

from psap_core import InputError

EXIT_LOST = 1
EXIT_REFUSED = 2
EXIT_STOPPED = 130  # 128 + SIGINT
EXIT_NO_READER = 141  # 128 + SIGPIPE, as other programs: `... | head`
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues the run
STORE_SECONDS = 10  # patience with torchrun's store


class Interrupted(Exception):
    """A signal asked for a checkpoint; it is written and the run can be continued by the same command."""


class ProcessLost(Exception):
    """Another process that the training needs is gone; the same command continues from the last checkpoint."""


@contextmanager
def plain_exits() -> Iterator[None]:
    """What is meant for a person leaves as `error: <sentence>`, exit code 2; an interrupted run with 75.

    Of the processes that torchrun started, the first one says a sentence, and the others leave without it.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # since experiments/__init__.py
        signal.signal(signal.SIGINT, signal.default_int_handler)
    stderr, sys.stderr = sys.stderr, Unfailing(sys.stderr)
    try:
        yield
        if sys.stdout is not None:  # None: it was closed from the beginning
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped at once: the same command continues from what is saved", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
    except Interrupted:
        print("interrupted: the same command continues this run", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except ProcessLost as error:
        print(f"error: {error}: the same command continues this run", file=sys.stderr)
        sys.exit(EXIT_LOST)
    except (InputError, OSError) as error:
        if isinstance(error, BrokenPipeError) and sys.stdout and _has_no_reader(sys.stdout):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_NO_READER)
        sentence = one_sentence(error)
        if _first_to_say(sentence):
            several_machines = int(os.environ.get("GROUP_WORLD_SIZE", 1)) > 1
            speaker = f"error on {socket.gethostname()}" if several_machines else "error"
            print(f"{speaker}: {sentence}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)
    finally:
        sys.stderr = stderr


class Unfailing(io.TextIOBase):
    """A stream that drops what it cannot write: a full disk or a closed pipe behind stderr ends no training."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream  # None: it was closed from the beginning

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise io.UnsupportedOperation
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"


def _has_no_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream, select.POLLOUT)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _first_to_say(sentence: str) -> bool:
    """Has no other process said it? They count in the store of torchrun; without one, every process is the first."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=STORE_SECONDS))
        return store.add(f"said: {sentence}", 1) == 1
    except RuntimeError:  # torchrun has left already
        return True


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
