"""Reading what lies in files, and digests of what a run starts from."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import yaml

from psap_core import InputError
from psap_core.files import TEMPORARY as TEMPORARY
from psap_core.files import read_plain as read_plain  # for analysis, too, which knows no psap_core
from psap_core.files import unsealed
from psap_core.files import write_atomically as write_atomically

EXPORTED_FILES = ("spec.json", "weights.safetensors")  # of an exported network
DEEPEST = 50  # nesting of YAML files
IMAGE_SUFFIXES = (".jpeg", ".jpg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


class DataError(InputError):
    """A file of a run is missing, damaged or of another run."""


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """The JSON object in a file, which has at least these keys.

    Raises:
        DataError: it is damaged. A missing file is FileNotFoundError.
    """
    return parse_json(read_plain(path), path, *keys)


def parse_json(data: bytes, path: Path, *keys: str) -> dict[str, Any]:
    """As `read_json`, of `data` that was found in `path`."""
    try:
        content: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: it is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: it holds no JSON object")
    if missing := [key for key in keys if key not in content]:
        raise DataError(f"{path} is damaged: it has no {missing[0]!r}")
    return content


def parse_yaml(data: bytes) -> Any:
    """What YAML text says. Aliases, which can stand for more than any memory holds, and deep nesting are refused.

    Raises:
        ValueError: it is no such text.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    depth = 0
    try:
        for event in yaml.parse(data, loader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"it has an alias, *{event.anchor}: write out what it stands for")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth > DEEPEST:
                raise ValueError(f"it is nested more than {DEEPEST} times")
        return yaml.load(data, loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def read_sealed(path: Path, *keys: str) -> dict[str, Any]:
    """As `read_json`, of a file that carries its own SHA-256. Raises DataError if it was changed."""
    try:
        content = read_json(path, *keys)
        if "sha256" not in content:
            raise DataError(f"{path} is damaged, or of an earlier version of this suite")
        return unsealed(content)
    except (DataError, FileNotFoundError):
        raise
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (InputError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {error}") from error


def is_published(weights: str) -> bool:
    """Is it `pretrained` or a name of torchvision's enumerations, and no file?"""
    return weights == "pretrained" or weights.startswith("IMAGENET1K_")


def weights_digest(weights: str | None) -> str | None:
    """SHA-256 over the content of a weights file or an exported folder, wherever it lies; published ones by name."""
    if weights is None or is_published(weights):
        return weights
    path = Path(weights)
    if not weights:
        raise InputError("model.weights='' names no file: leave it out, or say null")
    if not (path / "spec.json").exists() and (path / "export" / "spec.json").exists():
        raise InputError(
            f"model.weights={weights} is a run's folder: take its export/, {path / 'export'}"
        )
    files = sorted(_exported_files(path)) if path.is_dir() else [path]
    digest = hashlib.sha256()
    try:
        for file in files:
            digest.update(read_plain(file))
    except OSError as error:
        raise InputError(f"model.weights={weights} cannot be read: {error.strerror}") from error
    return digest.hexdigest()


def _exported_files(folder: Path) -> list[Path]:
    """Of an exported network, and of the one that it was built from, if it was; nothing that lies beside them."""
    files = [folder / name for name in EXPORTED_FILES]
    if (folder / "start").is_dir():
        files += _exported_files(folder / "start")
    return files


def folder_digest(root: str) -> str:
    """SHA-256 over names and sizes of the images in a folder's classes, wherever it lies.

    Raises:
        InputError: it is no folder.
    """
    folder = Path(root)
    if not root or not folder.is_dir():
        raise InputError(
            f"data.root={root} is no folder: it must hold a folder of images per class"
        )
    pattern = "*/*/*" if (folder / "train").is_dir() else "*/*"
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        place = path.relative_to(folder)
        is_hidden = any(part.startswith(".") for part in place.parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden:
            described = [os.fsencode(place).hex(), path.stat().st_size]
            digest.update(json.dumps(described).encode())
    return digest.hexdigest()
