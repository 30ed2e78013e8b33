"""From the final plan on, the network in training is the small one, and an epoch costs what that one costs."""

import time
from contextlib import closing
from statistics import median
from typing import Any

import torch

from experiments.methods.base import Callback, Method, Metrics
from experiments.training.optim import make_optimizer
from experiments.training.setup import Setup
from experiments.training.steps import Steps, make_steps, wrapped
from psap_core import export_error, macs
from psap_core.inputs import copy_network

WARM_UP_STEPS = 2  # a GPU chooses its kernels, momentum gets its memory
TIMED_STEPS = 5


class Compaction(Callback):
    """A method whose network becomes the small one when its plan is final.

    Model, parameters and optimiser stay the same objects. The wrapper that a step calls is made anew.

    Args:
        steps: of the training, told about the new wrapper.
        dense_epoch_seconds: what `dense_epoch_seconds` measured.

    Attributes:
        relative_error: max|a - b| / max|a| of the networks' outputs before and after, in float64; None: it is to come.
    """

    def __init__(
        self, method: Method, setup: Setup, steps: Steps, dense_epoch_seconds: float
    ) -> None:
        self.method, self.setup, self.steps = method, setup, steps
        self.dense_epoch_seconds = dense_epoch_seconds
        self.relative_error: float | None = None

    def before_train(self) -> None:
        self.method.before_train()
        self._compact_if_final(0)

    def after_step(self) -> None:
        self.method.after_step()

    def end_epoch(self, epochs_done: int) -> Metrics:
        images = len(self.setup.images)
        costs = {
            "train/macs": images * macs(self.setup.model, self.setup.example),
            "train/dense_seconds": self.dense_epoch_seconds,
        }
        metrics = self.method.end_epoch(epochs_done)
        self._compact_if_final(epochs_done)
        return {**costs, **metrics}

    def state_dict(self) -> dict[str, Any]:
        return {**self.method.state_dict(), "relative_error": self.relative_error}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; a network that was small becomes small, and is to be given its weights after this."""
        self.relative_error = state["relative_error"]
        self.method.load_state_dict(state)
        if self.method.is_compact:
            self._wrap_again()

    def _compact_if_final(self, epochs_done: int) -> None:
        if self.method.is_compact or not self.method.plan_is_final(epochs_done):
            return
        model = self.setup.model
        before = copy_network(model)
        self.method.compact_()
        self.relative_error = export_error(before, model, self.method.plan)
        self._wrap_again()

    def _wrap_again(self) -> None:
        self.setup.wrap_again()
        self.steps.use(self.setup.net)


def dense_epoch_seconds(setup: Setup) -> float:
    """Seconds that an epoch of the unpruned network takes here: the median of a few steps, for all images.

    A copy is trained. Nothing of the run changes.
    """
    world, device = setup.world, setup.device
    model = copy_network(setup.model).train()
    optimizer = make_optimizer(model, setup.cfg.optim)
    net = wrapped(model, setup.fast, world)
    steps = make_steps(
        setup.fast, net, optimizer, setup.images, world, device, setup.autocast, lambda: None
    )
    seconds_per_image = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), closing(steps.epoch(0, 0)) as epoch:
        began = time.perf_counter()
        for images in epoch:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds_per_image.append((time.perf_counter() - began) / images)
            if len(seconds_per_image) == WARM_UP_STEPS + TIMED_STEPS:
                break
            began = time.perf_counter()
    timed = seconds_per_image[WARM_UP_STEPS:] or seconds_per_image
    return median(timed) * len(setup.images) / world.size
