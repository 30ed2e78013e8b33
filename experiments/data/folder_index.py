"""What lies in the folders of photographs: their files, classes and sizes, kept in a cache between runs."""

import csv
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from experiments.runs.files import IMAGE_SUFFIXES
from psap_core import InputError
from psap_core.files import read_plain, write_atomically

FLAT_LABELS = "LOC_val_solution.csv"
INDEX_FORMAT = 3


@dataclass(frozen=True)
class Files:
    """Images of one split: names relative to the root, labels, sizes in bytes; bytes, int64 and int64 [N].

    Arrays, because a list of a million names is copied into every worker as soon as its reference counts change.
    """

    names: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, index: slice | NDArray[np.int64]) -> "Files":
        return Files(self.names[index], self.labels[index], self.sizes[index])


class Folder(NamedTuple):
    """When a folder was modified, in ns, its image files (names and sizes in bytes), and the names of all else."""

    modified: int
    names: list[str]
    sizes: list[int]
    others: list[str]


Index = dict[str, Folder]  # of the splits and every class folder, by the path below the root


def read_index(root: Path, splits: Sequence[str]) -> Index:
    """What lies in these folders below `root`; from the cache, where no folder has been modified since."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "psap")
    cache = folder / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError):
        index = _parsed(read_plain(cache))
        if not index.keys() >= {*splits}:
            raise ValueError  # of other splits
        if all((root / name).stat().st_mtime_ns == entry.modified for name, entry in index.items()):
            return index
    index = _scanned(root, splits)
    with suppress(OSError):  # without a cache the next start takes longer, and that is all
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, _serialised(index))
    return index


def _scanned(root: Path, splits: Sequence[str]) -> Index:
    index = {}
    for split in splits:
        index[split], classes = _scanned_split(root / split)
        for name in classes:
            path = _below(split, name)
            index[path] = _scanned_folder(root / path)
    return index


def _scanned_split(folder: Path) -> tuple[Folder, list[str]]:
    """What lies in a split, and the names of its classes: the folders in it."""
    scanned = _scanned_folder(folder)
    classes: list[str] = []
    others: list[str] = []
    for name in scanned.others:
        kind = classes if (folder / name).is_dir() else others
        kind.append(name)
    return scanned._replace(others=others), classes


def _below(split: str, name: str) -> str:
    """The path of a class folder, or of a file in one, below the root; a split may be `.`, the root itself."""
    return str(PurePosixPath(split, name))


def _scanned_folder(folder: Path) -> Folder:
    # Before the scan: what changes meanwhile is seen the next time.
    modified = folder.stat().st_mtime_ns
    images, others = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue  # what editors and file managers leave
            if entry.name.lower().endswith(IMAGE_SUFFIXES) and not entry.is_dir():
                images.append((entry.name, entry.stat().st_size))
            else:
                others.append(entry.name)
    images.sort()
    names = [name for name, _ in images]
    sizes = [size for _, size in images]
    return Folder(modified, names, sizes, sorted(others))


def _digest(index: Any) -> str:
    return hashlib.sha256(json.dumps([INDEX_FORMAT, index]).encode()).hexdigest()


def _serialised(index: Index) -> bytes:
    return json.dumps({"digest": _digest(index), "index": index}).encode()


def _parsed(data: bytes) -> Index:
    """Raises ValueError where the cache is damaged or of another format."""
    content = json.loads(data)
    if not isinstance(content, dict) or content.get("digest") != _digest(content.get("index")):
        raise ValueError
    return {name: Folder(*entry) for name, entry in content["index"].items()}


def class_folders(index: Index, split: str) -> list[str]:
    """The names of a split's classes, sorted."""
    paths = (PurePosixPath(path) for path in index if path != split)
    return sorted(path.name for path in paths if path.parent == PurePosixPath(split))


def left_out(index: Index, splits: Collection[str]) -> list[str]:
    """Paths below the root of what no class takes: images beside classes, folders in a class, files of other kinds."""
    paths = []
    for path, folder in index.items():
        images = folder.names if path in splits else []
        paths += [_below(path, name) for name in (*images, *folder.others)]
    return paths


def refuse_other_than_wnids(root: Path, index: Index, splits: Sequence[str]) -> None:
    """ImageNet's classes are WordNet ids: whatever else lies beside them was not meant."""
    for split in splits:
        for name in class_folders(index, split):
            if not re.fullmatch(r"n\d{8}", name):
                raise InputError(
                    f"{root / split / name} is named after no WordNet id (n and eight digits, as n01440764): rename "
                    "it, move it elsewhere, or use data=image_folder, which takes classes of any name"
                )


def files_by_class(root: Path, index: Index, split: str) -> tuple[Files, list[str]]:
    """A split with a folder per class, and its classes."""
    classes = class_folders(index, split)
    folders = [index[_below(split, name)] for name in classes]
    for name, folder in zip(classes, folders, strict=True):
        if not folder.names:
            raise InputError(
                f"{root / split / name} holds no images (*{', *'.join(IMAGE_SUFFIXES)}): fill it, or remove it"
            )
    if not classes:
        raise InputError(
            f"{root / split} holds no images in folders per class, as in {_below(split, '<class>')}/*.jpg"
        )
    names = (
        _below(split, f"{name}/{file}")
        for name, folder in zip(classes, folders, strict=True)
        for file in folder.names
    )
    labels = np.repeat(np.arange(len(classes)), [len(folder.names) for folder in folders])
    return _files(names, labels, (size for folder in folders for size in folder.sizes)), classes


def files_by_table(root: Path, folder: Folder) -> tuple[Files, list[str]]:
    """A validation folder as ImageNet's archive leaves it, and its classes, which a table tells."""
    path = root / FLAT_LABELS
    if not path.exists():
        raise InputError(
            f"{root / 'val'} holds its images directly: move them into a folder per class, as in val/n01440764/, or "
            f"put {FLAT_LABELS} (columns ImageId, PredictionString) of ImageNet's Kaggle edition into {root}"
        )
    try:
        with path.open(newline="") as file:
            wnid = {
                row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(file)
            }
    except (KeyError, IndexError, AttributeError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path} is damaged: it must have the columns ImageId and PredictionString"
        ) from error
    if missing := [name for name in folder.names if Path(name).stem not in wnid]:
        raise InputError(
            f"{path} does not name the class of {root / 'val' / missing[0]}: it must cover every image"
        )
    image_wnids = [wnid[Path(name).stem] for name in folder.names]
    wnids = sorted(set(image_wnids))
    labels = np.searchsorted(wnids, image_wnids)
    return _files((f"val/{name}" for name in folder.names), labels, folder.sizes), wnids


def _files(names: Iterable[str], labels: NDArray[np.intp], sizes: Iterable[int]) -> Files:
    encoded = np.array([os.fsencode(name) for name in names])
    return Files(encoded, labels.astype(np.int64), np.array(list(sizes), dtype=np.int64))
