"""The file `done`, which a run writes last: every file that it has, with the SHA-256 of what was written there."""

import json
from collections.abc import Mapping
from pathlib import Path

from experiments.runs.files import DataError, read_sealed
from psap_core import InputError
from psap_core.files import read_plain, sealed, sha256, write_atomically

NAME = "done"


def write_done(folder: Path, digests: Mapping[str, str]) -> None:
    """Mark a run as finished; `digests` are by path below its folder."""
    content = sealed({"files": dict(sorted(digests.items()))})
    write_atomically(folder / NAME, (json.dumps(content, indent=1) + "\n").encode())


def read_done(folder: Path) -> dict[str, str]:
    """The digests of a finished run's files.

    Raises:
        DataError: the file is damaged, or of an older version of this suite. A missing one is FileNotFoundError.
    """
    path = folder / NAME
    content = read_sealed(path, "files")
    digests = content["files"]
    if not isinstance(digests, dict):
        raise DataError(f"{path} is damaged: it lists no files")
    return digests


def refuse_damage(folder: Path) -> None:
    """Raise DataError where a file of a finished run is missing, or is not what the run wrote."""
    for name, digest in read_done(folder).items():
        refuse_another_file(folder, name, digest)


def refuse_other_data(folder: Path, present: str, advice: str) -> None:
    """Raise InputError where the data of SHA-256 `present` are not those that the run was trained on."""
    trained = read_sealed(folder / "manifest.json", "data_sha256")["data_sha256"]
    if present != trained:
        raise InputError(
            f"{folder} belongs to the data of SHA-256 {trained}, and {present} is what lies there: {advice}"
        )


def refuse_another_file(folder: Path, name: str, digest: str) -> None:
    """Raise DataError where a file of a run is missing, or has not this SHA-256."""
    path = folder / name
    try:
        data = read_plain(path)
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} is half-written: {name} is missing; copy the run again"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; copy the run again") from error
    if sha256(data) != digest:
        raise DataError(
            f"{path} is damaged or was edited: it is not what the run wrote; copy the run again"
        )
