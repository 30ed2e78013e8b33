"""Networks and their weights: He et al.'s CIFAR ResNets and VGG-16 with BatchNorm, and torchvision's networks."""

from experiments.models.build import build, widest
from experiments.models.initialisation import initialise_
from experiments.models.package_nets import require_known_name
from experiments.models.weights import image_shape, open_exported, start

__all__ = [
    "build",
    "image_shape",
    "initialise_",
    "open_exported",
    "require_known_name",
    "start",
    "widest",
]
