"""The training loop. It trains, evaluates and says where it stands; everything else is a callback."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from experiments.exits import Interrupted
from experiments.methods.base import Callback, Metrics
from experiments.training.distributed import World
from experiments.training.steps import Steps
from psap_core import InputError


@dataclass
class Position:
    """Where a training stands: all that the loop itself needs to continue.

    Attributes:
        epoch: completed epochs.
        batch: optimiser steps done in the current epoch.
        images, loss_sum: number of this rank's images of the current epoch so far, and their losses' sum.
        epoch_seconds, seconds: spent training, in the current epoch and in the completed ones; callbacks
            count, evaluation does not.
    """

    epoch: int = 0
    batch: int = 0
    images: int = 0
    loss_sum: float = 0.0
    epoch_seconds: float = 0.0
    seconds: float = 0.0


@dataclass
class Loop:
    """One training, continued from `position`.

    Attributes:
        steps: does an epoch's optimiser steps.
        callback: the method, told when an epoch is complete; `steps` tells it of every step.
        learning_rate: of an epoch; the first is 0.
        evaluate: top-1 in percent for an epoch's curve.
        log: takes an epoch's metrics.
        save: writes a checkpoint of the present state.
        stop_requested: asked after every optimiser step; all ranks get the same answer.
        advance: told that another optimiser step is done.
    """

    model: nn.Module
    steps: Steps
    world: World
    callback: Callback
    epochs: int
    learning_rate: Callable[[int], float]
    evaluate: Callable[[], float]
    log: Callable[[Metrics], None]
    save: Callable[[Position], None]
    stop_requested: Callable[[], bool]
    advance: Callable[[], None]
    position: Position

    def train(self) -> None:
        """Train until `epochs` epochs are complete.

        Raises:
            InputError: the loss or the network is not finite; the last checkpoint is from before.
            Interrupted: a stop was requested; a checkpoint is written.
        """
        self.callback.before_train()
        while self.position.epoch < self.epochs:
            metrics = self._train_epoch(self.position.epoch)
            metrics["eval/top1"] = self.evaluate()
            self.log(metrics)
            self.save(self.position)
            if self.stop_requested() and self.position.epoch < self.epochs:
                raise Interrupted

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        position = self.position
        lr = self.learning_rate(epoch)
        for group in self.steps.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        loss_sum = self.steps.loss_sum.fill_(position.loss_sum)
        began = time.perf_counter() - position.epoch_seconds
        for images in self.steps.epoch(epoch, position.batch):
            position.images += images
            position.batch += 1
            self.advance()
            if self.stop_requested():
                position.loss_sum = _finite(loss_sum, self.model, epoch)
                position.epoch_seconds = time.perf_counter() - began
                self.save(self.position)
                raise Interrupted
        mean_loss = self._summed(_finite(loss_sum, self.model, epoch)) / self._summed(
            position.images
        )
        self.world.share_buffers_(self.model)
        trained = time.perf_counter() - began
        metrics = {
            "epoch": epoch + 1,
            "train/loss": mean_loss,
            "train/lr": lr,
            "train/images_per_second": len(self.steps.images) / trained,
            **self.callback.end_epoch(epoch + 1),
        }
        self.position = Position(epoch + 1, seconds=position.seconds + time.perf_counter() - began)
        return metrics

    def _summed(self, value: float) -> float:
        return self.world.sum(torch.tensor(value, dtype=torch.float64)).item()


def _finite(loss_sum: Tensor, model: nn.Module, epoch: int) -> float:
    """The sum as a number, where it and everything that a checkpoint of the network holds is finite."""
    value = loss_sum.item()
    if not abs(value) < float("inf"):
        raise InputError(
            f"the loss became {value} in epoch {epoch + 1}: lower optim.lr (the last checkpoint is older)"
        )
    if not torch.stack([tensor.isfinite().all() for tensor in model.state_dict().values()]).all():
        raise InputError(
            f"the network's weights are not finite in epoch {epoch + 1}: lower optim.lr (the last checkpoint is older)"
        )
    return value


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in percent over `images` images."""

    top1: float
    top5: float
    images: int


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], world: World) -> Accuracy:
    """Accuracy over every rank's batches, in evaluation mode; the model's modes are put back.

    Raises:
        InputError: there is no image.
    """
    was_training = model.training
    model.eval()
    hits, count = torch.zeros(2, dtype=torch.long), 0  # of the first guess, and of the first five
    for images, labels in batches:
        logits = model(images)
        hit = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        hits = hits.to(labels.device) + torch.stack([hit[:, 0].sum(), hit.sum()])
        count += len(labels)
    model.train(was_training)
    # Only here does it wait for the device.
    top1, top5, count = world.sum(torch.tensor([*hits.tolist(), count])).tolist()
    if not count:
        raise InputError("not one of the images to evaluate on can be read")
    return Accuracy(100 * top1 / count, 100 * top5 / count, count)
