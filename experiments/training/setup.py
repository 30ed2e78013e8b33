"""What a training is made of before its first step: data, network, optimiser, and how they lie on the device."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments import models, seeding
from experiments.data import ImageFolder, TensorImages, load_dataset
from experiments.data.base import Normalisation, Sharing, SplitName, TrainingData
from experiments.methods.base import SaveStep
from experiments.methods.registry import MethodContext
from experiments.methods.thin import starting_network
from experiments.schema import (
    Config,
    Fast,
    ModelConfig,
    PackageModelConfig,
    Precision,
    ThinPlanConfig,
)
from experiments.training.devices import device_name, has_bfloat16, reading_workers
from experiments.training.distributed import World
from experiments.training.loop import Accuracy, evaluate
from experiments.training.loss import Loss, make_loss
from experiments.training.optim import make_optimizer
from experiments.training.steps import choose_fast, wrapped


@dataclass
class Setup:
    """All that is there before the first step and before anything is written.

    Attributes:
        network: what `model` was built from: the run's model, or the small one of `thin` and `thin_plan`.
        net: computes the model's outputs in training: the model itself, or its wrapper.
        workers: processes that read the images of a split.
        example: one image of the data's shape.
    """

    cfg: Config
    device: torch.device
    world: World
    dataset: TensorImages | ImageFolder
    normalisation: Normalisation
    workers: int
    images: TrainingData
    network: ModelConfig
    model: nn.Module
    net: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Loss
    example: Tensor
    fast: Fast

    @property
    def autocast(self) -> torch.dtype | None:
        """The type in which the forward pass may compute; None: float32."""
        if self.cfg.optim.precision is Precision.auto and has_bfloat16(self.device):
            return torch.bfloat16
        return None

    @property
    def curve(self) -> SplitName:
        """The images that an epoch's accuracy is of."""
        return "validation" if self.dataset.count("validation") else "test"

    @property
    def batches_for_a_pulse(self) -> int:
        """Micro-batches of an epoch."""
        return self.images.batches * self.cfg.optim.accumulate

    def wrap_again(self) -> None:
        """Make what wraps the network anew, after its shapes changed."""
        self.net = wrapped(self.model, self.fast, self.world)
        self.world.settle(self.net, self.example)

    def accuracy(self, network: nn.Module, split: SplitName) -> Accuracy:
        world = self.world
        batches = self.dataset.evaluation(
            split, world.rank, world.size, self.normalisation, self.device, self.workers
        )
        return evaluate(network, batches, world)

    def micro_batches(self, stream: str, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of a stream's epoch, in its parts."""
        for batch in self.images.epoch(stream, epoch):
            yield from batch.parts

    def pulse_batches(self, epochs_done: int) -> Iterator[tuple[Tensor, Tensor]]:
        return self.micro_batches("pulse", epochs_done)

    def loss_of_batch(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, labels = batch
        return self.loss.of_logits(self.net(pixels), labels)

    def method_context(self, save: SaveStep) -> MethodContext:
        return MethodContext(
            self.cfg,
            self.model,
            self.optimizer,
            self.example,
            self.pulse_batches,
            self.loss_of_batch,
            self.batches_for_a_pulse,
            save,
        )


def set_up(cfg: Config, device: torch.device, world: World) -> Setup:
    """Load the data, make the network and the optimiser, choose how a step is done.

    Raises:
        InputError: whatever of the configuration does not fit the data, the network or the machine.
    """
    sharing = Sharing(cfg.optim.batch_size, world.rank, world.size, cfg.optim.accumulate)
    loss = make_loss(cfg.optim)
    if isinstance(cfg.model, PackageModelConfig):
        models.require_known_name(cfg.model)
    seeding.seed_everything(cfg.seed)
    world.say(f"reading {cfg.data.name} from {cfg.data.root}")
    # The first rank goes first: what it downloads or caches, the others find.
    dataset = world.first(lambda: load_dataset(cfg.data, device))
    if dataset is None:
        dataset = load_dataset(cfg.data, device)
    channels, _, size = dataset.image_shape
    world.say(
        f"{len(dataset.train):,} training and {dataset.count('test'):,} test images of {dataset.classes} classes"
    )
    if isinstance(dataset, ImageFolder) and dataset.left_out:
        world.say(
            f"left out, as no class takes them: {len(dataset.left_out):,} files and folders in {dataset.root}, such as "
            f"{dataset.left_out[0]}"
        )
    world.say(f"making {cfg.model.name}")
    network = starting_network(cfg, channels, dataset.classes, size)
    model, normalisation = _started(network, channels, dataset.classes, size, world)
    if isinstance(cfg.method, ThinPlanConfig):
        models.initialise_(model, cfg.model.fan, cfg.model.name)
    model.to(device).to(memory_format=torch.channels_last)
    seeding.seed_rank(cfg.seed, world.rank)
    if normalisation is None:
        normalisation = Normalisation(tuple(cfg.data.mean), tuple(cfg.data.std))
    workers = reading_workers(cfg.runtime, world)
    images = dataset.training(sharing, normalisation, cfg.seed, device, workers)
    optimizer = make_optimizer(model, cfg.optim)
    fast = choose_fast(cfg.runtime.fast, device, images, world, optimizer, loss)
    return Setup(
        cfg=cfg,
        device=device,
        world=world,
        dataset=dataset,
        normalisation=normalisation,
        workers=workers,
        images=images,
        network=network,
        model=model,
        net=wrapped(model, fast, world),
        optimizer=optimizer,
        loss=loss,
        example=torch.zeros(1, channels, size, size, device=device),
        fast=fast,
    )


def _started(
    network: ModelConfig, channels: int, classes: int, size: int, world: World
) -> tuple[nn.Module, Normalisation | None]:
    """The network that every rank starts from; what the first one downloads, the others find."""

    def start() -> tuple[nn.Module, Normalisation | None]:
        return models.start(network, channels, classes, size, new_classifier=True)

    return world.first(start) or start()


def manifest_facts(setup: Setup) -> dict[str, Any]:
    """What the manifest says of data, machine and speed."""
    return {
        "data_sha256": setup.dataset.digest,
        "device": device_name(setup.device),
        "world_size": setup.world.size,
        "autocast": str(setup.autocast),
        "compile": setup.fast is Fast.compiled,
        "fast": setup.fast.value,
        "threads": torch.get_num_threads(),
    }
