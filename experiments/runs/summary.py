"""What a finished run says of itself."""

from pathlib import Path
from typing import Any

from experiments.runs.files import read_json
from psap_core import InputError


def read_summary(folder: Path) -> dict[str, Any]:
    """summary.json of a finished run."""
    try:
        return read_json(folder / "summary.json", "macs", "params")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(
            f"{folder} is not the folder of a finished run: it has no summary.json"
        ) from error
