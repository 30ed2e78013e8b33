"""The networks and their weights: He et al.'s CIFAR ResNets and VGG-16 with BatchNorm, and torchvision's networks.

They take any input size. The CIFAR networks are initialised as in He et al. (2015), fan in; torchvision's are
initialised by torchvision, fan out.
"""

import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from experiments.harness.data import Normalisation
from experiments.harness.files import is_published
from experiments.schema import Fan, ModelConfig, ResNetConfig, Shortcut
from psap_core import InputError, load_exported
from psap_core.exported import read_plans, read_spec
from psap_core.surgery import ScatteredBatchNorm

RGB = 3
# Blocks of each stage.
RESNET_BLOCKS = {
    "resnet20": 3,
    "resnet32": 5,
    "resnet44": 7,
    "resnet56": 9,
    "resnet110": 18,
}
RESNET_WIDTHS = (16, 32, 64)
TORCHVISION_WIDEST = {"resnet18": 512, "resnet34": 512, "resnet50": 2048, "mobilenet_v2": 1280}
VGG16_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class OptionA(nn.Module):
    """Shortcut without parameters: every stride-th pixel; missing channels are zeros, half on each side.

    Channels go to their places by a constant matrix [width, inputs] of ones and zeros, which is exact. So channels of
    either side can be pruned: a column or a row of it goes.
    """

    weight: Tensor

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        before = (width - inputs) // 2
        places = F.pad(torch.eye(inputs), (0, 0, before, width - inputs - before))
        self.register_buffer("weight", places, persistent=False)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        pixels = x[:, :, :: self.stride, :: self.stride].movedim(1, -1)
        return F.linear(pixels, self.weight).movedim(-1, 1)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: [N, inputs, H, W] -> [N, width, H / stride, W / stride]."""

    def __init__(self, inputs: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module
        if stride == 1 and inputs == width:
            self.shortcut = nn.Identity()
        elif shortcut is Shortcut.option_a:
            self.shortcut = OptionA(inputs, width, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """CIFAR ResNet (He et al. 2016): a stem and three stages of `blocks` basic blocks."""

    def __init__(
        self, blocks: int, widths: tuple[int, ...], shortcut: Shortcut, channels: int, classes: int
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        inputs, stages = widths[0], []
        for stage, width in enumerate(widths):
            strides = [2 if stage else 1] + [1] * (blocks - 1)
            stages.append(
                nn.Sequential(
                    *(
                        BasicBlock(width if i else inputs, width, stride, shortcut)
                        for i, stride in enumerate(strides)
                    )
                )
            )
            inputs = width
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(inputs, classes)
        initialise_(self, Fan("in"))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean([2, 3]))
        return logits


class VGG(nn.Module):
    """VGG-16 with BatchNorm for CIFAR: 13 convolutions, max-pooling between the stages, one linear layer."""

    def __init__(self, widths: tuple[tuple[int, ...], ...], channels: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for stage, stage_widths in enumerate(widths):
            if stage:
                layers.append(nn.MaxPool2d(2, ceil_mode=True))
            for width in stage_widths:
                layers += [
                    nn.Conv2d(channels, width, 3, 1, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(channels, classes)
        initialise_(self, Fan("in"))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.linear(self.features(x).mean([2, 3]))
        return logits


def initialise_(model: nn.Module, fan: Fan, name: str = "") -> None:
    """Fresh weights: He et al.'s for convolutions and, with fan in, linear layers; torch's own for the others.

    MobileNetV2's classifier, by the network's name, is torchvision's: normal with a standard deviation of 0.01.
    """
    for module in model.modules():
        if isinstance(module, ScatteredBatchNorm):
            module.constant.zero_()
        if isinstance(module, nn.Conv2d) or (isinstance(module, nn.Linear) and fan.value == "in"):
            nn.init.kaiming_normal_(module.weight, mode=f"fan_{fan.value}", nonlinearity="relu")  # type: ignore[arg-type]
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and name == "mobilenet_v2":
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.Linear, nn.BatchNorm2d, ScatteredBatchNorm)):
            module.reset_parameters()


def _torchvision_network(name: str, width: float, classes: int) -> nn.Module:
    """torchvision's network, every width times a factor; thinner layers are initialised as torchvision's are."""
    from torchvision.models import get_model

    network: nn.Module = get_model(name, weights=None, num_classes=classes)

    def thinner(channels: int) -> int:
        return _scaled(channels, width)

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


def _scaled(channels: int, factor: float) -> int:
    return max(1, int(channels * factor + 0.5))


def widest(name: str) -> int:
    """Channels of the widest layer at width 1: networks change only at multiples of 1 / (2 widest)."""
    if name in TORCHVISION_WIDEST:
        return TORCHVISION_WIDEST[name]
    return RESNET_WIDTHS[-1] if name in RESNET_BLOCKS else max(map(max, VGG16_WIDTHS))


def build(cfg: ModelConfig, channels: int, classes: int) -> nn.Module:
    """A freshly initialised network; every width is the nearest to width * factor, at least 1.

    Raises:
        InputError: unknown name, or a factor that is not positive.
    """
    if not 0 < cfg.width < math.inf:
        raise InputError(f"model.width={cfg.width} must be above 0 and finite")

    def scaled(widths: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(_scaled(width, cfg.width) for width in widths)

    network: nn.Module
    if cfg.name in RESNET_BLOCKS and isinstance(cfg, ResNetConfig):
        network = ResNet(
            RESNET_BLOCKS[cfg.name],
            scaled(RESNET_WIDTHS),
            Shortcut(cfg.shortcut),
            channels,
            classes,
        )
    elif cfg.name == "vgg16_bn":
        network = VGG(tuple(map(scaled, VGG16_WIDTHS)), channels, classes)
    elif cfg.name in TORCHVISION_WIDEST:
        if channels != RGB:
            raise InputError(f"model={cfg.name} takes colour images, these have {channels} channel")
        network = _torchvision_network(cfg.name, cfg.width, classes)
    else:
        known = ", ".join([*RESNET_BLOCKS, "vgg16_bn", *TORCHVISION_WIDEST])
        raise InputError(f"model.name={cfg.name!r} is unknown, it must be one of {known}")
    if Fan(cfg.fan) is not Fan(
        "out" if cfg.name in TORCHVISION_WIDEST else "in"
    ):  # not what it has already
        initialise_(network, Fan(cfg.fan), cfg.name)
    return network


def start(
    cfg: ModelConfig, channels: int, classes: int, *, new_classifier: bool = False
) -> tuple[nn.Module, Normalisation | None]:
    """The network a run starts from, and the normalisation its weights expect (None: they do not say).

    With `new_classifier`, dense weights for another number of classes are taken without their last linear layer.

    Raises:
        InputError: the weights cannot be read, or are of another network; an exported one may have another width.
    """
    if cfg.weights is None:
        return build(cfg, channels, classes), None
    path = Path(cfg.weights)
    if path.is_dir():
        exported = open_exported(path)
        _refuse_another(path, cfg, channels, classes)
        return exported
    model = build(cfg, channels, classes)
    published = is_published(cfg.weights)
    state, normalisation = (
        (_download(cfg.name, cfg.weights), None) if published else _read_weights(path)
    )
    if new_classifier:
        name = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
        own = {
            key: tensor for key, tensor in model.state_dict().items() if key.startswith(f"{name}.")
        }
        if any(key in state and state[key].shape != tensor.shape for key, tensor in own.items()):
            print(
                f"{cfg.weights} is for another number of classes: {name!r} starts anew",
                file=sys.stderr,
            )
            state |= own
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise InputError(
            f"{cfg.weights} is of another network than {cfg.name}: {reason}"
        ) from error
    return model, normalisation


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


def _download(name: str, weights: str) -> dict[str, Tensor]:
    """torchvision's weights, from its cache or its server."""
    from torchvision.models import get_model_weights

    choices = list(get_model_weights(name).__members__) if name in TORCHVISION_WIDEST else []
    if weights not in choices:
        known = ", ".join(choices) or "none"
        raise InputError(f"model.weights={weights} is not one of torchvision's for {name}: {known}")
    try:
        state: dict[str, Tensor] = get_model_weights(name)[weights].get_state_dict(
            progress=False, check_hash=True
        )
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"model.weights={weights} of {name} could not be downloaded: {error}"
        ) from error
    return state


def open_exported(folder: Path) -> tuple[nn.Module, Normalisation]:
    """The network of a run's export folder, rebuilt from its spec alone, and its normalisation.

    A run that started from an exported network keeps that one in export/start.
    """
    spec = read_spec(folder)
    try:
        network, normalisation = spec["network"], Normalisation(*map(tuple, spec["normalisation"]))
        if len(normalisation.mean) != network["channels"]:
            raise ValueError(f"normalisation of {len(normalisation.mean)} channels")
        kind = ResNetConfig if "shortcut" in network["model"] else ModelConfig
        source = folder / "start"
        dense = (
            open_exported(source)[0]
            if source.exists()
            else build(kind(**network["model"]), network["channels"], network["classes"])
        )
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder}/spec.json does not say which network it shrinks: {reason}"
        ) from error
    return load_exported(folder, dense), normalisation


def image_shape(folder: Path) -> tuple[int, ...]:
    """Channels, height and width of the images that an exported network was pruned with."""
    _, *shape = read_plans(folder)[-1].inputs["shape"]
    return tuple(shape)


def _read_weights(path: Path) -> tuple[dict[str, Tensor], Normalisation | None]:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                return _published(tensors, file.metadata() or {})
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
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
