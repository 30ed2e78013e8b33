"""What the loop asks of a data set, and how a batch is divided over processes and micro-batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from psap_core import InputError

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
        smallest = min(self.batch_size, images % self.batch_size or self.batch_size)
        if smallest // (self.ranks * self.accumulate) < SMALLEST_PART:
            raise InputError(
                f"optim.batch_size={self.batch_size} leaves a part of fewer than two images, on which BatchNorm cannot "
                f"train, of {images} training images: change optim.batch_size or data.train_images"
            )
        return -(-images // self.batch_size)

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

    def __len__(self) -> int:
        """Images per epoch, over all ranks."""

    def epoch(self, stream: str, epoch: int, first: int = 0) -> Iterator[Batch]:
        """This rank's share of the batches from `first` on."""
