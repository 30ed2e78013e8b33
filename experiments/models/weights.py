"""The weights that a network starts from: fresh, published, of a file, or an exported network."""

import io
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from experiments.data.base import Normalisation
from experiments.data.downloads import downloading
from experiments.models.build import build
from experiments.models.package_nets import expected_normalisation, package_network
from experiments.models.torchvision_nets import TORCHVISION_WIDEST
from experiments.runs.files import is_published
from experiments.schema import ModelConfig, Package, PackageModelConfig, ResNetConfig, Shortcut
from psap_core import InputError, load_exported
from psap_core.exported import read_plans, read_spec, refuse_not_finite, refuse_other_kinds
from psap_core.files import read_plain

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads that only train, which we leave out


def start(
    cfg: ModelConfig,
    channels: int,
    classes: int,
    image_size: int | None = None,
    *,
    new_classifier: bool = False,
) -> tuple[nn.Module, Normalisation | None]:
    """The network a run starts from, and the normalisation its weights expect (None: they do not say).

    With `new_classifier`, dense weights for another number of classes are taken without their last layer.

    Raises:
        InputError: the weights cannot be read, or are of another network; an exported one may have another width.
    """
    if cfg.weights is None:
        return build(cfg, channels, classes, image_size), None
    path = Path(cfg.weights)
    if path.is_dir():
        exported = open_exported(path)
        _refuse_another(path, cfg, channels, classes)
        return exported
    if isinstance(cfg, PackageModelConfig) and is_of_timm(cfg) and cfg.weights == "pretrained":
        model = package_network(cfg, channels, classes, image_size, pretrained=True)
        return model, expected_normalisation(model, channels)
    model = build(cfg, channels, classes, image_size)
    state, normalisation = _weights_of(cfg)
    if normalisation is None:
        normalisation = expected_normalisation(model, channels)
    if new_classifier:
        _keep_own_classifier(model, state, classes, cfg.weights)
    try:
        refuse_other_kinds(state, model.state_dict())
        refuse_not_finite(model, state)
    except RuntimeError as error:
        raise InputError(f"model.weights={cfg.weights} is damaged: {error}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise InputError(
            f"{cfg.weights} is of another network than {cfg.name}: {reason}"
        ) from error
    return model, normalisation


def is_of_timm(cfg: ModelConfig) -> bool:
    return isinstance(cfg, PackageModelConfig) and cfg.package is Package.timm


def _weights_of(cfg: ModelConfig) -> tuple[dict[str, Tensor], Normalisation | None]:
    """What `cfg.weights`, a file or published weights, holds."""
    assert cfg.weights is not None
    if is_published(cfg.weights):
        return _download(cfg), None
    return _read_weights(Path(cfg.weights))


def _keep_own_classifier(
    model: nn.Module, state: dict[str, Tensor], classes: int, weights: str
) -> None:
    """In `state`, replace tensors that are for another number of classes by the network's own."""
    own = model.state_dict()
    replaced = [
        name
        for name, tensor in own.items()
        if name in state and _differs_in_classes(state[name], tensor, classes)
    ]
    if replaced:
        layers = sorted({name.rpartition(".")[0] for name in replaced})
        print(
            f"{weights} is for another number of classes: {', '.join(layers)} starts anew",
            file=sys.stderr,
        )
    for name in replaced:
        state[name] = own[name]


def _differs_in_classes(theirs: Tensor, own: Tensor, classes: int) -> bool:
    if theirs.ndim != own.ndim or own.ndim == 0:
        return False
    is_for_others = theirs.shape[0] != own.shape[0] == classes
    return is_for_others and theirs.shape[1:] == own.shape[1:]


def _refuse_another(folder: Path, cfg: ModelConfig, channels: int, classes: int) -> None:
    network = read_spec(folder)["network"]
    theirs = network | network["model"]
    mine: dict[str, Any] = {"name": cfg.name, "channels": channels, "classes": classes}
    if isinstance(cfg, ResNetConfig):
        mine["shortcut"] = Shortcut(cfg.shortcut)
    for key, wanted in mine.items():
        if theirs.get(key) != wanted:
            raise InputError(
                f"{folder} holds a network with {key}={theirs.get(key)}, this run's has {key}={wanted}"
            )


def _published_by_torchvision(cfg: ModelConfig) -> "WeightsEnum":
    """The weights that a configuration names; `pretrained` are those that torchvision recommends."""
    from torchvision.models import get_model_weights

    if is_of_timm(cfg):
        raise InputError(
            f"model.weights={cfg.weights}: a network of timm takes `pretrained`, or a file of its weights"
        )
    is_theirs = cfg.name in TORCHVISION_WIDEST or isinstance(cfg, PackageModelConfig)
    choices = get_model_weights(cfg.name) if is_theirs else None
    known = list(choices.__members__) if choices is not None else []
    wanted = "DEFAULT" if cfg.weights == "pretrained" else cfg.weights
    if choices is None or wanted not in known:
        raise InputError(
            f"model.weights={cfg.weights} is not one of torchvision's for {cfg.name}: {', '.join(known) or 'none'}"
        )
    return choices[wanted]


def _downloads() -> Path:
    """Where torchvision keeps weights; TORCH_HOME decides."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def missing_download(cfg: ModelConfig) -> Path | None:
    """The file of torchvision's weights, where it is not there yet; timm's hub knows of its own."""
    if is_of_timm(cfg) and cfg.weights == "pretrained":
        return None
    path = _downloads() / Path(_published_by_torchvision(cfg).url).name
    return None if path.exists() else path


def _download(cfg: ModelConfig) -> dict[str, Tensor]:
    """torchvision's weights, from where it keeps them or its server."""
    published = _published_by_torchvision(cfg)
    try:
        if missing_download(cfg) is None:
            state = published.get_state_dict(progress=False, check_hash=True)
        else:
            print(f"downloading {cfg.weights} of {cfg.name} to {_downloads()}", file=sys.stderr)
            with downloading(_downloads()):
                state = published.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # a damaged file makes torch.load raise anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model.weights={cfg.weights} of {cfg.name} could not be had from {_downloads()}: {reason}"
        ) from error
    return {name: tensor for name, tensor in state.items() if not name.startswith(AUXILIARY)}


def open_exported(folder: Path) -> tuple[nn.Module, Normalisation]:
    """The network of a run's export folder, rebuilt from its spec alone, and its normalisation.

    A run that started from an exported network keeps that one in export/start.
    """
    spec = read_spec(folder)
    try:
        network, normalisation = spec["network"], Normalisation(*map(tuple, spec["normalisation"]))
        if len(normalisation.mean) != network["channels"]:
            raise ValueError(f"normalisation of {len(normalisation.mean)} channels")
        source = folder / "start"
        dense = (
            open_exported(source)[0]
            if source.exists()
            else build(
                _model_config(network["model"]),
                network["channels"],
                network["classes"],
                image_shape(folder)[-1],
            )
        )
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder}/spec.json does not say which network it shrinks: {reason}"
        ) from error
    return load_exported(folder, dense), normalisation


def _model_config(described: dict[str, Any]) -> ModelConfig:
    """The configuration that spec.json describes."""
    if "shortcut" in described:
        return ResNetConfig(**described)
    if "package" in described:
        return PackageModelConfig(**described)
    return ModelConfig(**described)


def image_shape(folder: Path) -> tuple[int, ...]:
    """Channels, height and width of the images that an exported network was pruned with."""
    _, *shape = read_plans(folder)[-1].inputs["shape"]
    return tuple(shape)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], Normalisation | None]:
    try:
        data = read_plain(path)
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                return _published(safetensors.torch.load(data), file.metadata() or {})
        _refuse_compressed(data)
        state: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes make torch.load raise anything
        raise InputError(
            f"model.weights={path} is no readable weights file: {str(error).split('. ')[0]}"
        ) from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    named = isinstance(state, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    )
    if not named:
        raise InputError(f"model.weights={path} is not a dictionary of named tensors")
    return _published(state, {})


def _refuse_compressed(data: bytes) -> None:
    """A small archive that would fill the memory; torch writes none."""
    file = io.BytesIO(data)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            size = sum(part.file_size for part in archive.infolist())
        if size > len(data):
            raise InputError(f"it holds {size:,} bytes in {len(data):,}, as torch writes none")


def _published(
    state: dict[str, Tensor], metadata: dict[str, str]
) -> tuple[dict[str, Tensor], Normalisation | None]:
    """Keys and normalisation of published weights, in our terms.

    akamaster/pytorch_resnet_cifar10 saved a DataParallel wrapper with a torch that did not count batches, and
    trained on images normalised with ImageNet's constants.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    for name in [name for name in state if name.endswith(".running_mean")]:
        state.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
    if "akamaster/pytorch_resnet_cifar10" in metadata.get("source", ""):
        return state, Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return state, None
