"""Networks of timm and torchvision, by their names there, in their own width and initialisation."""

from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from torch import nn

from experiments.data.base import Normalisation
from experiments.models.torchvision_nets import RGB
from experiments.schema import Package, PackageModelConfig
from psap_core import InputError


def package_network(
    cfg: PackageModelConfig,
    channels: int,
    classes: int,
    image_size: int | None = None,
    *,
    pretrained: bool = False,
) -> nn.Module:
    """A network of another package with its last layer for `classes`.

    Args:
        image_size: height and width; of networks that take one size only.
        pretrained: with the weights that timm publishes, and a fresh last layer if theirs has other classes.

    Raises:
        InputError: an unknown name, a width other than 1, or a network that does not take these images.
    """
    if cfg.width != 1:
        raise InputError(f"model.width={cfg.width}: {cfg.name} of {cfg.package} has one width, 1")
    require_known_name(cfg)
    if Package(cfg.package) is Package.torchvision:
        return _torchvision_network(cfg.name, channels, classes, image_size)
    return _timm_network(cfg.name, channels, classes, image_size, pretrained)


def require_known_name(cfg: PackageModelConfig) -> None:
    """Raises InputError where the package has no such network, or is not there."""
    if Package(cfg.package) is Package.torchvision:
        import torchvision

        known = torchvision.models.list_models(module=torchvision.models)
    else:
        if find_spec("timm") is None:
            raise InputError(f"model.name={cfg.name} is a network of timm: pip install timm")
        import timm

        if timm.is_model(cfg.name):
            return
        known = timm.list_models()
    if cfg.name not in known:
        nearest = get_close_matches(cfg.name, known, n=3)
        meant = f"did you mean {' or '.join(nearest)}?" if nearest else "see its list"
        raise InputError(f"model.name={cfg.name}: {cfg.package} has no such network; {meant}")


def _torchvision_network(
    name: str, channels: int, classes: int, image_size: int | None
) -> nn.Module:
    import torchvision

    if channels != RGB:
        raise InputError(f"{name} takes colour images, these have {channels} channel")
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": True}
    if image_size is not None and name.startswith("vit_"):
        options = {"image_size": image_size}
    if image_size is not None and name.startswith("maxvit_"):
        options = {"input_size": (image_size, image_size)}
    try:
        network: nn.Module = torchvision.models.get_model(
            name, weights=None, num_classes=classes, **options
        )
    except (AssertionError, ValueError) as error:  # of the size
        raise InputError(
            f"torchvision cannot make {name} for {image_size} pixels: {error}"
        ) from error
    return network


def _timm_network(
    name: str, channels: int, classes: int, image_size: int | None, pretrained: bool
) -> nn.Module:
    import timm

    options: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
    if image_size is not None and _takes_one_size(name):
        options["img_size"] = image_size
    try:
        network: nn.Module = timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # the hub raises anything where there is no network
        if not pretrained:
            raise InputError(f"timm cannot make {name} for {image_size} pixels: {error}") from error
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model.weights=pretrained of {name} could not be had: {reason}; name a file of weights, or take "
            "model.weights=null"
        ) from error
    return network


def _takes_one_size(name: str) -> bool:
    import timm

    try:
        settings = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise InputError(f"model.name={name}: {' '.join(str(error).split())}") from error
    return settings is not None and settings.fixed_input_size


def expected_normalisation(network: nn.Module, channels: int) -> Normalisation | None:
    """The normalisation that published weights were trained with, which timm's networks say.

    None: the network does not say, or the images have another number of channels.
    """
    settings: Any = getattr(network, "pretrained_cfg", None)
    if not settings or len(settings["mean"]) != channels:
        return None
    return Normalisation(tuple(settings["mean"]), tuple(settings["std"]))
