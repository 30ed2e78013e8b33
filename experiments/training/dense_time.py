"""How long an epoch of the unpruned network takes here: what a run's training time is compared with."""

import gc
import math
import time
from collections.abc import Generator
from contextlib import closing
from itertools import count, islice

import torch
from torch import nn

from experiments import models
from experiments.schema import Fast
from experiments.training.cuda_graph import WARM_UP_CALLS
from experiments.training.optim import make_optimizer
from experiments.training.setup import Setup
from experiments.training.steps import Steps, make_steps, wrapped
from psap_core.inputs import copy_network

# In these kernels are chosen, momentum gets its memory, a step is captured.
WARM_UP_STEPS = WARM_UP_CALLS + 2
TIMED_STEPS = 20
LARGEST_SHARE = 0.1  # of a run's steps, which may be done beforehand to time the dense network


def dense_epoch_seconds(setup: Setup) -> float | None:
    """Seconds that an epoch of the unpruned network takes here, by some of its steps. Nothing of the run changes.

    None: the run is so short that they would be a large part of it, the dense network would have to be compiled for
    them, or it does not fit into the device's memory.
    """
    if setup.fast is Fast.compiled:
        return None
    warm_up, timed = _steps_to_time(setup)
    if warm_up + timed > LARGEST_SHARE * setup.cfg.epochs * setup.images.batches:
        return None
    setup.world.say("timing some steps of the dense network")
    try:
        seconds_per_image = _dense_seconds_per_image(setup, warm_up, timed)
    except torch.OutOfMemoryError:
        if setup.world.size > 1:  # the others wait in this one's step
            raise
        return None
    finally:
        gc.collect()  # captured steps hold themselves
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
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
    devices = [setup.device] if setup.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        model = _dense_network(setup)
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
        with closing(_endless(steps)) as images_of_steps:
            sum(islice(images_of_steps, warm_up))
            _wait_for(setup.device)
            began = time.perf_counter()
            images = sum(islice(images_of_steps, timed))
            _wait_for(setup.device)
            return (time.perf_counter() - began) / images


def _dense_network(setup: Setup) -> nn.Module:
    """The run's model without any pruning: a copy, or where the run trains a thin network, one with fresh weights."""
    cfg = setup.cfg.model
    if setup.network is cfg:
        return copy_network(setup.model).train()
    channels, _, size = setup.dataset.image_shape
    model = models.build(cfg, channels, setup.dataset.classes, size)
    return model.to(setup.device).to(memory_format=torch.channels_last).train()


def _endless(steps: Steps) -> Generator[int, None, None]:
    for epoch in count():
        yield from steps.epoch(epoch, 0)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
