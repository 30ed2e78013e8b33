"""One training, from the data to the exported network: what `experiments.train` does for a run that is not done."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.baselines.thin import starting_network
from experiments.harness import checkpoint, data, distributed, models, seeding
from experiments.harness.batches import Sharing
from experiments.harness.callbacks import Method
from experiments.harness.data import Normalisation, SplitName
from experiments.harness.devices import configure, device_name, has_bfloat16, reading_workers
from experiments.harness.distributed import World
from experiments.harness.entry import Interrupted, StopSignals, one_sentence
from experiments.harness.loop import Accuracy, Loop, Metrics, Position, evaluate
from experiments.harness.optim import learning_rate, make_optimizer
from experiments.harness.progress import RunProgress
from experiments.harness.record import Record
from experiments.harness.steps import choose_fast, make_steps
from experiments.harness.tracking import Tracker
from experiments.methods import make_method
from experiments.schema import Config, Fast, ModelConfig, Precision, ThinPlanConfig
from psap_core import InputError, PrunePlan, export, export_error, macs, params, save_exported

if TYPE_CHECKING:
    from experiments.harness.photographs import Photographs


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


def _train(cfg: Config, record: Record, device: torch.device, world: World, signals: StopSignals) -> None:
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
    autocast = torch.bfloat16 if cfg.optim.precision is Precision.auto and has_bfloat16(device) else None

    def pulse_losses(epochs_done: int) -> Iterator[Tensor]:
        batches = images.epoch("pulse", epochs_done)
        return (F.cross_entropy(steps.net(x), y) for batch in batches for x, y in batch.parts)

    def accuracy(network: nn.Module, split: SplitName) -> Accuracy:
        batches = dataset.evaluation(split, world.rank, world.size, normalisation, device, workers)
        return evaluate(network, batches, world)

    def save_step(kind: str, epochs_done: int, text: str) -> None:
        if world.is_first:
            record.save_step(kind, epochs_done, text)

    pulse_batches = images.batches * cfg.optim.accumulate
    method = make_method(cfg, model, optimizer, example, pulse_losses, pulse_batches, save_step)
    steps = make_steps(fast, model, optimizer, images, world, device, autocast, method.after_step)
    world.settle(steps.net, example)
    facts = {
        "data_sha256": dataset.digest,
        "device": device_name(device),
        "world_size": world.size,
        "autocast": str(autocast),
        "compile": fast is Fast.compiled,
        "fast": fast.value,
    }
    world.first(lambda: record.begin(cfg, facts))
    tracker = Tracker(cfg, record.config_hash, record.folder) if world.is_first else None

    def save() -> None:
        own = {
            "generators": checkpoint.generators(device),
            "images": loop.position.images,
            "loss_sum": loop.position.loss_sum,
            "skipped": sorted(dataset.skipped),
        }
        ranks = world.gather(own)
        if world.is_first:
            state = {
                "config_hash": record.config_hash,
                "seed": cfg.seed,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "method": method.state_dict(),
                "position": asdict(loop.position),
                "ranks": ranks,
                "metrics_bytes": record.metrics_bytes(),
            }
            checkpoint.save(record.checkpoint, state)
        world.wait()

    def log(metrics: Metrics) -> None:
        skipped: set[str] = set().union(*world.gather(dataset.skipped))
        if tracker is not None:
            row = {**metrics, "data/skipped_images": len(skipped)} if skipped else metrics
            record.log(row)
            tracker.log(row)
            progress.epoch(row)

    position = _resume(record, model, optimizer, method, dataset.skipped, world, device)
    if len(seen := set(world.gather((position.epoch, position.batch)))) > 1:
        raise InputError(f"the processes see different checkpoints in {record.folder}: {sorted(seen)}; try again later")
    steps_done = position.epoch * images.batches + position.batch
    curve: SplitName = "validation" if dataset.count("validation") else "test"
    title = f"{cfg.name} {cfg.method.name}"
    with RunProgress(title, cfg.epochs, images.batches, steps_done, quiet=not world.is_first) as progress:
        loop = Loop(
            model=model,
            steps=steps,
            world=world,
            callback=method,
            epochs=cfg.epochs,
            learning_rate=lambda epoch: learning_rate(cfg.optim, epoch, cfg.epochs),
            evaluate=lambda: accuracy(model, curve).top1,
            log=log,
            save=save,
            stop_requested=lambda: world.any(signals.received),
            advance=progress.advance,
            position=position,
        )
        loop.train()

    masked = accuracy(model, "test")
    method.finish()
    small = export(model, method.plan)
    exported = accuracy(small, "test")
    start_top1 = None
    if cfg.model.weights is not None:
        start, _ = models.start(cfg.model, channels, dataset.classes, new_classifier=True)
        start_top1 = accuracy(start.to(device).to(memory_format=torch.channels_last), "test").top1
    if tracker is None:
        world.wait()
        return
    dense = model if network is cfg.model else models.build(cfg.model, channels, dataset.classes).to(device)
    dense_macs, small_macs = macs(dense, example), macs(small, example)
    _save_exported(record.folder / "export", network, small, method.plan, normalisation, dataset)
    summary = {
        "dataset": cfg.data.name,
        "image_size": size,
        "train_images": len(images),
        "model": cfg.model.name,
        "method": cfg.method.name,
        "epochs": cfg.epochs,
        "seed": cfg.seed,
        "suite": cfg.suite,
        "cell": cfg.cell,
        "start_top1": start_top1,
        "top1": exported.top1,
        "top5": exported.top5,
        "masked_top1": masked.top1,
        "test_images": exported.images,
        "macs": small_macs,
        "macs_cut": 1 - small_macs / dense_macs,
        "params": params(small),
        "export_max_relative_error": export_error(model, small, method.plan),
        # Forward MACs of the network in training times images seen; a training step costs three times it.
        "train_macs": macs(model, example) * len(images) * cfg.epochs,
        "train_seconds": loop.position.seconds,
        "prune_seconds": sum(row.get("psap/step_seconds", 0.0) for row in record.rows()),
        "config_hash": record.config_hash,
    }
    record.save_summary(summary)
    tracker.finish(record.rows(), summary)
    record.finish()
    world.wait()


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
        position = Position(**state["position"] | {key: mine[key] for key in ("images", "loss_sum")})
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
    dataset: "data.Dataset | Photographs",
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
