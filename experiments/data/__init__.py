"""Data sets: small ones as tensors on the device, photographs in folders."""

import torch

from experiments.data import image_folder
from experiments.data.image_folder import ImageFolder
from experiments.data.tensor_images import TensorImages, load_resident
from experiments.schema import DataConfig, ImageFolderConfig

__all__ = ["ImageFolder", "TensorImages", "load_dataset", "load_resident"]


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
