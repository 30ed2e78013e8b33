"""From the final plan on, the network in training is the small one, and an epoch costs what that one costs."""

import gc
import math
import time
from collections.abc import Generator
from contextlib import closing
from itertools import count, islice
from typing import Any

import torch

from experiments.methods.base import Callback, Method, Metrics
from experiments.training.cuda_graph import WARM_UP_CALLS
from experiments.training.optim import make_optimizer
from experiments.training.setup import Setup
from experiments.training.steps import Steps, make_steps, wrapped
from psap_core import export_error
from psap_core.inputs import copy_network

WARM_UP_STEPS = (
    WARM_UP_CALLS + 2
)  # kernels are chosen, momentum gets its memory, a step is captured
TIMED_STEPS = 5
LARGEST_SHARE = 0.1  # of a run's steps, which may be done beforehand to time the dense network


class Compaction(Callback):
    """A method whose network becomes the small one when its plan is final.

    Model, parameters and optimiser stay the same objects. The wrapper that a step calls is made anew.

    Args:
        steps: of the training, told about the new wrapper.
        dense_epoch_seconds: what `dense_epoch_seconds` measured, if it did.

    Attributes:
        relative_error: max|a - b| / max|a| of the networks' outputs before and after, in float64; None: it is to come.
    """

    def __init__(
        self, method: Method, setup: Setup, steps: Steps, dense_epoch_seconds: float | None
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
        plan = self.method.plan
        network_macs = plan.macs if self.method.is_compact else plan.dense_macs
        costs: dict[str, float] = {"train/macs": len(self.setup.images) * network_macs}
        if self.dense_epoch_seconds is not None:
            costs["train/dense_seconds"] = self.dense_epoch_seconds
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


def dense_epoch_seconds(setup: Setup) -> float | None:
    """Seconds that an epoch of the unpruned network takes here, by some of its steps. Nothing of the run changes.

    None: the run is so short that they would be a large part of it.
    """
    warm_up, timed = _steps_to_time(setup)
    if warm_up + timed > LARGEST_SHARE * setup.cfg.epochs * setup.images.batches:
        return None
    setup.world.say("timing some steps of the dense network")
    seconds_per_image = _dense_seconds_per_image(setup, warm_up, timed)
    gc.collect()  # captured steps hold themselves
    return seconds_per_image * len(setup.images) / setup.world.size


def _steps_to_time(setup: Setup) -> tuple[int, int]:
    """Steps that go first, when kernels are chosen and what was read ahead is used up, and steps that are timed."""
    warm_up = WARM_UP_STEPS + setup.images.batches_ahead
    timed = TIMED_STEPS + setup.images.batches_ahead
    batches = setup.images.batches
    if warm_up + timed > batches:  # whole epochs, as their last batch is smaller
        warm_up = math.ceil(warm_up / batches) * batches
        timed = math.ceil(timed / batches) * batches
    return warm_up, timed


def _dense_seconds_per_image(setup: Setup, warm_up: int, timed: int) -> float:
    """Of a copy that is trained for some steps."""
    model = copy_network(setup.model).train()
    steps = make_steps(
        setup.fast,
        wrapped(model, setup.fast, setup.world),
        make_optimizer(model, setup.cfg.optim),
        setup.images,
        setup.world,
        setup.device,
        setup.autocast,
        lambda: None,
        setup.loss,
    )
    devices = [setup.device] if setup.device.type == "cuda" else []
    with torch.random.fork_rng(devices), closing(_endless(steps)) as images_of_steps:
        sum(islice(images_of_steps, warm_up))
        _wait_for(setup.device)
        began = time.perf_counter()
        images = sum(islice(images_of_steps, timed))
        _wait_for(setup.device)
        return (time.perf_counter() - began) / images


def _endless(steps: Steps) -> Generator[int, None, None]:
    for epoch in count():
        yield from steps.epoch(epoch, 0)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
