"""Training on one GPU; random images of CIFAR-10's shape and number lie on it, a run is a process.

resnet56_epoch_seconds_fast, _eager: an epoch of ResNet-56, batch 128, with runtime.fast=auto and eager, float32 (in
    convolutions TF32, torch's default), the deterministic kernels that runs use; without pruning.
resnet56_epoch_seconds_bfloat16: fast, with bfloat16 autocast.
runs_per_gpu_speedup: images per second of 8 concurrent runs of ResNet-20, all together, over those of one alone.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from experiments.benchmarks import Figures, cifar_resnet, figure, seconds, sgd
from experiments.data.base import Normalisation, Sharing
from experiments.data.tensor_images import LabelledImages, TensorLoader
from experiments.schema import Fast
from experiments.seeding import seed_everything
from experiments.training.distributed import World
from experiments.training.steps import choose_fast, make_steps, wrapped

IMAGES, BATCH, EPOCHS, RUNS, REPETITIONS = 50_000, 128, 3, 8, 3
NORMALISATION = Normalisation((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
START_SECONDS = 300  # patience with the slowest process


def gpu() -> Figures:
    figures = {
        "resnet56_epoch_seconds_fast": figure(epoch_seconds(56, "cuda", Fast.auto)),
        "resnet56_epoch_seconds_eager": figure(epoch_seconds(56, "cuda", Fast.eager)),
        "resnet56_epoch_seconds_bfloat16": figure(
            epoch_seconds(56, "cuda", Fast.auto, torch.bfloat16)
        ),
    }
    speedups = [images_per_second(RUNS) / images_per_second(1) for _ in range(REPETITIONS)]
    return figures | {"runs_per_gpu_speedup": figure(speedups)}


def epoch_seconds(
    depth: int,
    device_type: str,
    fast: Fast,
    autocast: torch.dtype | None = None,
    images: int = IMAGES,
    wait: Callable[[], object] = lambda: None,
) -> list[float]:
    """Durations of some epochs; a first one, which captures the step, is not counted, and followed by `wait`."""
    seed_everything(0)
    device = torch.device(device_type)
    model = cifar_resnet(depth).to(device)
    split = LabelledImages(
        torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (images,))
    ).to(device)
    batches = TensorLoader(split, NORMALISATION, Sharing(BATCH), True, seed=0)
    world = World()
    optimizer = sgd(model)
    chosen = choose_fast(fast, device, batches, world, optimizer)
    net = wrapped(model, chosen, world)
    steps = make_steps(chosen, net, optimizer, batches, world, device, autocast, lambda: None)

    def train(epoch: int) -> float:
        for _ in steps.epoch(epoch, 0):
            pass
        return steps.loss_sum.item()  # waits for the device

    train(0)
    wait()
    return [seconds(lambda: train(epoch)) for epoch in range(1, EPOCHS + 1)]  # noqa: B023


def images_per_second(runs: int, device_type: str = "cuda", images: int = IMAGES) -> float:
    """Of so many concurrent processes together, each training ResNet-20."""
    context = get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(runs, context) as pool:
        wait = manager.Barrier(runs, timeout=START_SECONDS).wait
        arguments = 20, device_type, Fast.auto, None, images, wait
        trained = [pool.submit(epoch_seconds, *arguments) for _ in range(runs)]
        return sum(EPOCHS * images / sum(run.result()) for run in trained)
