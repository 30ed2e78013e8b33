"""From a configuration to a freshly initialised network."""

from torch import nn

from experiments.models.cifar import RESNET_BLOCKS, RESNET_WIDTHS, VGG, VGG16_WIDTHS, ResNet
from experiments.models.initialisation import initialise_
from experiments.models.package_nets import package_network
from experiments.models.torchvision_nets import RGB, TORCHVISION_WIDEST, torchvision_network
from experiments.models.widths import scaled
from experiments.schema import Fan, ModelConfig, PackageModelConfig, ResNetConfig, Shortcut
from psap_core import InputError

MAX_WIDTH = 64  # nothing that a machine holds is wider


def widest(name: str) -> int:
    """Channels of the widest layer at width 1: networks change only at multiples of 1 / (2 widest)."""
    if name in TORCHVISION_WIDEST:
        return TORCHVISION_WIDEST[name]
    return RESNET_WIDTHS[-1] if name in RESNET_BLOCKS else max(map(max, VGG16_WIDTHS))


def build(
    cfg: ModelConfig, channels: int, classes: int, image_size: int | None = None
) -> nn.Module:
    """A freshly initialised network; every width is the nearest to width * factor, at least 1.

    Args:
        image_size: height and width; of networks of other packages that take one size only.

    Raises:
        InputError: unknown name, or a factor that is not positive.
    """
    if isinstance(cfg, PackageModelConfig):
        return package_network(cfg, channels, classes, image_size)
    if not 0 < cfg.width <= MAX_WIDTH:
        raise InputError(f"model.width={cfg.width} must be above 0 and at most {MAX_WIDTH}")

    def thinner(widths: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(scaled(width, cfg.width) for width in widths)

    network: nn.Module
    if cfg.name in RESNET_BLOCKS and isinstance(cfg, ResNetConfig):
        network = ResNet(
            RESNET_BLOCKS[cfg.name],
            thinner(RESNET_WIDTHS),
            Shortcut(cfg.shortcut),
            channels,
            classes,
        )
    elif cfg.name == "vgg16_bn":
        network = VGG(tuple(map(thinner, VGG16_WIDTHS)), channels, classes)
    elif cfg.name in TORCHVISION_WIDEST:
        if channels != RGB:
            raise InputError(f"model={cfg.name} takes colour images, these have {channels} channel")
        network = torchvision_network(cfg.name, cfg.width, classes)
    else:
        known = ", ".join([*RESNET_BLOCKS, "vgg16_bn", *TORCHVISION_WIDEST])
        raise InputError(f"model.name={cfg.name!r} is unknown, it must be one of {known}")
    if Fan(cfg.fan) is not Fan(
        "out" if cfg.name in TORCHVISION_WIDEST else "in"
    ):  # not what it has already
        initialise_(network, Fan(cfg.fan), cfg.name)
    return network
