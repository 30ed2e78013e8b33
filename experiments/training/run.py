"""One training, from the data to the exported network: what `experiments.train` does for a run that is not done."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import data, models, seeding
from experiments.data import Dataset, Photographs
from experiments.data.base import Normalisation, Sharing, SplitName, TrainingData
from experiments.exits import Interrupted, one_sentence
from experiments.methods.base import Method, Metrics
from experiments.methods.registry import MethodContext, make_method
from experiments.methods.thin import starting_network
from experiments.runs.folder import Record
from experiments.runs.summary import RunSummary
from experiments.schema import Config, Fast, ModelConfig, Precision, ThinPlanConfig
from experiments.training import checkpoint, distributed
from experiments.training.devices import configure, device_name, has_bfloat16, reading_workers
from experiments.training.distributed import World
from experiments.training.loop import Accuracy, Loop, Position, evaluate
from experiments.training.optim import learning_rate, make_optimizer
from experiments.training.progress import RunProgress
from experiments.training.signals import StopSignals
from experiments.training.steps import Steps, choose_fast, make_steps
from experiments.training.tracking import Tracker
from psap_core import InputError, PrunePlan, export, export_error, macs, params, save_exported


def train_here(cfg: Config, record: Record) -> None:
    """Train (or continue) a run on this process's device, with the other processes that torchrun started."""
    with distributed.join() as world:
        device = configure(cfg.runtime, world)
        if any(world.gather(record.done)):
            return
        with closing(record), StopSignals() as signals:
            try:
                _train(cfg, record, device, world, signals)
            except Interrupted:
                if world.is_first:
                    record.interrupt()
                world.wait()  # whoever leaves first ends the others
                raise
            except Exception as error:
                if world.is_first and (record.begun or cfg.suite is not None):
                    record.fail(one_sentence(error))
                raise


@dataclass(frozen=True)
class _Training:
    """What one training is made of.

    Attributes:
        network: what `model` was built from: the run's model, or the small one of `thin` and `thin_plan`.
        workers: processes that read the images of a split.
        example: one image of the data's shape.
    """

    cfg: Config
    record: Record
    device: torch.device
    world: World
    dataset: Dataset | Photographs
    normalisation: Normalisation
    workers: int
    images: TrainingData
    network: ModelConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    example: Tensor
    fast: Fast
    method: Method
    steps: Steps

    def accuracy(self, network: nn.Module, split: SplitName) -> Accuracy:
        batches = self.dataset.evaluation(
            split,
            self.world.rank,
            self.world.size,
            self.normalisation,
            self.device,
            self.workers,
        )
        return evaluate(network, batches, self.world)


def _train(
    cfg: Config, record: Record, device: torch.device, world: World, signals: StopSignals
) -> None:
    training = _make(cfg, record, device, world)
    world.settle(training.steps.net, training.example)
    facts = _facts(training)
    world.first(lambda: record.begin(cfg, facts))
    tracker = Tracker(cfg, record.config_hash, record.folder) if world.is_first else None
    position = _all_epochs(training, tracker, signals)
    _finish(training, tracker, position)


def _make(cfg: Config, record: Record, device: torch.device, world: World) -> _Training:
    """All that is there before the first step and before anything is written."""
    sharing = Sharing(cfg.optim.batch_size, world.rank, world.size, cfg.optim.accumulate)
    seeding.seed_everything(cfg.seed)
    # The first rank goes first: what it downloads or caches, the others find.
    dataset = world.first(lambda: data.load(cfg.data, device)) or data.load(cfg.data, device)
    channels, _, size = dataset.image_shape
    network = starting_network(cfg, channels, dataset.classes, size)
    model, normalisation = models.start(network, channels, dataset.classes, new_classifier=True)
    if isinstance(cfg.method, ThinPlanConfig):
        models.initialise_(model, cfg.model.fan, cfg.model.name)
    model.to(device).to(memory_format=torch.channels_last)
    seeding.seed_rank(cfg.seed, world.rank)
    normalisation = normalisation or Normalisation(tuple(cfg.data.mean), tuple(cfg.data.std))
    optimizer = make_optimizer(model, cfg.optim)
    workers = reading_workers(cfg.runtime, world)
    images = dataset.training(sharing, normalisation, cfg.seed, device, workers)
    fast = choose_fast(cfg.runtime.fast, device, images, world)
    example = torch.zeros(1, channels, size, size, device=device)
    autocast = _autocast(cfg, device)

    def pulse_batches(epochs_done: int) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in images.epoch("pulse", epochs_done):
            yield from batch.parts

    def loss_of_batch(batch: tuple[Tensor, Tensor]) -> Tensor:
        pixels, labels = batch
        return F.cross_entropy(steps.net(pixels), labels)

    def save_step(kind: str, epochs_done: int, text: str) -> None:
        if world.is_first:
            record.save_step(kind, epochs_done, text)

    parts = images.batches * cfg.optim.accumulate
    method = make_method(
        MethodContext(
            cfg, model, optimizer, example, pulse_batches, loss_of_batch, parts, save_step
        )
    )
    steps = make_steps(fast, model, optimizer, images, world, device, autocast, method.after_step)
    return _Training(
        cfg=cfg,
        record=record,
        device=device,
        world=world,
        dataset=dataset,
        normalisation=normalisation,
        workers=workers,
        images=images,
        network=network,
        model=model,
        optimizer=optimizer,
        example=example,
        fast=fast,
        method=method,
        steps=steps,
    )


def _autocast(cfg: Config, device: torch.device) -> torch.dtype | None:
    """The type in which the forward pass may compute; None: float32."""
    if cfg.optim.precision is Precision.auto and has_bfloat16(device):
        return torch.bfloat16
    return None


def _facts(training: _Training) -> dict[str, Any]:
    """What the manifest says of data, machine and speed."""
    return {
        "data_sha256": training.dataset.digest,
        "device": device_name(training.device),
        "world_size": training.world.size,
        "autocast": str(training.steps.autocast),
        "compile": training.fast is Fast.compiled,
        "fast": training.fast.value,
    }


def _all_epochs(training: _Training, tracker: Tracker | None, signals: StopSignals) -> Position:
    """Train from the last checkpoint, or from the beginning, to the end; returns where that is."""
    cfg = training.cfg
    world = training.world
    batches = training.images.batches
    position = _resume(
        training.record,
        training.model,
        training.optimizer,
        training.method,
        training.dataset.skipped,
        world,
        training.device,
    )
    _refuse_another_position(training.record, position, world)
    curve: SplitName = "validation" if training.dataset.count("validation") else "test"
    with RunProgress(
        f"{cfg.name} {cfg.method.name}",
        cfg.epochs,
        batches,
        steps_done=position.epoch * batches + position.batch,
        quiet=not world.is_first,
    ) as progress:
        loop = Loop(
            model=training.model,
            steps=training.steps,
            world=world,
            callback=training.method,
            epochs=cfg.epochs,
            learning_rate=lambda epoch: learning_rate(cfg.optim, epoch, cfg.epochs),
            evaluate=lambda: training.accuracy(training.model, curve).top1,
            log=lambda metrics: _log(training, tracker, progress, metrics),
            save=lambda: _save_checkpoint(training, loop.position),
            stop_requested=lambda: world.any(signals.received),
            advance=progress.advance,
            position=position,
        )
        loop.train()
    return loop.position


def _log(
    training: _Training, tracker: Tracker | None, progress: RunProgress, metrics: Metrics
) -> None:
    """Record an epoch's metrics, with the images that no rank could read."""
    skipped: set[str] = set().union(*training.world.gather(training.dataset.skipped))
    if tracker is not None:
        row = {**metrics, "data/skipped_images": len(skipped)} if skipped else metrics
        training.record.log(row)
        tracker.log(row)
        progress.epoch(row)


def _save_checkpoint(training: _Training, position: Position) -> None:
    """Write the present state, of which every rank has a part of its own."""
    record = training.record
    own = {
        "generators": checkpoint.generators(training.device),
        "images": position.images,
        "loss_sum": position.loss_sum,
        "skipped": sorted(training.dataset.skipped),
    }
    ranks = training.world.gather(own)
    if training.world.is_first:
        state = {
            "config_hash": record.config_hash,
            "seed": training.cfg.seed,
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "method": training.method.state_dict(),
            "position": asdict(position),
            "ranks": ranks,
            "metrics_bytes": record.metrics_bytes(),
        }
        checkpoint.save(record.checkpoint, state)
    training.world.wait()


def _refuse_another_position(record: Record, position: Position, world: World) -> None:
    seen = set(world.gather((position.epoch, position.batch)))
    if len(seen) > 1:
        raise InputError(
            f"the processes see different checkpoints in {record.folder}: {sorted(seen)}; try again later"
        )


def _finish(training: _Training, tracker: Tracker | None, position: Position) -> None:
    """Export the network, and write it with the run's summary."""
    masked = training.accuracy(training.model, "test")
    training.method.finish()
    small = export(training.model, training.method.plan)
    exported = training.accuracy(small, "test")
    start_top1 = _start_top1(training)
    if tracker is not None:
        summary = _save_results(training, small, exported, masked, start_top1, position)
        tracker.finish(training.record.rows(), asdict(summary))
        training.record.finish()
    training.world.wait()


def _start_top1(training: _Training) -> float | None:
    """Of the weights that the run began with, if it did with some."""
    cfg = training.cfg.model
    if cfg.weights is None:
        return None
    channels = training.dataset.image_shape[0]
    start, _ = models.start(cfg, channels, training.dataset.classes, new_classifier=True)
    start.to(training.device).to(memory_format=torch.channels_last)
    return training.accuracy(start, "test").top1


def _save_results(
    training: _Training,
    small: nn.Module,
    exported: Accuracy,
    masked: Accuracy,
    start_top1: float | None,
    position: Position,
) -> RunSummary:
    """Write the exported network and the summary; returns the latter."""
    cfg = training.cfg
    record = training.record
    dataset = training.dataset
    plan = training.method.plan
    dense_macs = macs(_dense(training), training.example)
    small_macs = macs(small, training.example)
    _save_exported(
        record.folder / "export", training.network, small, plan, training.normalisation, dataset
    )
    summary = RunSummary(
        dataset=cfg.data.name,
        image_size=dataset.image_shape[2],
        train_images=len(training.images),
        model=cfg.model.name,
        method=cfg.method.name,
        epochs=cfg.epochs,
        seed=cfg.seed,
        suite=cfg.suite,
        cell=cfg.cell,
        start_top1=start_top1,
        top1=exported.top1,
        top5=exported.top5,
        masked_top1=masked.top1,
        test_images=exported.images,
        macs=small_macs,
        macs_cut=1 - small_macs / dense_macs,
        params=params(small),
        export_max_relative_error=export_error(training.model, small, plan),
        # Forward MACs of the network in training times images seen; a training step costs three times it.
        train_macs=macs(training.model, training.example) * len(training.images) * cfg.epochs,
        train_seconds=position.seconds,
        prune_seconds=sum(row.get("psap/step_seconds", 0.0) for row in record.rows()),
        config_hash=record.config_hash,
    )
    record.save_summary(summary)
    return summary


def _dense(training: _Training) -> nn.Module:
    """The network that the run's model is without any pruning."""
    cfg = training.cfg.model
    if training.network is cfg:
        return training.model
    channels = training.dataset.image_shape[0]
    return models.build(cfg, channels, training.dataset.classes).to(training.device)


def _resume(
    record: Record,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: Method,
    skipped: set[str],
    world: World,
    device: torch.device,
) -> Position:
    """Load the run's checkpoint, if it has one, and cut its metrics back to it."""
    if not record.checkpoint.exists():
        if world.is_first:
            record.cut_metrics(0)
        return Position()
    state = checkpoint.load(record.checkpoint)
    if (state.get("config_hash"), state.get("seed")) != (record.config_hash, record.seed):
        raise InputError(
            f"{record.checkpoint} is of another configuration ({state.get('config_hash')}, seed {state.get('seed')})"
        )
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        method.load_state_dict(state["method"])
        mine = state["ranks"][world.rank]
        checkpoint.restore_generators(mine["generators"], device)
        skipped.update(mine["skipped"])
        position = Position(
            **state["position"] | {key: mine[key] for key in ("images", "loss_sum")}
        )
        if not all(value >= 0 for value in asdict(position).values()):
            raise ValueError(f"position {position}")
        if world.is_first:
            record.cut_metrics(state["metrics_bytes"])
    except InputError as error:
        raise InputError(f"{record.checkpoint} does not continue here: {error}") from error
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise InputError(
            f"{record.checkpoint} is damaged or of another network than {type(model).__name__} here: {reason}"
        ) from error
    return position


def _save_exported(
    folder: Path,
    network: ModelConfig,
    small: nn.Module,
    plan: PrunePlan,
    normalisation: Normalisation,
    dataset: Dataset | Photographs,
) -> None:
    """Save the small network with all that is needed to build it again."""
    described = {
        "network": {
            "model": asdict(replace(network, weights=None)),
            "channels": dataset.image_shape[0],
            "classes": dataset.classes,
        },
        "normalisation": [list(normalisation.mean), list(normalisation.std)],
    }
    if network.weights is not None and Path(network.weights).is_dir():
        shutil.copytree(network.weights, folder / "start", dirs_exist_ok=True)
    save_exported(folder, small, plan, described)
