"""Data sets: small ones as tensors on the device, photographs in folders."""

from pathlib import Path

import torch

from experiments.data import image_folder
from experiments.data.image_folder import ImageFolder
from experiments.data.tensor_images import TensorImages, load_resident
from experiments.schema import DataConfig, ImageFolderConfig

__all__ = ["ImageFolder", "TensorImages", "is_there", "load_dataset", "load_resident"]


def load_dataset(cfg: DataConfig, device: torch.device) -> TensorImages | ImageFolder:
    """The configured data set; a small one lies on the device.

    The test split is fixed. Validation images are taken first, from all training images; `train_images` are
    taken from the rest. All draws keep the shares of the classes and use a fixed seed, not the run's.

    Raises:
        InputError: missing or damaged files, more images asked for than there are, or wrong mean or std.
    """
    if isinstance(cfg, ImageFolderConfig):
        return image_folder.load_image_folder(cfg)
    return load_resident(cfg).to(device)


def is_there(cfg: DataConfig) -> bool:
    """Can the data set be loaded without a download?"""
    root = Path(cfg.root)
    if cfg.name == "digits":
        return True
    if cfg.name == "imagenette":
        return root.is_dir() or (root.parent / "imagenette2").is_dir()
    if isinstance(cfg, ImageFolderConfig):
        return root.is_dir()
    return (root / "cifar10.safetensors").exists() or _is_torchvisions_cifar10(root)


def _is_torchvisions_cifar10(root: Path) -> bool:
    from torchvision.datasets import CIFAR10

    try:
        CIFAR10(str(root), download=False)
    except RuntimeError:
        return False
    return True
