"""Small data sets as uint8 tensors that stay on the device, with their batched augmentation.

All random numbers of an epoch are drawn at its start from a generator seeded by (seed, stream, epoch), so the
position within an epoch is one integer and a run can be continued at any batch.
"""

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.data.base import (
    Batch,
    Normalisation,
    Sharing,
    SplitName,
    split_index,
    stratified_order,
)
from experiments.data.downloads import downloading
from experiments.schema import DataConfig
from experiments.seeding import generator
from psap_core import InputError

EVALUATION_BATCH = 1000
CIFAR10_SHAPES = {
    "train_images": (50000, 3, 32, 32),
    "train_labels": (50000,),
    "test_images": (10000, 3, 32, 32),
    "test_labels": (10000,),
}
CIFAR10_CLASSES = 10
DIGITS_TEST_IMAGES = 360


@dataclass(frozen=True)
class LabelledImages:
    """Images uint8 [N, C, H, W] and labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "LabelledImages":
        return LabelledImages(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "LabelledImages":
        return LabelledImages(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class TensorImages:
    """The three splits of a data set; `validation` may be empty, `flip` says whether mirror images train, too."""

    train: LabelledImages
    validation: LabelledImages
    test: LabelledImages
    flip: bool

    skipped: ClassVar[set[str]] = set()  # every image is readable

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[C, H, W]."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    @property
    def classes(self) -> int:
        return int(self.test.labels.max()) + 1

    @property
    def digest(self) -> str:
        """SHA-256 over all pixels and labels, in order."""
        digest = hashlib.sha256()
        for split in (self.train, self.validation, self.test):
            digest.update(split.images.cpu().numpy().tobytes())
            digest.update(split.labels.cpu().numpy().tobytes())
        return digest.hexdigest()

    def to(self, device: torch.device) -> "TensorImages":
        return TensorImages(
            self.train.to(device), self.validation.to(device), self.test.to(device), self.flip
        )

    def count(self, split: SplitName) -> int:
        """Number of images."""
        return len(self.validation if split == "validation" else self.test)

    def training(
        self,
        sharing: Sharing,
        normalisation: Normalisation,
        seed: int,
        device: torch.device,
        workers: int,
    ) -> "TensorLoader":
        """The training split, augmented; `workers` have nothing to read here."""
        return TensorLoader(self.train.to(device), normalisation, sharing, self.flip, seed)

    def evaluation(
        self,
        split: SplitName,
        rank: int,
        ranks: int,
        normalisation: Normalisation,
        device: torch.device,
        workers: int,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's images, every `ranks`-th: float32 [B, C, S, S] and labels int64 [B]."""
        whole = (self.validation if split == "validation" else self.test).to(device)
        parts = (
            torch.split(part[rank::ranks], EVALUATION_BATCH)
            for part in (whole.images, whole.labels)
        )
        return ((normalisation(images), labels) for images, labels in zip(*parts, strict=True))


def load_resident(cfg: DataConfig) -> TensorImages:
    """A data set that fits the device's memory, on the CPU; see `load`."""
    loaders = {"digits": _load_digits, "cifar10": _load_cifar10}
    if cfg.name not in loaders:
        raise InputError(
            f"data.name={cfg.name!r} does not name the chosen data: choose with "
            "data=<digits|cifar10|imagenet|imagenette>"
        )
    train, test = loaders[cfg.name](Path(cfg.root))
    channels = train.images.shape[1]
    if not len(cfg.mean) == len(cfg.std) == channels:
        raise InputError(
            f"data.mean={cfg.mean} and data.std={cfg.std} must have {channels} numbers, one per channel"
        )
    validation_index, train_index = split_index(train.labels, cfg)
    validation, train = train.take(validation_index), train.take(train_index)
    train, validation, test = (
        _resized(split, cfg.image_size) for split in (train, validation, test)
    )
    return TensorImages(train, validation, test, cfg.flip)


def _load_digits(root: Path) -> tuple[LabelledImages, LabelledImages]:
    """scikit-learn's 1,797 handwritten digits, 8x8, grey; they come with the library."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    digits = LabelledImages(images, torch.from_numpy(bunch.target).long())
    order = stratified_order(digits.labels)
    return digits.take(order[DIGITS_TEST_IMAGES:]), digits.take(order[:DIGITS_TEST_IMAGES])


def _load_cifar10(root: Path) -> tuple[LabelledImages, LabelledImages]:
    """root/cifar10.safetensors; made by torchvision's download and one conversion where it is absent."""
    path = root / "cifar10.safetensors"
    if not root.is_dir():
        raise InputError(
            f"data.root={root} is no folder: create it, or name another one with PSAP_DATA or data.root"
        )
    tensors = _read_cifar10(root, path)
    for name, shape in CIFAR10_SHAPES.items():
        if (
            name not in tensors
            or tensors[name].shape != shape
            or tensors[name].dtype != torch.uint8
        ):
            raise InputError(f"{path} has no uint8 tensor {name!r} of shape {list(shape)}")
        if name.endswith("labels") and tensors[name].max() >= CIFAR10_CLASSES:
            raise InputError(f"{path} is damaged: {name} has a label above {CIFAR10_CLASSES - 1}")
    return tuple(  # type: ignore[return-value]
        LabelledImages(tensors[f"{split}_images"], tensors[f"{split}_labels"].long())
        for split in ("train", "test")
    )


def _read_cifar10(root: Path, path: Path) -> dict[str, Tensor]:
    if not path.exists():
        if not os.access(root, os.W_OK):
            return _torchvisions_cifar10(root)  # a shared folder is used as it is
        with downloading(root):
            if not path.exists():
                _write_cifar10(_torchvisions_cifar10(root), path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path} is damaged ({error}): delete it and it is made again") from error


def _torchvisions_cifar10(root: Path) -> dict[str, Tensor]:
    """The images of torchvision's folder, which is downloaded where it is absent."""
    from torchvision.datasets import CIFAR10

    tensors = {}
    for name, train in (("train", True), ("test", False)):
        try:
            source = CIFAR10(str(root), train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise InputError(f"CIFAR-10 could not be downloaded to {root}: {error}") from error
        tensors[f"{name}_images"] = torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous()
        tensors[f"{name}_labels"] = torch.tensor(source.targets, dtype=torch.uint8)
    return tensors


def _write_cifar10(tensors: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={"dataset": "CIFAR-10"})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _resized(split: LabelledImages, size: int) -> LabelledImages:
    """Area downsampling to size x size pixels, rounded."""
    native = split.images.shape[-1]
    if size == native:
        return split
    if not 1 <= size < native:
        raise InputError(f"data.image_size={size} must be between 1 and the images' own {native}")
    small = [
        F.interpolate(part.float(), size=(size, size), mode="area")
        for part in torch.split(split.images, 1000)
    ]
    images = (
        torch.cat(small) if small else split.images.new_zeros(0, split.images.shape[1], size, size)
    )
    return LabelledImages(images.round().to(torch.uint8), split.labels)


def crop_windows(size: int, padding: int) -> Tensor:
    """The pixels of a padded image that each crop shows: int64 [(2 padding + 1)^2 * 2, size * size].

    Crops go by their upper left corner, row by row, each as it is and mirrored; a pixel is its place in the flat image.
    """
    corner, pixel = torch.arange(2 * padding + 1), torch.arange(size)
    rows = (corner[:, None] + pixel).view(-1, 1, 1, size, 1)
    columns = corner[:, None, None] + torch.stack([pixel, pixel.flip(0)])
    flat = rows * (size + 2 * padding) + columns.view(1, -1, 2, 1, size)
    return flat.reshape(-1, size * size)


def crop(padded: Tensor, windows: Tensor) -> Tensor:
    """One crop per image; equal, bit for bit, to torchvision's crop and hflip.

    Args:
        padded: [B, C, Hp, Wp].
        windows: a row of `crop_windows` for every image, int64 [B, S * S].

    Returns:
        [B, C, S, S].
    """
    batch, channels = padded.shape[:2]
    size = math.isqrt(windows.shape[1])
    crops = padded.flatten(2).gather(2, windows[:, None].expand(-1, channels, -1))
    return crops.view(batch, channels, size, size)


class TensorLoader:
    """The training split on its device, padded once, and its augmented batches: random crop and flip.

    Args:
        split: the images, on the device they stay on.
        normalisation: applied to every batch.
        sharing: which images of a batch are this rank's.
        flip: mirror half of the images.
        seed: the run's seed.
    """

    def __init__(
        self,
        split: LabelledImages,
        normalisation: Normalisation,
        sharing: Sharing,
        flip: bool,
        seed: int,
    ) -> None:
        self.batches = sharing.batches(len(split))
        self.batches_ahead = 0
        size = split.images.shape[-1]
        self.padding = size // 8  # 4 pixels at 32x32
        self.padded = F.pad(split.images, (self.padding,) * 4)
        self.windows = crop_windows(size, self.padding).to(split.images.device)
        self.labels = split.labels
        self.normalisation = normalisation
        self.sharing = sharing
        self.flip = flip
        self.seed = seed

    def __len__(self) -> int:
        """Images per epoch."""
        return len(self.labels)

    def draw(self, stream: str, epoch: int) -> Tensor:
        """A stream's epoch: numbers of images, in their order, and of their windows, int64 [2, N]."""
        draw, count, corners = generator(self.seed, stream, epoch), len(self), 2 * self.padding + 1
        order = torch.randperm(count, generator=draw)
        top, left = torch.randint(corners, (2, count), generator=draw)
        flip = torch.rand(count, generator=draw) < (0.5 if self.flip else 0.0)
        return torch.stack([order, (top * corners + left) * 2 + flip]).to(self.labels.device)

    def augmented(self, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Images float32 [B, C, S, S], normalised, and labels int64 [B] for some columns [2, B] of a draw."""
        index, window = drawn
        images = crop(self.padded.index_select(0, index), self.windows.index_select(0, window))
        return self.normalisation(images), self.labels.index_select(0, index)

    def epoch(self, stream: str, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This rank's share of the batches from `first` on of a stream's epoch."""
        drawn = self.draw(stream, epoch)
        for start in range(first * self.sharing.batch_size, len(self), self.sharing.batch_size):
            images = min(self.sharing.batch_size, len(self) - start)
            mine = (
                slice(start + part.start, start + part.stop) for part in self.sharing.parts(images)
            )
            yield Batch([self.augmented(drawn[:, part]) for part in mine], images)
