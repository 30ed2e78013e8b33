"""Test accuracy of a run's exported network, or of given weights.

`python -m experiments.evaluate run=<run folder>`
`python -m experiments.evaluate experiment=<recipe> model.weights=<file or exported folder>`
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from experiments.harness import data, models
from experiments.harness.data import Normalisation
from experiments.harness.entry import compose, configure, entry_point, one_sentence
from experiments.harness.loop import evaluate
from experiments.schema import DataConfig, EvaluateConfig
from psap_core import InputError


@dataclass(frozen=True)
class Accuracy:
    """Top-1 and top-5 in percent over `images` test images."""

    top1: float
    top5: float
    images: int


def run(overrides: list[str]) -> Accuracy:
    """The accuracy that these Hydra overrides ask for."""
    return accuracy(compose("evaluate", overrides))


def accuracy(cfg: EvaluateConfig) -> Accuracy:
    """Accuracy of the exported network of `cfg.run`, or else of the configured network, on the test split."""
    device = configure(cfg.runtime)
    if cfg.run is None and cfg.model.weights is None:
        raise InputError("nothing to evaluate: give run=<run folder> or model.weights=<file or exported folder>")
    if cfg.run is None:
        dataset = data.load(cfg.data)
        model, normalisation = models.start(cfg.model, dataset.image_shape[0], dataset.classes)
    else:
        dataset = data.load(recorded_data(Path(cfg.run), cfg.data.root))
        model, normalisation = models.open_exported(Path(cfg.run) / "export")
    test = dataset.test.to(device)
    normalisation = normalisation or Normalisation(tuple(cfg.data.mean), tuple(cfg.data.std))
    return Accuracy(*evaluate(model.to(device), test, normalisation), len(test))


def recorded_data(folder: Path, root: str) -> DataConfig:
    """The data configuration of a run, with the files under `root`."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{folder} is not a run folder: it has no config.yaml")
    try:
        recorded: Any = OmegaConf.load(path)
        return OmegaConf.to_object(OmegaConf.merge(DataConfig, recorded["data"], {"root": root}))  # type: ignore[return-value]
    except (OSError, YAMLError, OmegaConfBaseException, LookupError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: {one_sentence(error)}") from error


@entry_point("evaluate")
def main(cfg: EvaluateConfig) -> None:
    result = accuracy(cfg)
    print(f"top1 {result.top1:.2f} %  top5 {result.top5:.2f} %  n {result.images}")


if __name__ == "__main__":
    main()
