"""torchvision's networks in any width; they are initialised as torchvision does, fan out."""

from torch import nn

from experiments.models.initialisation import initialise_
from experiments.models.widths import scaled
from experiments.schema import Fan

RGB = 3
TORCHVISION_WIDEST = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "mobilenet_v2": 1280}


def torchvision_network(name: str, width: float, classes: int) -> nn.Module:
    """torchvision's network, every width times a factor; thinner layers are initialised as torchvision's are."""
    from torchvision.models import get_model

    network: nn.Module = get_model(name, weights=None, num_classes=classes)

    def thinner(channels: int) -> int:
        return scaled(channels, width)

    for path, module in list(network.named_modules()) if width != 1 else ():
        if isinstance(module, nn.Conv2d):
            inputs = (
                module.in_channels if module.in_channels == RGB else thinner(module.in_channels)
            )
            groups = 1 if module.groups == 1 else inputs
            thin = nn.Conv2d(
                inputs,
                thinner(module.out_channels),
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                groups=groups,
                bias=False,
            )
            network.set_submodule(path, thin)
        elif isinstance(module, nn.BatchNorm2d):
            network.set_submodule(path, nn.BatchNorm2d(thinner(module.num_features)))
        elif isinstance(module, nn.Linear):
            network.set_submodule(path, nn.Linear(thinner(module.in_features), module.out_features))
    if width != 1:
        initialise_(network, Fan("out"), name)
    return network
