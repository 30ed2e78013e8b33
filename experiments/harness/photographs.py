"""Photographs in folders, as ImageNet's: decoded, cropped and scaled by worker processes while the network trains.

A worker builds a whole batch of one rank as one uint8 tensor; it is normalised on the device. The crops of a batch
are a pure function of (seed, stream, epoch, batch), so neither the number of processes nor that of workers shows,
and an epoch can be entered at any batch.
"""

import atexit
import csv
import functools
import hashlib
import io
import json
import math
import os
import re
import signal
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from experiments.harness.batches import SMALLEST_PART, Batch, Sharing
from experiments.harness.data import Normalisation, SplitName, split_index
from experiments.harness.files import write_atomically
from experiments.harness.seeding import generator
from experiments.schema import OnCorrupt, PhotographsConfig
from psap_core import InputError

SUFFIXES = (".jpeg", ".jpg", ".png")
FLAT_LABELS = "LOC_val_solution.csv"
INDEX_FORMAT = 1
# A training crop is that of torchvision's RandomResizedCrop.
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10
DRAWS = 2 * TRIES + 3  # area and ratio of every try, top, left, mirror
EVALUATION_BATCH = 128
BATCHES_AHEAD = 2  # per worker


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


class Failure(NamedTuple):
    """An image that could not be had: its position in the batch, its file, and whether the file is to blame."""

    row: int
    name: str
    reason: str
    damaged: bool


# Images uint8 [N, S, S, 3], labels int64 [N], rows without an image.
Rows = tuple[Tensor, Tensor, list[Failure]]


# The recipe: what becomes of one image.


def crop_box(width: int, height: int, uniforms: Sequence[float]) -> tuple[int, int, int, int]:
    """The box (left, top, width, height) that torchvision's RandomResizedCrop makes of 22 uniforms in [0, 1).

    The first of ten tries that fits counts; the centre is taken where none does.
    """
    area, low, high = width * height, *map(math.log, RATIO)
    for share, shape in zip(uniforms[0 : 2 * TRIES : 2], uniforms[1 : 2 * TRIES : 2], strict=True):
        target = area * (AREA[0] + share * (AREA[1] - AREA[0]))
        ratio = math.exp(low + shape * (high - low))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = uniforms[2 * TRIES : 2 * TRIES + 2]
            return int(left * (width - w + 1)), int(top * (height - h + 1)), w, h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def training_view(
    image: Image.Image, size: int, uniforms: Sequence[float], flip: bool
) -> NDArray[np.uint8]:
    """A random crop, mirrored for half of the last uniforms, uint8 [S, S, 3]; `image` is opened, not yet decoded.

    Equal to what torchvision makes of a uint8 tensor, and but for a level here and there of a PIL image, except where
    the crop is so large that a JPEG decoded at 1/2, 1/4 or 1/8 of its resolution still has two pixels for every one
    that is left. That halves the time, and more, for a large photograph, and moves pixels by 1.6 of 255 levels on
    average; bicubic for bilinear filtering would by 1.8.
    """
    full_width, full_height = image.size
    left, top, width, height = crop_box(full_width, full_height, uniforms)
    reduction = min(width, height) // (2 * size)
    if reduction >= 2:
        # It does nothing to a PNG.
        image.draft(None, (full_width // reduction, full_height // reduction))
    x, y = image.width / full_width, image.height / full_height
    crop = _rgb(image).crop(
        (round(left * x), round(top * y), round((left + width) * x), round((top + height) * y))
    )
    # torch needs a quarter of PIL's time, if the memory is channels_last before and after (the first index matters).
    pixels = torch.from_numpy(np.array(crop))[None].permute(0, 3, 1, 2)
    view = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    mirrored = flip and uniforms[-1] < 0.5
    return (view.flip(3) if mirrored else view)[0].permute(1, 2, 0).numpy()


def evaluation_view(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The central S x S pixels of the image with 256 / 224 S pixels on its shorter side, uint8 [S, S, 3]."""
    short = round(size * 256 / 224)
    scaled = [int(short * side / min(image.size)) for side in image.size]
    resized = _rgb(image).resize((scaled[0], scaled[1]), Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in scaled)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def _rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


# Batches, built in a worker.


def read_rows(
    root: str, files: Files, size: int, view: Callable[[int, Image.Image], NDArray[np.uint8]]
) -> Rows:
    """The views of all files; a failure is a value, because an exception would leave a worker as a traceback.

    The rows without an image hold anything.

    Args:
        root: the folder that the names are relative to.
        view: makes uint8 [S, S, 3] of a file's position and its opened image.
    """
    images = torch.empty(len(files), size, size, 3, dtype=torch.uint8)
    if get_worker_info() is not None:
        images.share_memory_()  # where it must come to lie in any case
    rows, failures = images.numpy(), []
    for row, encoded in enumerate(files.names.tolist()):
        name = os.fsdecode(encoded)
        try:
            data = Path(root, name).read_bytes()
        except OSError as error:
            failures.append(Failure(row, name, error.strerror or str(error), damaged=False))
            continue
        try:
            rows[row] = view(row, Image.open(io.BytesIO(data)))
        except UnidentifiedImageError:
            failures.append(Failure(row, name, "not an image", damaged=True))
        except MemoryError:
            raise
        except Exception as error:  # a decoder raises anything on a damaged file
            failures.append(Failure(row, name, str(error), damaged=True))
    return images, torch.from_numpy(files.labels), failures


@functools.lru_cache(maxsize=1)
def _order(images: int, seed: int, stream: str, epoch: int) -> NDArray[np.int64]:
    return torch.randperm(images, generator=generator(seed, stream, epoch)).numpy()


@dataclass(frozen=True)
class TrainingRows(Dataset[Rows]):
    """One rank's rows of any training batch, asked for by (stream, epoch, batch)."""

    root: str
    files: Files
    size: int
    flip: bool
    seed: int
    sharing: Sharing

    def __getitem__(self, item: tuple[str, int, int]) -> Rows:
        stream, epoch, batch = item
        start = batch * self.sharing.batch_size
        index = _order(len(self.files), self.seed, stream, epoch)[
            start : start + self.sharing.batch_size
        ]
        parts = self.sharing.parts(len(index))
        mine = slice(parts[0].start, parts[-1].stop)
        # Drawn for the whole batch, so that a row has the same crop whichever rank takes it.
        draw = generator(self.seed, stream, epoch, batch)
        uniforms = torch.rand(len(index), DRAWS, dtype=torch.float64, generator=draw)[mine].tolist()
        return read_rows(
            self.root,
            self.files.take(index[mine]),
            self.size,
            lambda row, image: training_view(image, self.size, uniforms[row], self.flip),
        )


@dataclass(frozen=True)
class EvaluationRows(Dataset[Rows]):
    """Consecutive evaluation images, asked for by the number of their batch."""

    root: str
    files: Files
    size: int

    def __getitem__(self, batch: int) -> Rows:
        files = self.files.take(slice(batch * EVALUATION_BATCH, (batch + 1) * EVALUATION_BATCH))
        return read_rows(
            self.root, files, self.size, lambda _, image: evaluation_view(image, self.size)
        )


def _loader(
    rows: Dataset[Rows], items: Iterable[Any], device: torch.device, workers: int
) -> DataLoader[Rows]:
    """Serves `items` in order, whatever they are when an iteration begins; torch gives a worker one thread."""
    loader = DataLoader(
        rows,
        batch_size=None,
        sampler=items,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        persistent_workers=workers > 0,
        prefetch_factor=BATCHES_AHEAD if workers else None,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),  # a seed for workers, which do not need one, comes from torch's own otherwise
    )
    if workers:
        atexit.register(_end_workers, weakref.ref(loader))
    return loader


def _leave_signals_to_the_main_process(worker: int) -> None:
    """A signal to all of the run's processes asks for a checkpoint, during which batches must still arrive."""
    os.setpgrp()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _end_workers(loader: "weakref.ref[DataLoader[Rows]]") -> None:
    """After an error the loader may outlive main; the interpreter would wait for each worker, which ignores it."""
    if (found := loader()) is not None and found._iterator is not None:
        workers: Any = found._iterator
        workers._shutdown_workers()
        for worker in workers._workers:
            worker.kill()


# The data set.


@dataclass(frozen=True)
class Photographs:
    """The three splits of a data set of photographs; `validation` may be empty.

    Attributes:
        classes: their number; they are numbered in the order of their WordNet ids.
        skipped: names, relative to the root, of the images found damaged so far, where `on_corrupt` allows it.
    """

    root: str
    train: Files
    validation: Files
    test: Files
    classes: int
    size: int
    flip: bool
    on_corrupt: OnCorrupt
    skipped: set[str] = field(default_factory=set)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W]."""
        return 3, self.size, self.size

    @property
    def digest(self) -> str:
        """SHA-256 over the names, classes and sizes of all files, in order; where the root lies does not matter."""
        digest = hashlib.sha256()
        for files in (self.train, self.validation, self.test):
            digest.update(b"\0".join([*files.names.tolist(), b""]))
            digest.update(
                files.labels.astype("<i8").tobytes() + files.sizes.astype("<i8").tobytes()
            )
        return digest.hexdigest()

    def count(self, split: SplitName) -> int:
        """Number of images, damaged ones included."""
        return len(self._split(split))

    def training(
        self,
        sharing: Sharing,
        normalisation: Normalisation,
        seed: int,
        device: torch.device,
        workers: int,
    ) -> "TrainingPhotographs":
        """The training split, augmented, read by `workers` processes; by this one if there are none."""
        return TrainingPhotographs(self, sharing, normalisation, seed, device, workers)

    def evaluation(
        self,
        split: SplitName,
        rank: int,
        ranks: int,
        normalisation: Normalisation,
        device: torch.device,
        workers: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's images, every `ranks`-th: float32 [B, 3, S, S] and labels int64 [B].

        Raises:
            InputError: an image cannot be read.
        """
        files = self._split(split).take(slice(rank, None, ranks))
        items = range(-(-len(files) // EVALUATION_BATCH))
        for images, labels, failures in _loader(
            EvaluationRows(self.root, files, self.size), items, device, workers
        ):
            if lost := self.lost_rows(failures):
                kept = [row for row in range(len(labels)) if row not in lost]
                images, labels = images[kept], labels[kept]
            if len(labels):
                yield to_device(images, normalisation, device), labels.to(device, non_blocking=True)

    def lost_rows(self, failures: list[Failure]) -> set[int]:
        """The rows to leave out.

        Raises:
            InputError: such a failure is not to be passed over.
        """
        for failure in failures:
            path = Path(self.root, failure.name)
            if not failure.damaged:
                raise InputError(f"{path} cannot be read: {failure.reason}")
            if self.on_corrupt is OnCorrupt.error:
                raise InputError(
                    f"{path} is damaged ({failure.reason}): replace it, or leave such images out with "
                    "data.on_corrupt=skip"
                )
            self.skipped.add(failure.name)
        return {failure.row for failure in failures}

    def _split(self, split: SplitName) -> Files:
        return self.validation if split == "validation" else self.test


def to_device(images: Tensor, normalisation: Normalisation, device: torch.device) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] on the device, normalised there, in channels_last memory."""
    return normalisation(images.to(device, non_blocking=True).permute(0, 3, 1, 2))


class TrainingPhotographs:
    """Augmented batches, see `experiments.harness.batches.TrainingData`: one epoch at a time.

    Raises:
        InputError: from `epoch`, where an image, or all but one of a micro-batch, cannot be read.
    """

    def __init__(
        self,
        photographs: Photographs,
        sharing: Sharing,
        normalisation: Normalisation,
        seed: int,
        device: torch.device,
        workers: int,
    ) -> None:
        self.batches = sharing.batches(len(photographs.train))
        self.photographs = photographs
        self.sharing = sharing
        self.normalisation = normalisation
        self.device = device
        rows = TrainingRows(
            photographs.root, photographs.train, photographs.size, photographs.flip, seed, sharing
        )
        self._items: list[tuple[str, int, int]] = []  # changed for every epoch; the workers stay
        self._loader = _loader(rows, self._items, device, workers)
        if workers:
            iter(self._loader)  # starts them

    def __len__(self) -> int:
        """Images per epoch, over all ranks."""
        return len(self.photographs.train)

    def epoch(self, stream: str, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This rank's share of the batches from `first` on; `Batch.images` counts skipped images, too."""
        self._items[:] = [(stream, epoch, batch) for batch in range(first, self.batches)]
        for (_, _, batch), rows in zip(self._items, self._loader, strict=True):
            images = min(self.sharing.batch_size, len(self) - batch * self.sharing.batch_size)
            yield Batch(self._parts(rows, self.sharing.parts(images)), images)

    def _parts(self, rows: Rows, parts: list[slice]) -> list[tuple[Tensor, Tensor]]:
        images, labels, failures = rows
        lost = self.photographs.lost_rows(failures)
        images, labels = (tensor.to(self.device, non_blocking=True) for tensor in (images, labels))
        done = []
        for part in parts:
            mine: Any = slice(part.start - parts[0].start, part.stop - parts[0].start)
            if lost:
                mine = [row for row in range(mine.start, mine.stop) if row not in lost]
                if len(mine) < SMALLEST_PART:
                    raise InputError(
                        f"{len(mine)} of {part.stop - part.start} images of a batch can be read, {failures[0].name} "
                        f"cannot: replace the damaged images in {self.photographs.root}, or use more images per batch"
                    )
            done.append((to_device(images[mine], self.normalisation, self.device), labels[mine]))
        return done


def load(cfg: PhotographsConfig) -> Photographs:
    """The configured data set: which files there are; no image is read.

    The test split is val/; validation images come out of train/, see `experiments.harness.data.load`.

    Raises:
        InputError: the folders are not as they must be, or the configuration does not fit them.
    """
    if cfg.image_size < 1:
        raise InputError(f"data.image_size={cfg.image_size} must be at least 1")
    if not len(cfg.mean) == len(cfg.std) == 3:
        raise InputError(
            f"data.mean={cfg.mean} and data.std={cfg.std} must have 3 numbers, one per channel"
        )
    root = Path(cfg.root)
    if cfg.name == "imagenette" and not root.is_dir():
        root = _imagenette(root)
    for folder in (root, root / "train", root / "val"):
        if not folder.is_dir():
            raise InputError(
                f"{folder} is no folder: data.root={cfg.root} must hold train/ and val/ with a folder per class, as in "
                "train/n01440764/n01440764_10026.JPEG; name another place with PSAP_DATA or data.root"
            )
    index = read_index(root)
    train, wnids = _classified(root, index, "train")
    flat = index["val"].names and not _wnids(index, "val")
    test, test_wnids = _flat(root, index["val"]) if flat else _classified(root, index, "val")
    if len(wnids) < 2:
        raise InputError(
            f"{root / 'train'} holds a single class, {wnids[0]}: there is nothing to learn from it"
        )
    if different := set(wnids) ^ set(test_wnids):
        wnid = min(different)
        has, lacks = ("train", "val") if wnid in wnids else ("val", "train")
        raise InputError(
            f"{root / has} holds the class {wnid} and {root / lacks} does not: they must hold the same"
        )
    validation, training = (
        part.numpy() for part in split_index(torch.from_numpy(train.labels), cfg)
    )
    return Photographs(
        str(root),
        train.take(training),
        train.take(validation),
        test,
        len(wnids),
        cfg.image_size,
        cfg.flip,
        cfg.on_corrupt,
    )


def _imagenette(root: Path) -> Path:
    """torchvision's folder beside `root`, or `root`, downloaded."""
    beside = root.parent / "imagenette2"
    if beside.is_dir():
        return beside
    if not root.parent.is_dir():
        raise InputError(
            f"{root.parent} is no folder: create it, or name another one with PSAP_DATA or data.root"
        )
    from torchvision.datasets import Imagenette

    try:
        # Elsewhere first: an interrupted download must not look like a data set.
        with tempfile.TemporaryDirectory(prefix="imagenette-", dir=root.parent) as folder:
            Imagenette(folder, download=True)
            Path(folder, "imagenette2").rename(root)
    except (OSError, RuntimeError) as error:
        if root.is_dir():  # another process was faster
            return root
        raise InputError(f"Imagenette could not be downloaded to {root.parent}: {error}") from error
    return root


# The index: what lies in the folders.


class Folder(NamedTuple):
    """When a folder was modified, in ns, and its image files: names and sizes in bytes."""

    modified: int
    names: list[str]
    sizes: list[int]


Index = dict[str, Folder]  # of train, val and every class folder, by the path below the root


def read_index(root: Path) -> Index:
    """What lies below `root`; from the cache, where no folder has been modified since."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "psap")
    cache = folder / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError):
        index = _parsed(cache.read_bytes())
        if all((root / name).stat().st_mtime_ns == entry.modified for name, entry in index.items()):
            return index
    index = _scanned(root)
    with suppress(OSError):  # without a cache the next start takes longer, and that is all
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, _serialised(index))
    return index


def _scanned(root: Path) -> Index:
    index = {}
    for split in ("train", "val"):
        index[split], names = _scanned_folder(root / split)
        for name in names:
            if not re.fullmatch(r"n\d{8}", name):
                raise InputError(
                    f"{root / split / name} is named after no WordNet id (n and eight digits, as n01440764): "
                    "rename it, or move it elsewhere"
                )
            index[f"{split}/{name}"], _ = _scanned_folder(root / split / name)
    return index


def _scanned_folder(folder: Path) -> tuple[Folder, list[str]]:
    """The folder's images and the names of the folders in it."""
    # Before the scan: what changes meanwhile is seen the next time.
    modified = folder.stat().st_mtime_ns
    images, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(SUFFIXES):
                images.append((entry.name, entry.stat().st_size))
            elif entry.is_dir():
                folders.append(entry.name)
    images.sort()
    return Folder(modified, [name for name, _ in images], [size for _, size in images]), sorted(
        folders
    )


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


def _wnids(index: Index, split: str) -> list[str]:
    return sorted(name.removeprefix(f"{split}/") for name in index if name.startswith(f"{split}/"))


def _classified(root: Path, index: Index, split: str) -> tuple[Files, list[str]]:
    """A split with a folder per class, and its classes."""
    wnids = _wnids(index, split)
    folders = [index[f"{split}/{wnid}"] for wnid in wnids]
    for path, folder in zip((root / split / wnid for wnid in wnids), folders, strict=True):
        if not folder.names:
            raise InputError(
                f"{path} holds no images (*{', *'.join(SUFFIXES)}): fill it, or remove it"
            )
    if not wnids:
        raise InputError(
            f"{root / split} holds no images in folders per class, as in {split}/n01440764/*.JPEG"
        )
    names = (
        f"{split}/{wnid}/{name}"
        for wnid, folder in zip(wnids, folders, strict=True)
        for name in folder.names
    )
    labels = np.repeat(np.arange(len(wnids)), [len(folder.names) for folder in folders])
    return _files(names, labels, (size for folder in folders for size in folder.sizes)), wnids


def _flat(root: Path, folder: Folder) -> tuple[Files, list[str]]:
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
    found = [wnid[Path(name).stem] for name in folder.names]
    wnids = sorted(set(found))
    labels = np.searchsorted(wnids, found)
    return _files((f"val/{name}" for name in folder.names), labels, folder.sizes), wnids


def _files(names: Iterable[str], labels: NDArray[np.intp], sizes: Iterable[int]) -> Files:
    encoded = np.array([os.fsencode(name) for name in names])
    return Files(encoded, labels.astype(np.int64), np.array(list(sizes), dtype=np.int64))
