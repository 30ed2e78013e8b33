"""Files that are whole or not there, and content that carries its own digest."""

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from psap_core.errors import InputError

TEMPORARY = ".*.tmp"  # what a killed process may leave


def read_plain(path: Path) -> bytes:
    """The content of a file; a pipe or a device, which may have no end, is refused.

    Raises:
        OSError: there is no such file, it is no plain one, or larger than the memory.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    refuse_special(descriptor, path)
    with open(descriptor, "rb") as file:
        try:
            return file.read()
        except MemoryError as error:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path)) from error


def refuse_special(descriptor: int, path: Path) -> None:
    """Close what is no plain file, and raise OSError."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no plain file", str(path))


def write_atomically(path: Path, data: bytes, *, previous: Path | None = None) -> None:
    """Replace the content at once and durably; the previous content stands until the new one is whole.

    A link in the file's place is replaced, not followed.

    Args:
        previous: where the former content goes, if there is any.
    """
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            with suppress(FileNotFoundError):
                os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        # a full disk does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    flush_folder(path.parent)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, durably; it may exist."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """Let the names in a folder outlive a power failure, where the file system can flush folders."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(folder)


def sha256(data: bytes) -> str:
    """64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with `sha256`, taken over all of them."""
    return {**content, "sha256": _digest(content)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `sealed` was given.

    Raises:
        InputError: anything of it was changed.
    """
    values = {name: value for name, value in content.items() if name != "sha256"}
    if content.get("sha256") != _digest(values):
        raise InputError("its content is not that of its SHA-256")
    return values


def _digest(content: Mapping[str, Any]) -> str:
    return sha256(json.dumps(content, sort_keys=True).encode())
