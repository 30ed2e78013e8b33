"""The configuration's types: an unknown key, a wrong type or a missing value is an error from the start.

Values live in conf/, one YAML file per choice.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")  # what `onnx` needs


class Shortcut(StrEnum):
    """How a residual block whose width or resolution changes passes its input on."""

    option_a = "option_a"  # every second pixel, missing channels are zero (He et al., CIFAR)
    projection = "projection"  # 1x1 convolution and BatchNorm


# The fan of the network's initialisation, in whose units eq. 1 compares weights (`in` is no Python name).
Fan = StrEnum("Fan", {"in": "in", "out": "out"})


class Scope(StrEnum):
    """Which channels are pruned together; `psap_core.groups` finds them."""

    coupled = "coupled"  # sums join channels: the residual stream gets thinner
    all = "all"  # a sum ends them, and keeps its full width
    inner = "inner"  # only channels that reach no sum


class Reference(StrEnum):
    network = "network"
    layer = "layer"


class TrackingMode(StrEnum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


class OnCorrupt(StrEnum):
    """What happens at an image that cannot be read."""

    error = "error"
    skip = "skip"  # left out, counted and reported


class Precision(StrEnum):
    float32 = "float32"  # on a GPU that has TF32, convolutions compute in it, as is torch's default
    auto = "auto"  # bfloat16 autocast where the GPU has it, float32 elsewhere


class Fast(StrEnum):
    """How a training step is done; `eager` is the reference, the others compute the same, rounded otherwise."""

    auto = "auto"  # captured where that is possible, eager elsewhere
    eager = "eager"
    compiled = "compiled"  # by torch.compile, which takes a minute at the start
    captured = "captured"  # as one CUDA graph


@dataclass
class DataConfig:
    name: str = MISSING  # which data set
    root: str = MISSING  # folder with the data files; where it lies is no part of a run's identity
    image_size: int = MISSING  # pixels; smaller than the images means area downsampling
    train_images: int | None = MISSING  # null: all that validation leaves
    validation_images: int = MISSING  # held out of the training images by a fixed seed
    flip: bool = MISSING  # mirror training images at random
    mean: list[float] = MISSING  # per channel, of pixels in [0, 1]
    std: list[float] = MISSING  # per channel, of pixels in [0, 1]


@dataclass
class ImageFolderConfig(DataConfig):
    """A folder of train/<wnid>/*.JPEG and val/<wnid>/*.JPEG."""

    on_corrupt: OnCorrupt = MISSING  # what happens at an image that cannot be read


@dataclass
class OwnFolderConfig(ImageFolderConfig):
    """Any folder with a folder of images per class, or with train/ and val/ of such folders."""

    # Folder with the images: their names and sizes are part of a run's identity, where it lies is not.
    root: str = MISSING
    test_share: float = MISSING  # of each class, held out by a fixed seed where there is no val/


@dataclass
class ModelConfig:
    name: str = MISSING  # which network
    width: float = MISSING  # factor on every width, stream included
    # A dense .safetensors or .pth, an exported folder, `pretrained`, or a name of torchvision's enumerations.
    weights: str | None = MISSING
    fan: Fan = MISSING  # of the initialisation


@dataclass
class ResNetConfig(ModelConfig):
    shortcut: Shortcut = MISSING  # how a block passes its input on where width or resolution change


class Package(StrEnum):
    """A package of networks."""

    timm = "timm"
    torchvision = "torchvision"


@dataclass
class PackageModelConfig(ModelConfig):
    """An image classifier of another package: `name` is its name there, its width and initialisation are its own."""

    package: Package = MISSING  # whose network it is


@dataclass
class MethodConfig:
    name: str = MISSING  # which method
    # How figures draw the method, and as what others publish it; no part of a run's identity.
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class TargetConfig(MethodConfig):
    """Methods that are given one number: the share of the dense network's MACs to remove."""

    target_macs_cut: float = MISSING  # share of the dense network's MACs to remove


@dataclass
class UniformConfig(TargetConfig):
    """Methods that prune the same share of every channel group."""

    scope: Scope = MISSING  # which channels are pruned together


@dataclass
class HardPruningConfig(UniformConfig):
    """Methods whose pruned filters stay pruned."""

    # Train the small network once the plan is final; null: in scope coupled.
    compact: bool | None = MISSING


@dataclass
class SFPConfig(UniformConfig):
    # 1: the whole cut from the first epoch; later: the cut grows as PSAP's does (ASFP).
    ramp_end: int | float = MISSING


@dataclass
class ThinPlanConfig(MethodConfig):
    run: str = MISSING  # folder of a finished run, whose exported architecture is trained from fresh weights


@dataclass
class PSAPConfig(TargetConfig):
    """The hyper-parameters of `psap_core.PSAP`."""

    scope: Scope = MISSING  # which channels are pruned together
    exclude: list[str] = MISSING  # layers that keep all their filters
    kappa: float = MISSING  # a weight below kappa times the root mean square counts as sparse
    sparsity_reference: Reference = MISSING  # whose root mean square: the network's or each layer's
    alpha: float = MISSING  # how much the sparsity ratios decide; 0: one ratio for all layers
    # Supervise the pruned filters' gradients, and restore the important ones.
    protection: bool = MISSING
    pulse_batches: int = MISSING  # batches whose gradients a pruning step looks at
    margin: float = MISSING  # share of a layer's pruned filters that are proposed beyond them
    min_filters: int = MISSING  # that every layer keeps
    min_filter_share: float = MISSING  # of its filters, that every layer keeps
    round_to: int = MISSING  # groups of at least twice as many filters keep a multiple of this
    # First pruning step; shares of the epochs are floats, epochs are ints.
    start: int | float = MISSING
    ramp_end: int | float = MISSING  # when the whole cut is reached
    freeze: int | float = MISSING  # last pruning step: what is pruned then is gone
    interval: int = MISSING  # epochs from one pruning step to the next
    # Train the small network from the freeze on; null: in scope coupled.
    compact: bool | None = MISSING


class Rule(StrEnum):
    """The rule that a variant of PSAP changes; experiments/methods/variants.py says how."""

    stage_width = "stage_width"
    permuted = "permuted"
    return_exact = "return_exact"
    return_graded = "return_graded"
    lowest_utility = "lowest_utility"
    streams_only = "streams_only"


@dataclass
class PSAPVariantConfig(PSAPConfig):
    """PSAP with one rule changed, for the study only."""

    rule: Rule = MISSING  # the rule that is changed


class OptimizerName(StrEnum):
    sgd = "sgd"  # with Nesterov momentum
    adamw = "adamw"


class LRSchedule(StrEnum):
    """How the learning rate falls after the warm-up."""

    steps = "steps"  # times lr_factor at every milestone
    cosine = "cosine"  # from lr towards 0 along half a cosine, a value for each epoch


@dataclass
class OptimConfig:
    """The optimiser, its learning rate from epoch to epoch, and what a step minimises."""

    optimizer: OptimizerName = MISSING  # sgd has Nesterov momentum
    schedule: LRSchedule = MISSING  # how the learning rate falls after the warm-up

    batch_size: int = MISSING  # images per optimiser step, over all processes
    accumulate: int = MISSING  # micro-batches of one process's share of them
    precision: Precision = MISSING  # in which the network computes
    lr: float = MISSING  # learning rate after the warm-up
    # The batch that lr is meant for: it grows linearly with batch_size; null: it stays.
    lr_batch: int | None = MISSING
    momentum: float = MISSING  # of AdamW the first of its two decay rates
    weight_decay: float = MISSING  # in the gradient for SGD, beside it for AdamW
    decay_all: bool = MISSING  # False: only tensors with two or more dimensions decay
    milestones: list[float] = MISSING  # shares of the epochs
    lr_factor: float = MISSING  # at every milestone
    warmup_epochs: int = MISSING  # epochs at warmup_lr
    warmup_lr: float = MISSING  # learning rate of the warm-up
    label_smoothing: float = MISSING  # share of a label that all classes get
    # Parameter of the Beta distribution that mixes images; 0: they are not mixed.
    mixup: float = MISSING


@dataclass
class RuntimeConfig:
    device: str = MISSING  # auto, cpu, cuda
    threads: int | None = MISSING  # torch's CPU threads; null: torch decides
    # Processes that read photographs, per training process; null: its share of the cores.
    workers: int | None = MISSING
    fast: Fast = MISSING  # how a training step is done


@dataclass
class TrackingConfig:
    """Where Weights & Biases shows the run; no part of its identity."""

    # `offline` keeps the W&B run in the run folder, `wandb sync` sends it.
    mode: TrackingMode = MISSING
    entity: str | None = MISSING  # user or team; null: the login's default
    project: str = MISSING  # of W&B
    tags: list[str] = MISSING  # beside suite, data set and network
    notes: str | None = MISSING  # what W&B shows beside the run
    artifact: bool = MISSING  # log the exported network, too


@dataclass
class Config:
    """One run."""

    name: str = MISSING  # of the recipe
    suite: str | None = None  # the table that the run is for, if any; no part of its identity
    cell: str | None = None  # the table's row; no part of its identity
    epochs: int = MISSING  # of the whole training
    seed: int = MISSING  # of weights, order and augmentation
    target_macs_cut: float = MISSING  # share of the MACs to remove, for methods that have a target
    onnx: bool = MISSING  # also write export/model.onnx and check it; no part of the run's identity
    runs_dir: str = MISSING  # where run folders are made
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


@dataclass
class EvaluateConfig(Config):
    run: str | None = None  # folder of a finished run, whose exported network is evaluated


@dataclass
class ExportConfig:
    run: str = MISSING  # folder of a finished run
    onnx: bool = MISSING  # also write export/model.onnx and check it
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)


def compacts(method: MethodConfig) -> bool:
    """Does the network in training become the small one, once its plan is final?"""
    if not isinstance(method, HardPruningConfig | PSAPConfig):
        return False
    if method.compact is None:
        return method.scope is Scope.coupled
    return method.compact


@cache
def register_types() -> None:
    """Make the types known to Hydra, under the names that conf/ refers to."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=Config)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    store.store(name="export_schema", node=ExportConfig)
    kinds: tuple[tuple[str, type], ...] = (
        ("data", DataConfig),
        ("model", ModelConfig),
        ("method", MethodConfig),
    )
    for group, kind in kinds:
        for config in _subclasses(kind):
            store.store(group=group, name=_schema_name(config), node=config)


def _subclasses(kind: type) -> list[type]:
    subclasses: list[type] = []
    subclass: type
    for subclass in kind.__subclasses__():
        subclasses += [subclass, *_subclasses(subclass)]
    return subclasses


def _schema_name(config: type) -> str:
    """`thinplan_schema` of ThinPlanConfig: what a file of conf/ has among its defaults."""
    return f"{config.__name__.removesuffix('Config').lower()}_schema"
