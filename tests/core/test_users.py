"""Networks and training loops as users have them: each is pruned while it trains, exported, and computes the same."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx.experimental.optimization
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

from psap_core import (
    PSAP,
    InputError,
    compact_,
    export,
    export_error,
    export_onnx,
    load_exported,
    macs,
    report,
    save_exported,
)
from psap_core.inputs import call, map_tensors
from tests.core.networks import Small, loss_on, sgd, small_example

EPOCHS = 4
SCHEDULE: dict[str, Any] = {"total_epochs": EPOCHS, "start": 1, "ramp_end": 2, "freeze": 3}
SETTINGS: dict[str, Any] = {"scope": "coupled", "min_filters": 1, "pulse_batches": 2} | SCHEDULE


def conv(inputs: int, outputs: int, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False, **options),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Net(nn.Module):
    """stem, then what a test puts between, then a head: [N, 3, 8, 8] -> [N, 4]."""

    between: Callable[[Tensor], Tensor]

    def __init__(self, body: nn.Module | None = None, width: int = 8) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.body = body or conv(8, width)
        self.last = conv(width, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.body(self.stem(x))
        return self.head(self.last(x).mean((2, 3)))


# ---------------------------------------------------------------------------- what forward does


class Asserts(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == 3
        if len(x) == 0:
            raise ValueError("empty batch")
        half = int(x.shape[2]) // 2
        x = F.adaptive_avg_pool2d(self.stem(x), half)
        while x.shape[2] > 2:
            x = F.max_pool2d(x, 2)
        return self.head(self.last(self.body(x)).flatten(2).mean(-1))


class DependsOnData(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Chunks(Net):
    """As in C2f: half of the channels goes through further blocks, all parts are concatenated."""

    def __init__(self) -> None:
        super().__init__(width=16)
        self.split = conv(8, 8)
        self.first, self.second = conv(4, 4), conv(4, 4)
        self.body = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.split(self.stem(x)).chunk(2, 1))
        parts.append(self.first(parts[-1]))
        parts.append(self.second(parts[-1]))
        return self.head(self.last(torch.cat(parts, 1)).mean((2, 3)))


class SpatialPyramid(Net):
    """As in SPP: the same channels pooled at several sizes lie side by side."""

    def __init__(self) -> None:
        super().__init__(width=24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        pooled = [F.max_pool2d(x, size, 1, size // 2) for size in (3, 5)]
        return self.head(self.last(torch.cat([x, *pooled], dim=1)).mean((2, 3)))


class ManyOperations(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(8, 8), conv(8, 8), conv(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).clamp(0, 6)
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear")
        x = F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1]
        x = F.celu(sum([self.a(x), self.b(x), self.c(x)]))
        x = torchvision.ops.stochastic_depth(x, 0.2, "row", self.training)
        return self.head(self.last(x).amax((2, 3)))


class Shuffles(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.last(self.body(x)).mean((2, 3)))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1))))
        return x * gate.sigmoid()


class Residual(nn.Module):
    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.block = nn.Sequential(conv(width, width, groups=groups), conv(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.block(x)
        x += x  # in place
        return x


class NormAndActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class ScaledConvolution(nn.Conv2d):
    """A convolution with a parameter of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 0.5))
        self.block = conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.block(x)


class Keeps(Net):
    """Remembers its last activation."""

    features: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.stem(x)
        return self.head(self.last(self.body(self.features)).mean((2, 3)))


class Bytes(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8
        return super().forward(x.to(next(self.parameters()).dtype) / 255)


class Logarithm(Net):
    def forward(self, x: Tensor) -> Tensor:
        assert (x > 0).all()
        return super().forward(x.log())


class Auxiliary(Net):
    """A second head, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        x = self.body(self.stem(x))
        logits = self.head(self.last(x).mean((2, 3)))
        return (logits, self.auxiliary(x.mean((2, 3)))) if self.training else logits


class DictOutput(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.body(self.stem(x))
        return {"logits": self.head(self.last(x).mean((2, 3))), "features": [x.detach().mean(1)]}


class TwoInputs(nn.Module):
    """Twin calls of one backbone, a second input, named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 8), conv(8, 8))
        self.other = nn.Sequential(nn.Linear(5, 8), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, left: Tensor, right: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        both = self.backbone(left) - self.backbone(right)
        features = torch.cat([both.mean((2, 3)), self.other(numbers)], dim=1)
        return {"logits": self.head(features)}


class Transposed(nn.Module):
    """An encoder and a decoder, as in a U-Net: [N, 3, 8, 8] -> [N, 2, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.top, self.bottom = conv(3, 8), conv(8, 12)
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.out = nn.Sequential(conv(16, 8), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        top = self.top(x)
        up = self.up(self.bottom(F.max_pool2d(top, 2)))
        return self.out(torch.cat([top, up], 1))


def series(dimensions: int, norm: Callable[[int], nn.Module]) -> nn.Module:
    """A network for signals (1), or volumes (3)."""
    convolution = {1: nn.Conv1d, 3: nn.Conv3d}[dimensions]
    pool = {1: nn.AdaptiveAvgPool1d, 3: nn.AdaptiveAvgPool3d}[dimensions]
    return nn.Sequential(
        convolution(3, 8, 3, padding=1), norm(8), nn.ReLU(),
        convolution(8, 8, 3, padding=1), norm(8), nn.GELU(),
        pool(1), nn.Flatten(), nn.Linear(8, 16), nn.Hardswish(), nn.Linear(16, 4),
    )  # fmt: skip


def images(side: int = 8) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def pair() -> dict[str, Tensor]:
    return {"left": images(), "right": images() + 1, "numbers": torch.randn(2, 5)}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "asserts, len, int, while": (Asserts, images),
    "control flow on data": (DependsOnData, images),
    "chunk, C2f": (Chunks, images),
    "SPP": (SpatialPyramid, images),
    "interpolate, pad, crop, clamp, CELU, sum, amax": (ManyOperations, images),
    "channel shuffle": (Shuffles, images),
    "squeeze-and-excite": (lambda: Net(SqueezeExcite(8)), images),
    "residual, in place": (lambda: Net(Residual(8)), images),
    "grouped": (lambda: Net(Residual(8, groups=4)), images),
    "norm and activation": (lambda: Net(nn.Sequential(nn.Conv2d(8, 8, 1), NormAndActivation(8))), images),
    "convolution with a parameter": (
        lambda: Net(nn.Sequential(ScaledConvolution(8, 8, 1), nn.BatchNorm2d(8))), images,
    ),
    "layer scale": (lambda: Net(LayerScale(8)), images),
    "PReLU": (lambda: Net(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.PReLU(8))), images),
    "GroupNorm": (lambda: Net(nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(4, 8), nn.ReLU())), images),
    "InstanceNorm": (lambda: Net(nn.Sequential(nn.Conv2d(8, 8, 1), nn.InstanceNorm2d(8), nn.ReLU())), images),
    "no norm": (lambda: Net(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())), images),
    "GLU": (lambda: Net(nn.Sequential(nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.GLU(1))), images),
    "pixel shuffle": (
        lambda: Net(nn.Sequential(nn.Conv2d(8, 32, 1), nn.BatchNorm2d(32), nn.PixelShuffle(2))), images,
    ),
    "kept activation": (Keeps, images),
    "uint8": (Bytes, lambda: torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)),
    "positive inputs": (Logarithm, lambda: images().abs() + 0.1),
    "head in training only": (Auxiliary, images),
    "dict output": (DictOutput, images),
    "two inputs, a backbone called twice": (TwoInputs, pair),
    "transposed, U-Net": (Transposed, images),
    "Conv1d, BatchNorm1d": (lambda: series(1, nn.BatchNorm1d), lambda: torch.randn(2, 3, 16)),
    "Conv3d, GroupNorm": (lambda: series(3, lambda c: nn.GroupNorm(4, c)), lambda: torch.randn(2, 3, 4, 4, 4)),
    "expanded input": (Net, lambda: images()[:1].expand(2, -1, -1, -1)),
    "channels last": (
        lambda: Net().to(memory_format=torch.channels_last),
        lambda: images().to(memory_format=torch.channels_last),
    ),
}  # fmt: skip


def loss_of(model: nn.Module, example: Any) -> Callable[[int], Tensor]:
    """The loss of a batch that is a number: random inputs like the example, of any output."""

    def loss_of_batch(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)

        def like(tensor: Tensor) -> Tensor:
            order = torch.randperm(tensor.numel(), generator=generator)
            return tensor.flatten()[order].view(tensor.shape)

        output = call(model, map_tensors(example, like))
        output = output["logits"] if isinstance(output, dict) else output
        logits = output if isinstance(output, tuple) else (output,)
        return sum(
            (one.square().mean() + one.flatten(1)[:, 0].mean() for one in logits), torch.zeros(())
        )

    return loss_of_batch


def train_(
    model: nn.Module, optimizers: Any, pruner: PSAP, loss_of_batch: Any, epochs: int = EPOCHS
) -> None:
    for _ in range(epochs):
        model.train()
        for batch in range(2):
            loss = loss_of_batch(100 * pruner.epochs_done + batch)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        pruner.end_epoch(range(50, 60), loss_of_batch)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_users_network_is_pruned_while_it_trains(name: str) -> None:
    make, make_example = NETWORKS[name]
    torch.manual_seed(0)
    model, example = make(), make_example()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    pruner = PSAP(model, optimizer, example, target_macs_cut=0.4, **SETTINGS)
    train_(model, [optimizer], pruner, loss_of(model, example))
    assert pruner.plan.macs_cut >= 0.4
    small = export(model, pruner.plan)
    assert type(small) is type(model)
    assert export_error(model, small, pruner.plan) <= 1e-9
    assert macs(small, example) == pruner.plan.macs
    pruner.compact_()
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in small.named_parameters()
    }
    train_(model, [optimizer], pruner, loss_of(model, example), epochs=2)


@pytest.mark.long
@pytest.mark.parametrize("scope", ["all", "inner"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_other_scopes_export_what_they_can(name: str, scope: str) -> None:
    make, make_example = NETWORKS[name]
    torch.manual_seed(0)
    model, example = make(), make_example()
    optimizer = sgd(model)
    most = report(model, example, scope=scope).largest_macs_cut
    pruner = PSAP(
        model, optimizer, example, target_macs_cut=0.5 * most, **SETTINGS | {"scope": scope}
    )
    train_(model, [optimizer], pruner, loss_of(model, example))
    assert macs(export(model, pruner.plan), example) == pruner.plan.macs


# ---------------------------------------------------------------------------- said at the start, in one sentence


class Skips(Net):
    """Every other call in training skips the body; one head is in no loss; a buffer is made anew in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Sequential(conv(8, 8), nn.Conv2d(8, 2, 1))
        self.register_buffer("brightness", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        if self.training:
            self.calls += 1
            self.brightness = 0.9 * self.brightness + 0.1 * x.mean()
        x = self.stem(x)
        if not self.training or self.calls % 2:
            x = x + self.body(x)
        return self.head(self.last(x).mean((2, 3))), self.unused(x)


def test_what_a_batch_does_not_pass_has_no_gradient() -> None:
    torch.manual_seed(0)
    model = Skips()
    pruner = new_pruner(model, images(), scope="coupled")

    def loss_of_batch(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(torch.randn(8, 3, 8, 8))[0].square().mean()

    for _ in range(EPOCHS):
        loss = loss_of_batch(pruner.epochs_done)
        pruner.optimizers[0].zero_grad()
        loss.backward()
        pruner.optimizers[0].step()
        brightness = model.brightness.clone()
        step = pruner.end_epoch(range(50, 60), loss_of_batch)
        assert torch.equal(model.brightness, brightness)
        if step is not None:
            assert {u for u, _ in step.utility["unused.0.0"].values()} == {0.0}
    export(model, pruner.plan)


class HardCodedSize(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.last(self.body(self.stem(x))), 2)
        return self.head(x.view(-1, 8 * 2 * 2))


class ChecksItsSize(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.body(self.stem(x)))
        if x.shape[1] != 8:
            raise ValueError("8 channels are wanted")
        return self.head(x.mean((2, 3)))


class OtherwiseWhenThin(Net):
    """Nothing is seen of it where few filters go."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.body(self.stem(x)))
        return self.head((x if x.shape[1] > 5 else x + 1).mean((2, 3)))


class HardCodedSplit(Net):
    def forward(self, x: Tensor) -> Tensor:
        a, b = self.stem(x).split([4, 4], 1)
        return self.head(self.last(self.body(torch.cat([a, b], 1))).mean((2, 3)))


class Draws(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x))


class Uncopyable(Net):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("no copies of this")


class OnlySingle(Net):
    """Cannot run in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def new_pruner(model: nn.Module, example: Any, **settings: Any) -> PSAP:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    return PSAP(model, optimizer, example, **{"target_macs_cut": 0.4} | SETTINGS | settings)


def test_channels_whose_number_is_written_in_the_code_are_left_alone() -> None:
    alone = {
        layer.name: layer.reason
        for layer in report(HardCodedSize(), images(), scope="coupled").left_alone
    }
    assert "their number is written in the code of view" in alone["last.0"]
    export_of(HardCodedSize(), images(), target_macs_cut=0.2)


def test_a_network_that_checks_its_size_is_told_the_line() -> None:
    with pytest.raises(
        InputError,
        match=r"ChecksItsSize cannot lose filters as it is: .*test_users\.py:\d+, `raise Value",
    ):
        new_pruner(ChecksItsSize(), images())
    with pytest.raises(InputError, match=r"computes something else.*exclude=\['last\.0'\]"):
        new_pruner(OtherwiseWhenThin(), images(), min_filters=2)
    pruner = new_pruner(ChecksItsSize(), images(), exclude=["last"], target_macs_cut=0.2)
    assert "last.0" not in [group.name for group in pruner.groups]


def test_channels_split_by_sizes_are_left_alone() -> None:
    alone = {
        layer.name: layer.reason
        for layer in report(HardCodedSplit(), images(), scope="coupled").left_alone
    }
    assert "split by sizes in split" in alone["stem.0"]
    export_of(HardCodedSplit(), images())


def export_of(model: nn.Module, example: Any, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    pruner = new_pruner(model, example, **settings)
    train_(model, pruner.optimizers, pruner, loss_of(model, example))
    return export(model, pruner.plan)


def test_random_numbers_in_evaluation_mode_are_named() -> None:
    with pytest.raises(
        InputError, match=r"Draws draws random numbers in evaluation mode.*compared with it$"
    ):
        new_pruner(Draws(), images())
    with pytest.raises(InputError, match="or its output is not finite"):
        new_pruner(OnlySingle(), images() * float("nan"))


def test_a_model_that_cannot_be_copied() -> None:
    with pytest.raises(InputError, match=r"Uncopyable cannot be copied.*no copies of this"):
        new_pruner(Uncopyable(), images())


def test_a_network_that_cannot_run_in_float64() -> None:
    export_of(OnlySingle(), images())


def softened(x: Tensor) -> Tensor:
    return torch.log((1 + x.exp()) / 2)


class Softened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return softened(x)


def test_an_operation_of_ones_own_that_maps_0_to_0() -> None:
    seen = torch.overrides.wrap_torch_function(lambda x: (x,))(softened)

    class Function(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return seen(x)

    for activation, declared in ((Softened(), Softened), (Function(), seen)):
        model = Net(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), activation))
        alone = [layer.name for layer in report(model, images(), scope="coupled").left_alone]
        assert alone == ["body.0", "head"]
        optimizer = sgd(model)
        pruner = PSAP(
            model, optimizer, images(), zero_preserving=[declared], target_macs_cut=0.4, **SETTINGS
        )
        assert "body.0" in [group.name for group in pruner.groups]
        train_(model, [optimizer], pruner, loss_of(model, images()))
        export(model, pruner.plan, zero_preserving=[declared])
    with pytest.raises(InputError, match="calls of softened cannot be seen: decorate it"):
        report(Net(), images(), zero_preserving=[softened])


@pytest.mark.long
def test_what_is_frozen_is_left_alone_and_said_together() -> None:
    model = torchvision.models.resnet50(num_classes=4)
    for part in (model.conv1, model.bn1, model.layer1, model.layer2):
        part.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01)
    pruner = PSAP(model, optimizer, torch.zeros(1, 3, 32, 32), target_macs_cut=0.3, total_epochs=2)
    assert all(group.name.startswith(("layer3", "layer4")) for group in pruner.groups)
    alone = {layer.name: layer.reason for layer in pruner.report.left_alone}
    assert "is frozen" in alone["layer1.0.conv1"]
    with pytest.raises(
        InputError, match=r"unreachable: at most 0\.\d+ can go; .* left alone: .*is frozen"
    ):
        PSAP(
            model,
            torch.optim.SGD(trained, 0.01),
            torch.zeros(1, 3, 32, 32),
            target_macs_cut=0.9,
            total_epochs=2,
        )


# ---------------------------------------------------------------------------- optimisers


class Wrapper:
    """As accelerate's: holds an optimiser and steps it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


def test_a_wrapped_optimiser() -> None:
    torch.manual_seed(0)
    model = Net()
    wrapper = Wrapper(sgd(model))
    pruner = PSAP(model, wrapper, images(), target_macs_cut=0.4, **SETTINGS)  # type: ignore[arg-type]
    train_(model, [wrapper], pruner, loss_of(model, images()))
    export(model, pruner.plan)


def test_two_optimisers() -> None:
    """Matrices and vectors apart: restored and frozen filters have the state of both."""
    torch.manual_seed(0)
    model = Net(Residual(8))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizers = [torch.optim.SGD(matrices, 0.05, momentum=0.9), torch.optim.AdamW(vectors)]
    pruner = PSAP(model, optimizers, images(), target_macs_cut=0.4, **SETTINGS)
    train_(model, optimizers, pruner, loss_of(model, images()))
    export(model, pruner.plan)
    pruner.compact_()
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            assert all(value.shape in ((), parameter.shape) for value in state.values())


@pytest.mark.parametrize("epochs", [2, 3])
def test_a_successor(epochs: int) -> None:
    torch.manual_seed(0)
    model = Net(Residual(8))
    first, second = sgd(model), torch.optim.AdamW(model.parameters(), 1e-3)
    pruner = PSAP(model, first, images(), target_macs_cut=0.4, **SETTINGS)
    train_(model, [first], pruner, loss_of(model, images()), epochs)
    pruner.use(second)
    train_(model, [second], pruner, loss_of(model, images()), EPOCHS - epochs)
    export(model, pruner.plan)
    new_pruner(Net(), images())
    PSAP(model, first, images(), target_macs_cut=0.1, total_epochs=2)  # it is free again
    with pytest.raises(InputError, match=r"does not train 'stem\.0\.weight'"):
        pruner.use(torch.optim.SGD(model.head.parameters(), 0.1))


def test_gradient_scaling() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    pruner = PSAP(model, optimizer, images(), target_macs_cut=0.4, **SETTINGS)
    loss_of_batch = loss_of(model, images())
    for epoch in range(EPOCHS):
        optimizer.zero_grad()
        scaler.scale(loss_of_batch(epoch)).backward()
        scaler.step(optimizer)
        scaler.update()
        pruner.end_epoch(range(5), loss_of_batch)
    export(model, pruner.plan)


# ---------------------------------------------------------------------------- afterwards


def test_weights_from_before_the_cut_was_complete_are_refused_with_the_reason() -> None:
    torch.manual_seed(0)
    model = Net(Residual(8))
    optimizer = sgd(model)
    pruner = PSAP(model, optimizer, images(), target_macs_cut=0.4, **SETTINGS)
    average = torch.optim.swa_utils.AveragedModel(model)
    for _ in range(EPOCHS):
        train_(model, [optimizer], pruner, loss_of(model, images()), 1)
        average.update_parameters(model)
    with pytest.raises(
        InputError,
        match=r"weights do not fit the plan: \d+ of the filters .* are live; take weights",
    ):
        export(average.module, pruner.plan)
    with pytest.raises(InputError, match="weights do not fit the plan"):
        compact_(average.module, pruner.plan)
    export(model, pruner.plan)


def test_more_epochs_than_planned_do_nothing() -> None:
    torch.manual_seed(0)
    model = Net()
    pruner = new_pruner(model, images())
    train_(model, pruner.optimizers, pruner, loss_of(model, images()), EPOCHS)
    plan = pruner.plan
    assert [pruner.end_epoch((), loss_of(model, images())) for _ in range(2)] == [None, None]
    assert pruner.plan is plan
    assert pruner.epochs_done == EPOCHS + 2
    export(model, pruner.plan)


def test_a_coupled_export_is_quantised_fused_scripted_and_pickled(tmp_path) -> None:
    torch.manual_seed(0)
    network = torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=4
    )
    small = export_of(network, images(32)).eval()
    batch = images(32)
    expected = small(batch)
    torch.testing.assert_close(torch.jit.script(small)(batch), expected)
    torch.testing.assert_close(
        torch.fx.experimental.optimization.fuse(small)(batch), expected, rtol=1e-3, atol=1e-3
    )
    torch.save(small, tmp_path / "small.pt")
    again = torch.load(tmp_path / "small.pt", weights_only=False)
    assert torch.equal(again(batch), expected)
    assert not any("psap_core" in type(module).__module__ for module in small.modules())
    mapping = get_default_qconfig_mapping("x86")
    prepared = prepare_fx(small, mapping, example_inputs=(batch,))
    prepared(batch)
    quantised = convert_fx(prepared)
    assert (quantised(batch) - expected).abs().max() < 0.1 * expected.abs().max()


def test_compact_changes_no_reference(tmp_path) -> None:
    """A scheduler goes on, a loss that is still held does no harm, the small network is the exported one."""
    torch.manual_seed(0)
    model = Net(Residual(8))
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    parameters = [*model.parameters()]
    pruner = PSAP(model, optimizer, images(), target_macs_cut=0.4, **SETTINGS)
    loss_of_batch = loss_of(model, images())
    with pytest.raises(InputError, match="compact_ comes after the freeze: 0 of 3"):
        pruner.compact_()
    train_(model, [optimizer], pruner, loss_of_batch)
    held = loss_of_batch(0)
    held.backward()
    small = copy.deepcopy(export(model, pruner.plan))
    pruner.compact_()
    pruner.compact_()
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), small.parameters(), strict=True)
    )
    scheduler.step()
    train_(model, [optimizer], pruner, loss_of_batch, 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.005)


def test_a_whole_training_of_the_small_example_still_works() -> None:
    torch.manual_seed(0)
    model = Small()
    pruner = new_pruner(model, small_example())
    train_(model, pruner.optimizers, pruner, lambda seed: loss_on(model, 8, seed=seed))
    export(model, pruner.plan)


@pytest.mark.parametrize("scope", ["coupled", "all"])
def test_three_rounds_are_loaded_in_one_call(tmp_path, scope: str) -> None:
    torch.manual_seed(0)
    dense = Net(Residual(8))
    model, plans = copy.deepcopy(dense), []
    for cut in (0.3, 0.3, 0.2):
        pruner = new_pruner(model, images(), target_macs_cut=cut, scope=scope)
        train_(model, pruner.optimizers, pruner, loss_of(model, images()))
        plans.append(pruner.plan)
        model = export(model, pruner.plan)
    save_exported(tmp_path, model, plans)
    again = load_exported(tmp_path, dense)
    batch = images()
    assert torch.equal(again.eval()(batch), model.eval()(batch))
    assert macs(again, batch) == plans[-1].macs


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("chunk, C2f", marks=pytest.mark.long),
        pytest.param(
            "transposed, U-Net",
            marks=pytest.mark.skipif(
                torch.__version__.startswith("2.6."), reason="torch 2.6 cannot translate it"
            ),
        ),
        pytest.param("two inputs, a backbone called twice", marks=pytest.mark.long),
        pytest.param("uint8", marks=pytest.mark.long),
    ],
)
def test_onnx_takes_any_batch_height_and_width(tmp_path, name: str) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    make, make_example = NETWORKS[name]
    model, example = make(), make_example()
    torch.manual_seed(0)
    pruner = new_pruner(model, example)
    train_(model, pruner.optimizers, pruner, loss_of(model, example))
    small = export(model, pruner.plan).eval()
    export_onnx(small, tmp_path / "small.onnx", pruner.plan)
    session = onnxruntime.InferenceSession(tmp_path / "small.onnx")

    def larger(tensor: Tensor) -> Tensor:
        taller = torch.cat([tensor, tensor], 2) if tensor.ndim == 4 else tensor
        return torch.cat([taller, taller, taller])

    bigger = map_tensors(example, larger)
    named = bigger if isinstance(bigger, dict) else {"images": bigger}
    (answer,) = session.run(None, {key: tensor.numpy() for key, tensor in named.items()})
    with torch.no_grad():
        expected = call(small, bigger)
    expected = expected["logits"] if isinstance(expected, dict) else expected
    torch.testing.assert_close(torch.from_numpy(answer), expected, rtol=1e-4, atol=1e-5)
