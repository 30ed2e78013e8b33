"""Download beforehand what a machine without the internet needs: `python -m experiments.fetch WHAT [key=value ...]`.

    python -m experiments.fetch cifar10 data.root=<folder>
    python -m experiments.fetch imagenette --check
    python -m experiments.fetch weights experiment=imagenet_resnet50_pretrained
    python -m experiments.fetch weights experiment=image_folder model.name=efficientnet_b0

Data go to the folder PSAP_DATA (or data.root), as torchvision lays them out; what is there already is used as it is.
Weights go where torchvision and timm look for them: TORCH_HOME and HF_HOME say where. `weights` without a recipe
fetches those of all ..._pretrained recipes for ImageNet. With --check nothing is downloaded: it says what is there.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.configuration import CONF, compose
from experiments.exits import plain_exits
from experiments.help import options
from experiments.runs.files import is_published
from experiments.schema import ImageFolderConfig, ModelConfig
from psap_core import InputError

RECIPES = {"cifar10": "cifar10_resnet20", "imagenette": "imagenette_resnet18"}  # of the data


def fetch_data(name: str, overrides: Sequence[str], check: bool) -> str:
    """Make sure that a data set is there and whole; says what there is.

    Raises:
        InputError: it is missing and `check` forbids a download, or the download failed.
    """
    cfg = compose("train", [f"experiment={RECIPES[name]}", *overrides]).data
    root = Path(cfg.root)
    import torch

    from experiments.data import is_there, load_dataset

    if check and not is_there(cfg):
        raise InputError(f"{name} is not in {root}: the same command without --check downloads it")
    if not check:
        folder = root.parent if isinstance(cfg, ImageFolderConfig) else root
        folder.mkdir(parents=True, exist_ok=True)
    dataset = load_dataset(cfg, torch.device("cpu"))
    training = dataset.count("validation") + len(dataset.train)
    return f"{name}: {training:,} training and {dataset.count('test'):,} test images in {root}"


def fetch_weights(overrides: Sequence[str], check: bool) -> list[str]:
    """Make sure that the published weights of a recipe, or of all for ImageNet, are there; says what there is.

    Raises:
        InputError: some are missing and `check` forbids a download, a download failed, or the recipe has none.
    """
    if any(word.startswith("experiment=") for word in overrides):
        recipes = [[*overrides]]
    else:
        names = [name for name in options(Path(CONF), "experiment") if name.startswith("imagenet_")]
        recipes = [[f"experiment={name}", *overrides] for name in names if "pretrained" in name]
    said = []
    for recipe in recipes:
        needs_root = "experiment=image_folder" in recipe
        extra = ["data.root=unused"] if needs_root else []
        cfg = compose("train", [*extra, *recipe]).model
        if cfg.weights is None or not is_published(cfg.weights):
            raise InputError(
                f"{recipe[0]} starts from no published weights: there is nothing to fetch"
            )
        said.append(_fetch_weights_of(cfg, check))
    return said


def _fetch_weights_of(cfg: ModelConfig, check: bool) -> str:
    """Loading them downloads what is missing, and checks the rest."""
    from experiments import models
    from experiments.models.weights import missing_download

    if check:
        os.environ["HF_HUB_OFFLINE"] = "1"
        missing = missing_download(cfg)
        if missing is not None:
            raise InputError(
                f"{cfg.weights} of {cfg.name} is not there: {missing} is missing; the same command without --check "
                "downloads it"
            )
    models.start(cfg, 3, 1000, new_classifier=True)
    return f"{cfg.name}: {cfg.weights} is there"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=[*RECIPES, "weights"])
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--check", action="store_true", help="download nothing, say what is there")
    words = parser.parse_intermixed_args(arguments)
    with plain_exits():
        if words.what == "weights":
            print("\n".join(fetch_weights(words.overrides, words.check)))
        else:
            print(fetch_data(words.what, words.overrides, words.check))


if __name__ == "__main__":
    main(sys.argv[1:])
