"""The optimiser steps of an epoch: `Steps` is the readable reference, `CapturedSteps` the same as one CUDA graph."""

import os
import shutil
from collections.abc import Callable, Generator

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from experiments.data.base import Batch, TrainingData
from experiments.data.tensor_images import TensorLoader
from experiments.schema import Fast
from experiments.training.cuda_graph import CudaGraph
from experiments.training.distributed import World
from experiments.training.loss import Loss
from psap_core import InputError

CROSS_ENTROPY = Loss()


class Steps:
    """Trains on one batch after the other.

    Args:
        net: computes the model's outputs in training: the model itself, or its wrapper.
        autocast: type in which the forward pass may compute; None: float32.
        after_step: called after every optimiser step.
        loss: of a micro-batch.

    Attributes:
        loss_sum: sum of the losses of this rank's images since it was set, float64 on the device.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        images: TrainingData,
        world: World,
        device: torch.device,
        autocast: torch.dtype | None,
        after_step: Callable[[], None],
        loss: Loss = CROSS_ENTROPY,
    ) -> None:
        self.net, self.optimizer, self.images, self.world = net, optimizer, images, world
        self.device, self.autocast, self.after_step = device, autocast, after_step
        self.loss = loss
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def use(self, net: nn.Module) -> None:
        """Go on with another wrapper: the network's parameters have other shapes now."""
        self.net = net

    def epoch(self, epoch: int, first: int) -> Generator[int, None, None]:
        """Do the epoch's steps from batch `first` on; yields after each one how many images it had on this rank."""
        for batch in self.images.epoch("train", epoch, first):
            self.train(batch)
            yield sum(len(labels) for _, labels in batch.parts)

    def train(self, batch: Batch) -> None:
        """One optimiser step. On a GPU it only launches kernels: nothing in it waits for the device."""
        self.optimizer.zero_grad()
        for number, (images, labels) in enumerate(batch.parts, 1):
            with self.world.synchronised(self.net, number == len(batch.parts)):
                with torch.autocast(
                    self.device.type, self.autocast, enabled=self.autocast is not None
                ):
                    loss = self.loss.in_training(self.net, images, labels)
                # Averaged over the ranks, this is the gradient of the whole batch's mean loss. (Skipped images
                # are in batch.images: their batch counts a little less.)
                (loss * (self.world.size * len(labels) / batch.images)).backward()
            self.loss_sum += loss.detach().double() * len(labels)
        self.optimizer.step()
        self.after_step()


class CapturedSteps(Steps):
    """The same steps as a replayed graph, augmentation included; for one process and images that lie on its device.

    A graph repeats what it captured on the same memory: networks, optimisers and masks must be changed in place.
    Learning rates are numbers in it, so another one is captured anew; an epoch's last, smaller batch trains without it.

    Args:
        capture: makes the function that is called in place of one that only launches kernels.
    """

    images: TensorLoader

    def __init__(
        self,
        net: nn.Module,
        optimizer: Optimizer,
        images: TensorLoader,
        world: World,
        device: torch.device,
        autocast: torch.dtype | None,
        after_step: Callable[[], None],
        loss: Loss = CROSS_ENTROPY,
        capture: Callable[[Callable[[], None]], Callable[[], None]] = CudaGraph,
    ) -> None:
        super().__init__(net, optimizer, images, world, device, autocast, after_step, loss)
        self.batch_size = images.sharing.batch_size
        self.drawn = torch.empty(2, len(images), dtype=torch.long, device=device)
        # Of the next batch.
        self.columns = torch.empty(self.batch_size, dtype=torch.long, device=device)
        self.capture = capture
        self.replay: Callable[[], None] | None = None
        self.captured_rates: list[float] = []

    def use(self, net: nn.Module) -> None:
        super().use(net)
        self.replay = None

    def epoch(self, epoch: int, first: int) -> Generator[int, None, None]:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        if self.replay is None or rates != self.captured_rates:
            self.replay, self.captured_rates = self.capture(self._train_next), rates
        start = first * self.batch_size
        self.drawn.copy_(self.images.draw("train", epoch))
        torch.arange(start, start + self.batch_size, out=self.columns)
        for left in range(len(self.images) - start, 0, -self.batch_size):
            if left >= self.batch_size:
                self.replay()
            else:
                self.train(Batch([self.images.augmented(self.drawn[:, -left:])], left))
            yield min(left, self.batch_size)

    def _train_next(self) -> None:
        self.train(
            Batch(
                [self.images.augmented(self.drawn.index_select(1, self.columns))], self.batch_size
            )
        )
        self.columns += self.batch_size


def wrapped(model: nn.Module, fast: Fast, world: World) -> nn.Module:
    """The network that a training step calls: compiled where that was chosen, and one of the processes'."""
    net: nn.Module = model
    if fast is Fast.compiled:
        net = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return world.wrap(net)


def make_steps(
    fast: Fast,
    net: nn.Module,
    optimizer: Optimizer,
    images: TrainingData,
    world: World,
    device: torch.device,
    autocast: torch.dtype | None,
    after_step: Callable[[], None],
    loss: Loss = CROSS_ENTROPY,
) -> Steps:
    """The steps of a training that `choose_fast` has chosen; `net` is what `wrapped` makes."""
    if fast is Fast.captured:
        assert isinstance(images, TensorLoader)
        return CapturedSteps(net, optimizer, images, world, device, autocast, after_step, loss)
    return Steps(net, optimizer, images, world, device, autocast, after_step, loss)


def choose_fast(
    fast: Fast,
    device: torch.device,
    images: TrainingData,
    world: World,
    optimizer: Optimizer,
    loss: Loss = CROSS_ENTROPY,
) -> Fast:
    """How steps are done here: eager, compiled or captured; `auto` captures where that is possible.

    Raises:
        InputError: what is asked for is not possible here.
    """
    in_one_piece = isinstance(images, TensorLoader) and images.sharing.accumulate == world.size == 1
    is_plain = isinstance(optimizer, SGD) and loss.mixup == 0
    capturable = device.type == "cuda" and in_one_piece and is_plain
    if fast is Fast.auto:
        return Fast.captured if capturable else Fast.eager
    if fast is Fast.captured and not capturable:
        raise InputError(
            "runtime.fast=captured needs a CUDA device, digits or CIFAR-10 on it, one process, SGD without mixup and "
            "optim.accumulate=1: use runtime.fast=auto"
        )
    compiler = os.environ.get("CXX", "g++")
    if fast is Fast.compiled and shutil.which(compiler) is None:
        raise InputError(
            f"runtime.fast=compiled needs a C++ compiler, there is no {compiler}: use runtime.fast=auto"
        )
    return fast
