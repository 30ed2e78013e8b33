"""What every data set shares: normalisation, splits, what the loop asks of it, and how a batch is divided."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from experiments.schema import DataConfig
from experiments.seeding import generator
from psap_core import InputError

SplitName = Literal["validation", "test"]
SMALLEST_PART = 2  # BatchNorm cannot train on one image


class Batch(NamedTuple):
    """What one optimiser step of one rank sees.

    Attributes:
        parts: micro-batches: images float32 [B, C, S, S], normalised, and labels int64 [B], on the device.
        images: number of images of the whole batch, over all ranks and micro-batches.
    """

    parts: list[tuple[Tensor, Tensor]]
    images: int


@dataclass(frozen=True)
class Sharing:
    """Who gets which images of a batch: `ranks` processes, `accumulate` micro-batches each.

    Raises:
        InputError: `batch_size` (images per optimiser step, over all ranks) cannot be divided so.
    """

    batch_size: int
    rank: int = 0
    ranks: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.accumulate < 1:
            raise InputError(
                f"optim.batch_size={self.batch_size} and optim.accumulate={self.accumulate} must be at least 1"
            )
        if self.batch_size % (self.ranks * self.accumulate):
            raise InputError(
                f"optim.batch_size={self.batch_size} cannot be divided over {self.ranks} processes with "
                f"optim.accumulate={self.accumulate}: choose a multiple of {self.ranks * self.accumulate}"
            )

    def batches(self, images: int) -> int:
        """Batches per epoch of `images` images; the last one holds the rest.

        Raises:
            InputError: some rank would get fewer than two images of some batch, on which BatchNorm cannot train.
        """
        if not self._can_train(images):
            whole_batches = images - images % self.batch_size
            advice = "change optim.batch_size or data.train_images"
            if self._can_train(whole_batches):
                advice = f"add data.train_images={whole_batches}, or change optim.batch_size"
            raise InputError(
                f"optim.batch_size={self.batch_size} leaves a part of fewer than two images, on which BatchNorm cannot "
                f"train, of {images} training images: {advice}"
            )
        return -(-images // self.batch_size)

    def _can_train(self, images: int) -> bool:
        """Does every rank get at least two images of every micro-batch?"""
        last = images % self.batch_size or self.batch_size
        smallest = min(images, last)
        return smallest // (self.ranks * self.accumulate) >= SMALLEST_PART

    def parts(self, images: int) -> list[slice]:
        """Positions of this rank's micro-batches in a batch of `images` images, as equal as can be."""
        pieces = self.ranks * self.accumulate
        bounds = [images * piece // pieces for piece in range(pieces + 1)]
        mine = range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate)
        return [slice(bounds[piece], bounds[piece + 1]) for piece in mine]


class TrainingData(Protocol):
    """Augmented batches; an epoch is a pure function of (seed, stream, epoch), whatever the number of ranks."""

    @property
    def batches(self) -> int:
        """Batches per epoch."""

    @property
    def batches_ahead(self) -> int:
        """Batches that are read before they are asked for."""

    def __len__(self) -> int:
        """Images per epoch, over all ranks."""

    def epoch(self, stream: str, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This rank's share of the batches from `first` on."""


@dataclass(frozen=True)
class Normalisation:
    """Per-channel mean and standard deviation of pixels in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        numbers = all(map(math.isfinite, (*self.mean, *self.std)))
        if (
            not numbers
            or not all(value > 0 for value in self.std)
            or len(self.mean) != len(self.std)
        ):
            raise InputError(
                f"data.mean={list(self.mean)} and data.std={list(self.std)} must be equally many finite numbers, "
                "those of data.std above 0"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, C, H, W] -> float32 [N, C, H, W]."""
        mean, std = self._on(images.device)
        # In place, because memory is the bottleneck.
        return images.to(torch.float32, copy=True).div_(255).sub_(mean).div_(std)

    @functools.cache  # noqa: B019  (few; a copy to the device at every batch would wait for it)
    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, device=device).view(-1, 1, 1) for values in (self.mean, self.std)
        )
        return mean, std


def split_index(labels: Tensor, cfg: DataConfig) -> tuple[Tensor, Tensor]:
    """Which training images (labels int64 [N]) validate and which train; see `load`."""
    left = len(labels) - cfg.validation_images
    wanted = left if cfg.train_images is None else cfg.train_images
    if cfg.validation_images < 0 or not 0 < wanted <= left:
        raise InputError(
            f"data.validation_images={cfg.validation_images} and data.train_images={cfg.train_images} do not "
            f"fit into the {len(labels)} training images of {cfg.name}"
        )
    order = stratified_order(labels)
    return order[: cfg.validation_images], order[cfg.validation_images :][:wanted]


def stratified_order(labels: Tensor) -> Tensor:
    """A fixed random order [N] of which every prefix holds equally many of each class, as they last."""
    order = torch.randperm(len(labels), generator=generator("split"))
    by_class = labels[order].argsort(stable=True)
    sizes = labels.long().bincount()
    rank = torch.empty_like(order)  # of an image among those of its class
    rank[by_class] = torch.arange(len(order)) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return order[rank.argsort(stable=True)]
