"""Several processes that need the same download: one makes it, the others wait and find it."""

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from psap_core import InputError


@contextmanager
def downloading(folder: Path) -> Iterator[None]:
    """Only one process at a time is inside, for a folder; look there again for what you need.

    Raises:
        InputError: the folder cannot be written.
    """
    path = folder / ".downloading"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}), and what is to be there is missing: download it on a "
            "machine that can, with python -m experiments.fetch"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that downloads to {folder}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
