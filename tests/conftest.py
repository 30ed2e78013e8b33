"""Every recipe on a few made-up images."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import get_model

from experiments import models, schema
from experiments.data import tensor_images
from experiments.models import weights
from tests.data.photographs import sample_folder


@pytest.fixture
def tiny(tmp_path, monkeypatch, photographs) -> Callable[..., list[str]]:
    """The overrides with which a recipe trains on `train_images` - 4 images; runs and data are below tmp_path."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> tensor_images.LabelledImages:
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return tensor_images.LabelledImages(images, torch.arange(count) % 10)

    monkeypatch.setattr(tensor_images, "_load_cifar10", lambda root: (split(20), split(10)))
    monkeypatch.setattr(
        weights, "_download", lambda cfg: get_model(cfg.name, weights=None).state_dict()
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "weights").mkdir()
    for name in ("resnet20", "resnet32", "resnet56"):
        network = schema.ResNetConfig(name, 1.0, None, schema.Fan("in"), schema.Shortcut.option_a)
        save_file(
            models.build(network, 3, 10).state_dict(),
            tmp_path / "weights" / f"cifar10_{name}.safetensors",
        )

    def overrides(recipe: str, epochs: int, train_images: int, batch_size: int) -> list[str]:
        sizes = [
            f"epochs={epochs}",
            f"data.train_images={train_images}",
            "data.validation_images=4",
        ]
        places = [f"runs_dir={tmp_path / 'runs'}", "tracking.mode=disabled", "runtime.threads=1"]
        if recipe.startswith("image"):
            images = [
                f"data.root={photographs}",
                "data.image_size=32",
                "runtime.workers=0",
                "optim.batch_size=8",
                "runtime.device=cpu",
            ]
        else:
            images = [f"data.root={tmp_path}", f"optim.batch_size={batch_size}"]
        if recipe == "image_folder":
            images += ["model.weights=null"]  # timm's are downloaded
        return [*sizes, *places, *images]

    return overrides


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    return sample_folder(tmp_path_factory.mktemp("photographs"), size=(80, 60))
