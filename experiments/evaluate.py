"""Test accuracy of a run's exported network, or of given weights: `python -m experiments.evaluate run=<run folder>`.

    python -m experiments.evaluate run=runs/digits_resnet20/<hash>/seed0
    python -m experiments.evaluate run=<run folder> data.root=<where the data are here>
    python -m experiments.evaluate experiment=<recipe> model.weights=<file or exported folder>

A run brings its own data and network: only `runtime` holds for it, too, and `data.root` where its own data are gone.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from experiments import data, models
from experiments.configuration import compose
from experiments.data.base import Normalisation
from experiments.entry import entry_point
from experiments.exits import one_sentence
from experiments.runs.done import refuse_other_data
from experiments.runs.files import parse_yaml, read_plain
from experiments.runs.summary import read_finished
from experiments.schema import DataConfig, EvaluateConfig, ImageFolderConfig, OwnFolderConfig
from experiments.training.devices import configure, reading_workers
from experiments.training.distributed import World
from experiments.training.loop import Accuracy, evaluate
from psap_core import InputError


def evaluate_run(overrides: list[str]) -> Accuracy:
    """The accuracy that these Hydra overrides ask for."""
    cfg = compose("evaluate", overrides)
    _refuse_what_a_run_decides(cfg, overrides)
    return accuracy(cfg)


def accuracy(cfg: EvaluateConfig) -> Accuracy:
    """Accuracy of the exported network of `cfg.run`, or else of the configured network, on the test split."""
    world = World()
    device = configure(cfg.runtime, world)
    if cfg.run is None and cfg.model.weights is None:
        raise InputError(
            "nothing to evaluate: give run=<run folder> or model.weights=<file or exported folder>"
        )
    if cfg.run is not None:
        read_finished(Path(cfg.run))
    dataset = data.load_dataset(
        cfg.data if cfg.run is None else recorded_data(Path(cfg.run), cfg.data.root), device
    )
    if cfg.run is not None:
        advice = "bring the former, or name their folder with data.root"
        refuse_other_data(Path(cfg.run), dataset.digest, advice)
    if cfg.run is None:
        model, normalisation = models.start(
            cfg.model, dataset.image_shape[0], dataset.classes, dataset.image_shape[-1]
        )
    else:
        model, normalisation = models.open_exported(Path(cfg.run) / "export")
    normalisation = normalisation or Normalisation(tuple(cfg.data.mean), tuple(cfg.data.std))
    batches = dataset.evaluation(
        "test", 0, 1, normalisation, device, reading_workers(cfg.runtime, world)
    )
    return evaluate(model.to(device).to(memory_format=torch.channels_last), batches, world)


def _refuse_what_a_run_decides(cfg: EvaluateConfig, overrides: Sequence[str]) -> None:
    for override in overrides if cfg.run is not None else ():
        key = override.partition("=")[0]
        if key not in ("run", "data.root") and key.split(".")[0] not in ("runtime", "hydra"):
            raise InputError(
                f"run={cfg.run} brings its own data and network: leave out {override}, or leave out run"
            )


def recorded_data(folder: Path, root: str) -> DataConfig:
    """The data configuration of a run; where its files are gone, they are under `root`."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{folder} is not a run folder: it has no config.yaml")
    try:
        loaded = OmegaConf.create(parse_yaml(read_plain(path)))
        recorded = loaded["data"]
        kind = _kind_of_data(recorded)
        elsewhere = {} if Path(recorded["root"]).exists() else {"root": root}
        return OmegaConf.to_object(OmegaConf.merge(kind, recorded, elsewhere))  # type: ignore[return-value]
    except (
        OSError,
        OmegaConfBaseException,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        raise InputError(f"{path} is damaged: {one_sentence(error)}") from error


def _kind_of_data(recorded: Any) -> type[DataConfig]:
    if "test_share" in recorded:
        return OwnFolderConfig
    if "on_corrupt" in recorded:
        return ImageFolderConfig
    return DataConfig


@entry_point("evaluate")
def main(cfg: EvaluateConfig) -> None:
    _refuse_what_a_run_decides(cfg, sys.argv[1:])
    result = accuracy(cfg)
    print(f"top1 {result.top1:.2f} %  top5 {result.top5:.2f} %  n {result.images}")


if __name__ == "__main__":
    main()
