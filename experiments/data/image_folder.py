"""Images in folders, as ImageNet's or one's own: decoded, cropped and scaled by workers while the network trains.

A worker builds a whole batch of one rank as one uint8 tensor; it is normalised on the device. The crops of a batch
are a pure function of (seed, stream, epoch, batch), so neither the number of processes nor that of workers shows,
and an epoch can be entered at any batch.
"""

import atexit
import functools
import hashlib
import io
import os
import signal
import sys
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from experiments.data.base import (
    SMALLEST_PART,
    Batch,
    Normalisation,
    Sharing,
    SplitName,
    split_index,
)
from experiments.data.downloads import downloading
from experiments.data.folder_index import (
    Files,
    Index,
    class_folders,
    files_by_class,
    files_by_table,
    left_out,
    read_index,
    refuse_other_than_wnids,
)
from experiments.data.transforms import DRAWS, evaluation_view, training_view, upright
from experiments.schema import ImageFolderConfig, OnCorrupt, OwnFolderConfig
from experiments.seeding import generator
from psap_core import InputError
from psap_core.files import read_plain

EVALUATION_BATCH = 128
BATCHES_AHEAD = 2  # per worker
TEST_FOLDERS = ("val", "valid", "validation", "test")  # the first that is there


class Failure(NamedTuple):
    """An image that could not be had: its position in the batch, its file, and whether the file is to blame."""

    row: int
    name: str
    reason: str
    damaged: bool


# Images uint8 [N, S, S, 3], labels int64 [N], rows without an image.
Views = tuple[Tensor, Tensor, list[Failure]]


def read_views(
    root: str,
    files: Files,
    size: int,
    turn: bool,
    view: Callable[[int, Image.Image], NDArray[np.uint8]],
) -> Views:
    """The views of all files; a failure is a value, because an exception would leave a worker as a traceback.

    The rows without an image hold anything.

    Args:
        root: the folder that the names are relative to.
        turn: take images as `upright` makes them.
        view: makes uint8 [S, S, 3] of a file's position and its opened image.
    """
    images = torch.empty(len(files), size, size, 3, dtype=torch.uint8)
    if get_worker_info() is not None:
        images.share_memory_()  # where it must come to lie in any case
    rows, failures = images.numpy(), []
    for row, encoded in enumerate(files.names.tolist()):
        name = os.fsdecode(encoded)
        try:
            data = read_plain(Path(root, name))
        except OSError as error:
            failures.append(Failure(row, name, error.strerror or str(error), damaged=False))
            continue
        try:
            image: Image.Image = Image.open(io.BytesIO(data))
            if turn:
                image = upright(image)
            rows[row] = view(row, image)
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
class TrainingViews(Dataset[Views]):
    """One rank's rows of any training batch, asked for by (stream, epoch, batch)."""

    root: str
    files: Files
    size: int
    turn: bool
    flip: bool
    seed: int
    sharing: Sharing

    def __getitem__(self, item: tuple[str, int, int]) -> Views:
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
        return read_views(
            self.root,
            self.files.take(index[mine]),
            self.size,
            self.turn,
            lambda row, image: training_view(image, self.size, uniforms[row], self.flip),
        )


@dataclass(frozen=True)
class EvaluationViews(Dataset[Views]):
    """Consecutive evaluation images, asked for by the number of their batch."""

    root: str
    files: Files
    size: int
    turn: bool

    def __getitem__(self, batch: int) -> Views:
        files = self.files.take(slice(batch * EVALUATION_BATCH, (batch + 1) * EVALUATION_BATCH))
        return read_views(
            self.root,
            files,
            self.size,
            self.turn,
            lambda _, image: evaluation_view(image, self.size),
        )


def read_image(path: Path, size: int, turn: bool) -> Tensor:
    """One file as it is evaluated, uint8 [1, S, S, 3]. Raises InputError where it cannot be read."""
    files = Files(np.array([os.fsencode(path)]), np.zeros(1, np.int64), np.zeros(1, np.int64))
    images, _, failures = read_views(
        "", files, size, turn, lambda _, image: evaluation_view(image, size)
    )
    for failure in failures:
        raise InputError(f"{path} cannot be read: {failure.reason}")
    return images


def _loader(
    rows: Dataset[Views], items: Iterable[Any], device: torch.device, workers: int
) -> DataLoader[Views]:
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


def _end_workers(loader: "weakref.ref[DataLoader[Views]]") -> None:
    """After an error the loader may outlive main; the interpreter would wait for each worker, which ignores it."""
    if (data_loader := loader()) is not None and data_loader._iterator is not None:
        workers: Any = data_loader._iterator
        workers._shutdown_workers()
        for worker in workers._workers:
            worker.kill()


@dataclass(frozen=True)
class ImageFolder:
    """The three splits of a data set of photographs; `validation` may be empty.

    Attributes:
        class_names: in the order of their labels: WordNet ids, or names of folders.
        turn: take images as `upright` makes them.
        left_out: paths, relative to the root, of files and folders that no class takes.
        skipped: names, relative to the root, of the images found damaged so far, where `on_corrupt` allows it.
    """

    root: str
    train: Files
    validation: Files
    test: Files
    class_names: list[str]
    size: int
    turn: bool
    flip: bool
    on_corrupt: OnCorrupt
    left_out: list[str] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)

    @property
    def classes(self) -> int:
        """Their number."""
        return len(self.class_names)

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
    ) -> "FolderLoader":
        """The training split, augmented, read by `workers` processes; by this one if there are none."""
        return FolderLoader(self, sharing, normalisation, seed, device, workers)

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
            EvaluationViews(self.root, files, self.size, self.turn), items, device, workers
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


class FolderLoader:
    """Augmented batches, see `experiments.data.base.TrainingData`: one epoch at a time.

    Raises:
        InputError: from `epoch`, where an image, or all but one of a micro-batch, cannot be read.
    """

    def __init__(
        self,
        photographs: ImageFolder,
        sharing: Sharing,
        normalisation: Normalisation,
        seed: int,
        device: torch.device,
        workers: int,
    ) -> None:
        self.batches = sharing.batches(len(photographs.train))
        self.batches_ahead = BATCHES_AHEAD * workers
        self.photographs = photographs
        self.sharing = sharing
        self.normalisation = normalisation
        self.device = device
        rows = TrainingViews(
            photographs.root,
            photographs.train,
            photographs.size,
            photographs.turn,
            photographs.flip,
            seed,
            sharing,
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

    def _parts(self, rows: Views, parts: list[slice]) -> list[tuple[Tensor, Tensor]]:
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


def load_image_folder(cfg: ImageFolderConfig) -> ImageFolder:
    """The configured data set: which files there are; no image is read.

    The test split is val/, or drawn from all images where an own folder has none; validation images come out of what
    is left, see `experiments.data.load_dataset`.

    Raises:
        InputError: the folders are not as they must be, or the configuration does not fit them.
    """
    if cfg.image_size < 1:
        raise InputError(f"data.image_size={cfg.image_size} must be at least 1")
    if not len(cfg.mean) == len(cfg.std) == 3:
        raise InputError(
            f"data.mean={cfg.mean} and data.std={cfg.std} must have 3 numbers, one per channel"
        )
    splits = _own_splits(cfg) if isinstance(cfg, OwnFolderConfig) else _imagenet_splits(cfg)
    validation, training = split_index(torch.from_numpy(splits.train.labels), cfg)
    return ImageFolder(
        root=str(splits.root),
        train=splits.train.take(training.numpy()),
        validation=splits.train.take(validation.numpy()),
        test=splits.test,
        class_names=splits.classes,
        size=cfg.image_size,
        turn=isinstance(cfg, OwnFolderConfig),
        flip=cfg.flip,
        on_corrupt=cfg.on_corrupt,
        left_out=splits.left_out,
    )


class Splits(NamedTuple):
    """Training and test images below a root, and its classes."""

    root: Path
    train: Files
    test: Files
    classes: list[str]
    left_out: list[str]


def _imagenet_splits(cfg: ImageFolderConfig) -> Splits:
    root = Path(cfg.root)
    if cfg.name == "imagenette" and not root.is_dir():
        root = _imagenette(root)
    splits = ("train", "val")
    for folder in (root, *(root / split for split in splits)):
        if not folder.is_dir():
            raise InputError(
                f"{folder} is no folder: data.root={cfg.root} must hold train/ and val/ with a folder per class, as in "
                "train/n01440764/n01440764_10026.JPEG; name another place with PSAP_DATA or data.root"
            )
    index = read_index(root, splits)
    refuse_other_than_wnids(root, index, splits)
    train, classes = _training_files(root, index, "train")
    if index["val"].names and not class_folders(index, "val"):
        test, test_classes = files_by_table(root, index["val"])
    else:
        test, test_classes = files_by_class(root, index, "val")
    _refuse_other_classes(root, "val", classes, test_classes)
    return Splits(root, train, test, classes, left_out=[])


def _own_splits(cfg: OwnFolderConfig) -> Splits:
    root = Path(cfg.root)
    if not root.is_dir():
        raise InputError(
            f"data.root={root} is no folder: it must hold a folder of images per class"
        )
    has_train = (root / "train").is_dir()
    given = [name for name in TEST_FOLDERS if has_train and (root / name).is_dir()]
    _refuse_misnamed_splits(root, ("train", *TEST_FOLDERS) if has_train else ())
    if given:
        splits = ("train", given[0])
        index = read_index(root, splits)
        train, classes = _training_files(root, index, "train")
        test, test_classes = files_by_class(root, index, given[0])
        _refuse_other_classes(root, given[0], classes, test_classes)
        return Splits(root, train, test, classes, given[1:] + left_out(index, splits))
    if has_train:
        root = root / "train"
    index = read_index(root, (".",))
    images, classes = _training_files(root, index, ".")
    train_rows, test_rows = held_out(images.labels, classes, cfg.test_share)
    train, test = images.take(train_rows), images.take(test_rows)
    return Splits(root, train, test, classes, left_out(index, (".",)))


def _refuse_misnamed_splits(root: Path, splits: Collection[str]) -> None:
    """A folder that is called like a split and is none of `splits` would be taken for a class, or not at all."""
    for folder in sorted(root.iterdir()):
        is_called_like_one = folder.name.lower() in ("train", "training", *TEST_FOLDERS)
        if is_called_like_one and folder.name not in splits and folder.is_dir():
            raise InputError(
                f"{folder} is called like a split: data.root must hold train/ (and val/), or a folder of images per "
                "class; rename the folder, or name another data.root"
            )


def _training_files(root: Path, index: Index, split: str) -> tuple[Files, list[str]]:
    files, classes = files_by_class(root, index, split)
    if len(classes) == 1:
        raise InputError(
            f"{root / split} holds a single class, {classes[0]}: there is nothing to learn from it"
        )
    return files, classes


def _refuse_other_classes(root: Path, split: str, train: list[str], test: list[str]) -> None:
    if different := set(train) ^ set(test):
        name = min(different)
        has, lacks = ("train", split) if name in train else (split, "train")
        raise InputError(
            f"{root / has} holds the class {name} and {root / lacks} does not: they must hold the same"
        )


def held_out(
    labels: NDArray[np.int64], classes: Sequence[str], share: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which images train and which test: of each class this share, at least one image and not all, by a fixed seed.

    Raises:
        InputError: the share is not between 0 and 1, or a class has a single image.
    """
    if not 0 < share < 1:
        raise InputError(f"data.test_share={share} must be between 0 and 1")
    is_test = np.zeros(len(labels), dtype=bool)
    order = torch.randperm(len(labels), generator=generator("test")).numpy()
    for label, name in enumerate(classes):
        images = order[labels[order] == label]
        if len(images) < 2:
            raise InputError(
                f"data.root holds a single image of the class {name}: add another one, to test with"
            )
        count = min(max(1, round(share * len(images))), len(images) - 1)
        is_test[images[:count]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def _imagenette(root: Path) -> Path:
    """torchvision's folder beside `root`, or `root`, downloaded."""
    beside = root.parent / "imagenette2"
    if beside.is_dir():
        return beside
    if not root.parent.is_dir():
        raise InputError(
            f"{root.parent} is no folder: create it, or name another one with PSAP_DATA or data.root"
        )
    with downloading(root.parent):
        if not root.is_dir():
            _download_imagenette(root)
    return root


def _download_imagenette(root: Path) -> None:
    from torchvision.datasets import Imagenette

    print(f"downloading Imagenette (1.5 GB) to {root}", file=sys.stderr)
    try:
        # Elsewhere first: an interrupted download must not look like a data set.
        with tempfile.TemporaryDirectory(prefix="imagenette-", dir=root.parent) as folder:
            Imagenette(folder, download=True)
            Path(folder, "imagenette2").rename(root)
    except (OSError, RuntimeError) as error:
        raise InputError(f"Imagenette could not be downloaded to {root.parent}: {error}") from error
