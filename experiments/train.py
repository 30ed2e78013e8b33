"""Train one network with one method: `python -m experiments.train experiment=<recipe> [key=value ...]`.

The same command again continues a run that was stopped, and prints the summary of one that is done.
SIGTERM and SIGUSR1 write a checkpoint after the current step and leave with exit code 75.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.baselines.thin import thin_model
from experiments.harness import checkpoint, data, models, seeding
from experiments.harness.callbacks import Method
from experiments.harness.data import Normalisation
from experiments.harness.entry import StopSignals, compose, configure, entry_point
from experiments.harness.loop import Loop, Metrics, Position, evaluate
from experiments.harness.optim import learning_rate, make_optimizer
from experiments.harness.progress import RunProgress
from experiments.harness.record import Record, device_name, read_summary
from experiments.harness.tracking import Tracker
from experiments.methods import make_method
from experiments.schema import Config, ModelConfig, TargetConfig
from psap_core import InputError, apply_, export, export_error, macs, params, save_exported


def run(overrides: Sequence[str]) -> Path:
    """Train (or continue, or find done) the run that these Hydra overrides describe; returns its folder."""
    return train(compose("train", overrides))


def train(cfg: Config) -> Path:
    """Train the configured run in its folder, and return the folder."""
    if cfg.epochs < 1:
        raise InputError(f"epochs={cfg.epochs} must be at least 1")
    device = configure(cfg.runtime)
    record = Record(cfg)
    if not record.done:
        with closing(record), StopSignals() as signals:
            _train(cfg, record, device, signals)
    return record.folder


def _train(cfg: Config, record: Record, device: torch.device, signals: StopSignals) -> None:
    seeding.seed_everything(cfg.seed)
    dataset = data.load(cfg.data).to(device)
    channels, _, size = dataset.image_shape
    network = cfg.model
    if isinstance(cfg.method, TargetConfig) and cfg.method.name == "thin":
        network = thin_model(cfg.model, cfg.method.target_macs_cut, channels, dataset.classes, size)
    model, normalisation = models.start(network, channels, dataset.classes)
    model.to(device)
    normalisation = normalisation or Normalisation(tuple(cfg.data.mean), tuple(cfg.data.std))
    optimizer = make_optimizer(model, cfg.optim)
    images = data.TrainingImages(dataset.train, normalisation, cfg.optim.batch_size, cfg.data.flip, cfg.seed)
    example = torch.zeros(1, channels, size, size, device=device)
    curve = dataset.validation if len(dataset.validation) else dataset.test

    def pulse_losses(epochs_done: int) -> Iterator[Tensor]:
        return (F.cross_entropy(model(x), y) for x, y in images.epoch("pulse", epochs_done))

    method = make_method(
        cfg.method, cfg.model, cfg.epochs, model, optimizer, example, pulse_losses, images.batches, record.save_plan
    )
    record.begin(cfg, {"data_sha256": dataset.digest, "device": device_name(device), "world_size": 1})
    tracker = Tracker(cfg, record.config_hash, record.folder)

    def save() -> None:
        state = {
            "config_hash": record.config_hash,
            "seed": cfg.seed,
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "method": method.state_dict(),
            "position": asdict(loop.position),
            "metrics_bytes": record.metrics_bytes(),
        }
        checkpoint.save(record.checkpoint, state)

    def log(metrics: Metrics) -> None:
        record.log(metrics)
        tracker.log(metrics)
        progress.epoch(metrics)

    position = _resume(record, model, optimizer, method)
    steps_done = position.epoch * images.batches + position.batch
    with RunProgress(f"{cfg.name} {cfg.method.name}", cfg.epochs, images.batches, steps_done) as progress:
        loop = Loop(
            model=model,
            optimizer=optimizer,
            images=images,
            callback=method,
            epochs=cfg.epochs,
            learning_rate=lambda epoch: learning_rate(cfg.optim, epoch, cfg.epochs),
            evaluate=lambda: evaluate(model, curve, normalisation)[0],
            log=log,
            save=save,
            stop_requested=lambda: signals.received,
            advance=progress.advance,
            position=position,
        )
        loop.train()

    dense = model if network is cfg.model else models.build(cfg.model, channels, dataset.classes).to(device)
    summary = {
        "dataset": cfg.data.name,
        "image_size": size,
        "train_images": len(images),
        "model": cfg.model.name,
        "method": cfg.method.name,
        "epochs": cfg.epochs,
        "seed": cfg.seed,
        **_export(
            record.folder / "export",
            cfg,
            network,
            model,
            method,
            dataset,
            normalisation,
            macs(dense, example),
        ),
        # Forward MACs of the network in training times images seen; a training step costs three times it.
        "train_macs": macs(model, example) * len(images) * cfg.epochs,
        "train_seconds": loop.position.seconds,
        "prune_seconds": sum(row.get("psap/step_seconds", 0.0) for row in record.rows()),
        "config_hash": record.config_hash,
    }
    record.save_summary(summary)
    tracker.finish(record.rows(), summary)
    record.finish()


def _resume(record: Record, model: nn.Module, optimizer: torch.optim.Optimizer, method: Method) -> Position:
    """Load the run's checkpoint, if it has one, and cut its metrics back to it."""
    if not record.checkpoint.exists():
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
        checkpoint.restore_generators(state)
        position = Position(**state["position"])
        if not all(value >= 0 for value in asdict(position).values()):
            raise ValueError(f"position {position}")
        record.cut_metrics(state["metrics_bytes"])
    except InputError as error:
        raise InputError(f"{record.checkpoint} does not continue here: {error}") from error
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise InputError(
            f"{record.checkpoint} is damaged or of another network than {type(model).__name__} here: {reason}"
        ) from error
    return position


def _export(
    folder: Path,
    cfg: Config,
    network: ModelConfig,
    model: nn.Module,
    method: Method,
    dataset: data.Dataset,
    normalisation: Normalisation,
    dense_macs: int,
) -> dict[str, Any]:
    """Apply the plan for good, export, save and test the small network; returns its part of the summary."""
    masked_top1, _ = evaluate(model, dataset.test, normalisation)
    apply_(model, method.layers, method.plan)
    small = export(model, method.plan)
    top1, top5 = evaluate(small, dataset.test, normalisation)
    example = dataset.test.images[:1].float()
    small_macs = macs(small, example)
    channels, _, _ = dataset.image_shape
    described = {
        "network": {
            "model": asdict(replace(network, weights=None)),
            "channels": channels,
            "classes": dataset.classes,
        },
        "normalisation": [list(normalisation.mean), list(normalisation.std)],
    }
    if cfg.model.weights is not None and Path(cfg.model.weights).is_dir():
        shutil.copytree(cfg.model.weights, folder / "start", dirs_exist_ok=True)
    save_exported(folder, small, method.plan, described)
    return {
        "top1": top1,
        "top5": top5,
        "masked_top1": masked_top1,
        "macs": small_macs,
        "macs_cut": 1 - small_macs / dense_macs,
        "params": params(small),
        "export_max_relative_error": export_error(model, small, method.plan),
    }


@entry_point("train")
def main(cfg: Config) -> None:
    print(json.dumps(read_summary(train(cfg))))


if __name__ == "__main__":
    main()
