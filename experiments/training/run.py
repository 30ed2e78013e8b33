"""One training, from the data to the exported network: what `experiments.train` does for a run that is not done."""

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments import models
from experiments.data import ImageFolder, TensorImages
from experiments.data.base import Normalisation
from experiments.data.transforms import shorter_side
from experiments.exits import Interrupted, one_sentence
from experiments.methods.base import Callback, Method, Metrics
from experiments.methods.registry import make_method
from experiments.methods.thin import network_macs
from experiments.runs.files import EXPORTED_FILES, DataError
from experiments.runs.folder import Record, Written
from experiments.runs.summary import RunSummary
from experiments.schema import Config, ModelConfig, compacts
from experiments.training import checkpoint, distributed
from experiments.training.compaction import Compaction
from experiments.training.dense_time import dense_epoch_seconds
from experiments.training.devices import configure, require_gpu
from experiments.training.distributed import World, lost_processes
from experiments.training.latency import latencies_ms
from experiments.training.loop import Accuracy, Loop, Position
from experiments.training.optim import learning_rate
from experiments.training.progress import RunProgress
from experiments.training.setup import Setup, manifest_facts, set_up
from experiments.training.signals import StopSignals
from experiments.training.steps import Steps, make_steps
from experiments.training.tracking import Tracker
from psap_core import InputError, PrunePlan, export, export_error, macs, params, save_exported
from psap_core.files import make_folder, read_plain, write_atomically


def train_here(cfg: Config, record: Record, answer: Callable[[], None]) -> None:
    """Train (or continue) a run on this process's device, with the other processes that torchrun started.

    Args:
        answer: is called instead, by the first of them, where the run is done.
    """
    with distributed.join() as world:
        device = configure(cfg.runtime, world)
        if any(world.gather(record.done)):
            world.first(answer)
            return
        with closing(record), StopSignals() as signals:
            try:
                require_gpu(cfg, device)
                with lost_processes():
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
    """A set-up training with its method, its steps, and the folder that it is recorded in.

    Attributes:
        compaction: makes the network small when the plan is final; None: it stays as large as it is.
        macs: of the network as it begins to train.
        dense_macs: of the run's model without any pruning.
        dense_epoch_seconds: what an epoch of that takes here; None: not measured.
    """

    setup: Setup
    record: Record
    method: Method
    steps: Steps
    compaction: Compaction | None
    macs: int
    dense_macs: int
    dense_epoch_seconds: float | None

    @property
    def callback(self) -> Callback:
        """What the loop calls."""
        if self.compaction is None:
            return self.method
        return self.compaction


def _train(
    cfg: Config, record: Record, device: torch.device, world: World, signals: StopSignals
) -> None:
    world.say(f"{cfg.name}, {cfg.method.name}, seed {cfg.seed}: {record.folder}")
    setup = set_up(cfg, device, world)
    world.say("finding the channel groups")
    save_step = record.save_step if world.is_first else _forget
    method = make_method(setup.method_context(save_step))
    steps = make_steps(
        setup.fast,
        setup.net,
        setup.optimizer,
        setup.images,
        world,
        device,
        setup.autocast,
        method.after_step,
        setup.loss,
    )
    compaction = None
    if compacts(cfg.method):
        compaction = Compaction(method, setup, steps)
    own_macs = macs(setup.model, setup.example)
    training = _Training(
        setup,
        record,
        method,
        steps,
        compaction,
        own_macs,
        _dense_macs(setup, own_macs),
        dense_epoch_seconds(setup),
    )
    world.settle(setup.net, setup.example)
    facts = manifest_facts(setup)
    world.first(lambda: record.begin(cfg, facts))
    tracker = world.first(lambda: Tracker(cfg, record))
    with ExitStack() as stack:
        if tracker is not None:
            stack.callback(tracker.close)
        position = _all_epochs(training, tracker, signals)
        _finish(training, tracker, position)


def _say_threads(record: Record, world: World) -> None:
    *before, now = record.threads()
    if before:
        world.say(
            f"{before[-1]} CPU threads before, {now} now: sums are rounded differently, so the run will not end bit "
            "for bit as an uninterrupted one"
        )


def _forget(kind: str, epochs_done: int, text: str) -> None:
    """Of the ranks, the first one writes."""


def _all_epochs(training: _Training, tracker: Tracker | None, signals: StopSignals) -> Position:
    """Train from the last checkpoint, or from the beginning, to the end; returns where that is."""
    setup = training.setup
    cfg, world = setup.cfg, setup.world
    batches = setup.images.batches
    position = _resume(training)
    _refuse_another_position(training.record, position, world)
    if position != Position():
        world.say(f"continuing in epoch {position.epoch + 1} of {cfg.epochs}")
        if world.is_first and setup.device.type == "cpu":
            _say_threads(training.record, world)
    if tracker is not None:
        tracker.catch_up(training.record.rows())
    with RunProgress(
        f"{cfg.name} {cfg.method.name}",
        cfg.epochs,
        batches,
        steps_done=position.epoch * batches + position.batch,
        curve=setup.curve,
        quiet=not world.is_first,
    ) as progress:
        loop = Loop(
            model=training.setup.model,
            steps=training.steps,
            world=world,
            callback=training.callback,
            epochs=cfg.epochs,
            learning_rate=lambda epoch: learning_rate(cfg.optim, epoch, cfg.epochs),
            evaluate=lambda: setup.accuracy(setup.model, setup.curve).top1,
            log=lambda metrics: _log(training, tracker, progress, metrics),
            save=lambda position: _save_checkpoint(training, position),
            stop_requested=lambda: world.any(signals.received),
            advance=progress.advance,
            position=position,
        )
        loop.train()
    return loop.position


def _log(
    training: _Training, tracker: Tracker | None, progress: RunProgress, metrics: Metrics
) -> None:
    """Record an epoch's metrics, with the images that no rank could read and the dense network's seconds."""
    skipped: set[str] = set().union(*training.setup.world.gather(training.setup.dataset.skipped))
    if tracker is not None:
        row = {**metrics}
        if training.dense_epoch_seconds is not None:
            row["train/dense_seconds"] = training.dense_epoch_seconds
        if skipped:
            row["data/skipped_images"] = len(skipped)
        training.record.log(row)
        tracker.log(row)
        progress.epoch(row)


def _save_checkpoint(training: _Training, position: Position) -> None:
    """Write the present state, of which every rank has a part of its own."""
    record = training.record
    own = {
        "generators": checkpoint.generators(training.setup.device),
        "images": position.images,
        "loss_sum": position.loss_sum,
        "skipped": sorted(training.setup.dataset.skipped),
    }
    ranks = training.setup.world.gather(own)
    if training.setup.world.is_first:
        state = {
            "config_hash": record.config_hash,
            "seed": training.setup.cfg.seed,
            "model": training.setup.model.state_dict(),
            "optimizer": training.setup.optimizer.state_dict(),
            "method": training.callback.state_dict(),
            "position": asdict(position),
            "ranks": ranks,
            "written": record.written()._asdict(),
        }
        record.save_checkpoint(checkpoint.checkpoint_bytes(state))
    training.setup.world.wait()


def _refuse_another_position(record: Record, position: Position, world: World) -> None:
    positions = set(world.gather((position.epoch, position.batch)))
    if len(positions) > 1:
        raise InputError(
            f"the processes see different checkpoints in {record.folder}: {sorted(positions)}; try again later"
        )


def _finish(training: _Training, tracker: Tracker | None, position: Position) -> None:
    """Export the network, and write it with the run's summary."""
    model, method = training.setup.model, training.method
    training.setup.world.say("evaluating and exporting")
    masked = training.setup.accuracy(model, "test")
    method.finish()
    small = model if method.is_compact else export(model, method.plan)
    exported = training.setup.accuracy(small, "test")
    start_top1 = _start_top1(training)
    if tracker is not None:
        summary = _save_results(training, small, exported, masked, start_top1, position)
        tracker.finish(summary, lambda: _latency_ms(training, small))
        training.record.finish()
    training.setup.world.wait()


def _latency_ms(training: _Training, small: nn.Module) -> float:
    """Of one image through the exported network, on the training's device."""
    (milliseconds,) = latencies_ms({"exported": small.eval()}, training.setup.example).values()
    return milliseconds


def _start_top1(training: _Training) -> float | None:
    """Of the weights that the run began with, if it did with some."""
    cfg = training.setup.cfg.model
    if cfg.weights is None:
        return None
    channels, _, size = training.setup.dataset.image_shape
    start, _ = models.start(
        cfg, channels, training.setup.dataset.classes, size, new_classifier=True
    )
    start.to(training.setup.device).to(memory_format=torch.channels_last)
    return training.setup.accuracy(start, "test").top1


def _save_results(
    training: _Training,
    small: nn.Module,
    exported: Accuracy,
    masked: Accuracy,
    start_top1: float | None,
    position: Position,
) -> RunSummary:
    """Write the exported network and the summary; returns the latter."""
    cfg = training.setup.cfg
    record = training.record
    dataset = training.setup.dataset
    plan = training.method.plan
    small_macs = macs(small, training.setup.example)
    _save_exported(
        record.export_folder(),
        training.setup.network,
        small,
        plan,
        training.setup.normalisation,
        dataset,
    )
    record.add_export()
    summary = RunSummary(
        dataset=cfg.data.name,
        image_size=dataset.image_shape[2],
        train_images=len(training.setup.images),
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
        macs_cut=1 - small_macs / training.dense_macs,
        params=params(small),
        export_max_relative_error=_relative_error(training, small),
        train_macs=_train_macs(training),
        train_seconds=position.seconds,
        train_seconds_dense_ratio=_dense_ratio(training, position),
        prune_seconds=sum(row.get("psap/step_seconds", 0.0) for row in record.rows()),
        config_hash=record.config_hash,
    )
    record.save_summary(summary)
    return summary


def _dense_macs(setup: Setup, own_macs: int) -> int:
    """MACs of the network that the run's model, which has `own_macs`, is without any pruning."""
    if setup.network is setup.cfg.model:
        return own_macs
    channels, _, size = setup.dataset.image_shape
    return network_macs(channels, setup.dataset.classes, size)(setup.cfg.model)


def _relative_error(training: _Training, small: nn.Module) -> float:
    """max|a - b| / max|a| of the outputs of the network in training and of the small one."""
    compaction = training.compaction
    if compaction is not None and compaction.relative_error is not None:
        return compaction.relative_error
    return export_error(training.setup.model, small, training.method.plan)


def _train_macs(training: _Training) -> int:
    """Forward MACs of the network in training times images seen; a training step costs three times it."""
    if training.compaction is not None:
        return sum(int(row["train/macs"]) for row in training.record.rows())
    return training.macs * len(training.setup.images) * training.setup.cfg.epochs


def _dense_ratio(training: _Training, position: Position) -> float | None:
    """Seconds of the training, as a share of what the dense network's would have taken; None: not measured."""
    dense_seconds = [row.get("train/dense_seconds") for row in training.record.rows()]
    measured = [seconds for seconds in dense_seconds if seconds is not None]
    if len(measured) < len(dense_seconds):
        return None
    return position.seconds / sum(measured)


def _resume(training: _Training) -> Position:
    """Load the run's checkpoint, if it has one, and cut its metrics back to it."""
    record, world = training.record, training.setup.world
    found = checkpoint.load_newest(record.checkpoints, world.say)
    if found is None:
        if world.is_first:
            record.return_to(None)
        return Position()
    path, state = found
    if (state.get("config_hash"), state.get("seed")) != (record.config_hash, record.seed):
        raise InputError(
            f"{path} is of another configuration ({state.get('config_hash')}, seed {state.get('seed')})"
        )
    try:
        position = _restore(training, state)
        if world.is_first:
            record.return_to(Written(**state["written"]))
            record.forget_newer_checkpoints(path)
    except DataError:  # it names its file
        raise
    except InputError as error:
        raise InputError(f"{path} does not continue here: {error}") from error
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise InputError(
            f"{path} is damaged or of another network than {type(training.setup.model).__name__} here: {reason}"
        ) from error
    return position


def _restore(training: _Training, state: dict[str, Any]) -> Position:
    """Give a checkpoint's state to what it was taken of; returns the position."""
    setup, method = training.setup, training.callback
    is_compact = state["method"].get("is_compact", False)
    if is_compact:  # the network becomes small before it gets the weights of a small one
        method.load_state_dict(state["method"])
    setup.model.load_state_dict(state["model"])
    setup.optimizer.load_state_dict(state["optimizer"])
    if not is_compact:
        method.load_state_dict(state["method"])
    mine = state["ranks"][setup.world.rank]
    checkpoint.restore_generators(mine["generators"], setup.device)
    setup.dataset.skipped.update(mine["skipped"])
    position = Position(**state["position"] | {key: mine[key] for key in ("images", "loss_sum")})
    if not all(value >= 0 for value in asdict(position).values()):
        raise ValueError(f"position {position}")
    return position


def _save_exported(
    folder: Path,
    network: ModelConfig,
    small: nn.Module,
    plan: PrunePlan,
    normalisation: Normalisation,
    dataset: TensorImages | ImageFolder,
) -> None:
    """Save the small network with all that is needed to build it again."""
    described: dict[str, Any] = {
        "network": {
            "model": asdict(replace(network, weights=None)),
            "channels": dataset.image_shape[0],
            "classes": dataset.classes,
        },
        "normalisation": [list(normalisation.mean), list(normalisation.std)],
    }
    if isinstance(dataset, ImageFolder):
        described["class_names"] = dataset.class_names
        described["preprocessing"] = {
            "turned_upright": dataset.turn,
            "shorter_side": shorter_side(dataset.size),
            "size": dataset.size,
        }
    if network.weights is not None and Path(network.weights).is_dir():
        _copy_exported(Path(network.weights), folder / "start")
    save_exported(folder, small, plan, described)


def _copy_exported(source: Path, target: Path) -> None:
    """The two files of an exported network, and those of the one that it was built from, if it was."""
    make_folder(target)
    for name in EXPORTED_FILES:
        write_atomically(target / name, read_plain(source / name))
    if (source / "start").is_dir():
        _copy_exported(source / "start", target / "start")
