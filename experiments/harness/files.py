"""Writing files so that a reader, and a run that was killed, finds the old content or the new one."""

import os
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the content at once and durably; the previous content stands until the new one is whole."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not name the file
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too, outlives a power failure
    finally:
        os.close(folder)
