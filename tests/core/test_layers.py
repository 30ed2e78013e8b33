"""The dataflow analysis: which convolutions are prunable, what goes with a filter, who reads its channels."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from psap_core import InputError, find_layers
from tests.core.networks import NETWORKS, SMALL_LAYERS, Small, by_topology, small_example


@pytest.mark.parametrize("name", by_topology())
def test_every_network_has_its_prunable_layers(name: str) -> None:
    make, side, layers, inner = NETWORKS[name]
    model, example = make(), torch.zeros(1, 3, side, side)
    found = find_layers(model, example)
    assert len(found) == layers
    assert [layer for layer in found if layer.role == "inner"] == list(
        find_layers(model, example, scope="inner")
    )
    assert sum(layer.role == "inner" for layer in found) == inner
    assert not any("downsample" in layer.name or "shortcut" in layer.name for layer in found)
    order = [module_name for module_name, _ in model.named_modules()]
    assert [layer.name for layer in found] == sorted(
        (layer.name for layer in found), key=order.index
    )


def test_small_network_in_detail() -> None:
    layers = {layer.name: layer for layer in find_layers(Small(), small_example())}
    assert {name: layer.role for name, layer in layers.items()} == SMALL_LAYERS
    assert layers["expand"].members == ("expand", "expand_bn", "depthwise", "depthwise_bn")
    assert layers["expand"].affine == "depthwise_bn"
    assert layers["expand"].consumers == ("project",)
    assert layers["inner"].consumers == ("outer",)
    assert layers["last"].consumers == ("linear",)
    assert layers["stem"].consumers == ()


def test_resnet50_stem_is_inner_and_feeds_both_branches() -> None:
    stem = find_layers(torchvision.models.resnet50(), torch.zeros(1, 3, 64, 64))[0]
    assert (stem.name, stem.role) == ("conv1", "inner")
    assert stem.consumers == ("layer1.0.conv1", "layer1.0.downsample.0")


def test_the_analysis_changes_nothing() -> None:
    model = Small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    find_layers(model, torch.randn(1, 3, 8, 8))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_excluded_layers_are_left_alone() -> None:
    found = find_layers(Small(), small_example(), exclude=["stem", "expand", "shortcut"])
    assert [layer.name for layer in found] == ["inner", "outer", "project", "last"]


def test_unknown_excluded_layer() -> None:
    with pytest.raises(InputError, match=r"'conv99' is not a convolution of Small"):
        find_layers(Small(), small_example(), exclude=["conv99"])


class Chain(nn.Module):
    """conv - bn - `between` - conv - bn - relu - pool - linear."""

    def __init__(self, between: nn.Module, groups: int = 1, affine: bool = True) -> None:
        super().__init__()
        self.first, self.first_bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=affine)
        self.between = between
        self.second, self.second_bn = nn.Conv2d(4, 4, 3, groups=groups), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second_bn(self.second(self.between(self.first_bn(self.first(x)))))
        logits: Tensor = self.linear(F.relu(x).mean([2, 3]))
        return logits


class NormAndActivation(nn.BatchNorm2d):
    """Activation included, as in timm's BatchNormAct2d."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


def with_(name: str, module: nn.Module) -> nn.Module:
    model = Chain(nn.ReLU())
    model.set_submodule(name, module)
    return model


class SqueezeExcite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean([2, 3], keepdim=True).sigmoid()


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], 1)[:, :4]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Chain(nn.Sigmoid()), "sigmoid|between"),
        (Chain(nn.Softplus()), "between"),
        (Chain(SqueezeExcite()), "mul|sigmoid"),
        (Chain(Double()), "cat"),
        (Chain(nn.ReLU(), groups=2), "second"),
        (Chain(nn.ReLU(), affine=False), "first_bn"),
        (with_("first_bn", NormAndActivation(4)), "first_bn"),
        (with_("between", nn.Conv2d(4, 4, 3, groups=4)), "'between' is no plain BatchNorm"),
    ],
)
def test_a_layer_that_its_affine_cannot_silence_is_refused_by_name(
    model: nn.Module, says: str
) -> None:
    with pytest.raises(
        InputError, match=rf"layer 'first' cannot be pruned.*({says}).*exclude=\['first'\]"
    ):
        find_layers(model, small_example())
    if model.second.groups == 1:  # type: ignore[union-attr]
        assert [layer.name for layer in find_layers(model, small_example(), exclude=["first"])] == [
            "second"
        ]


@pytest.mark.parametrize(
    "between", [nn.ReLU(), nn.SiLU(), nn.ReLU6(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Dropout()]
)
def test_operations_that_map_0_to_0_are_fine(between: nn.Module) -> None:
    assert len(find_layers(Chain(between), small_example())) == 2


def test_network_without_prunable_layers() -> None:
    with pytest.raises(InputError, match="Sequential has no prunable layer"):
        find_layers(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), small_example())


class DataDependent(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


def test_network_that_cannot_be_traced() -> None:
    with pytest.raises(InputError, match=r"DataDependent cannot be traced by torch\.fx"):
        find_layers(DataDependent(), small_example())


def test_input_of_the_wrong_shape() -> None:
    with pytest.raises(InputError, match=r"Small cannot be traced by torch\.fx on \[1, 5, 8, 8\]"):
        find_layers(Small(), torch.zeros(1, 5, 8, 8))


class Head(nn.Module):
    """conv - bn - relu, then `head`, then one linear layer called once or twice."""

    def __init__(self, head, width: int = 4, calls: int = 1) -> None:
        super().__init__()
        self.first, self.first_bn, self.head, self.calls = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            head,
            calls,
        )
        self.linear = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(F.relu(self.first_bn(self.first(x))))
        return sum(self.linear(x) for _ in range(self.calls)) + torch.zeros(2)


@pytest.mark.parametrize(
    "head",
    [
        lambda x: x.mean([2, 3]),
        lambda x: x.mean(3).mean(2),
        lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(),
        lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1),
        lambda x: x.mean((-2, -1)),
    ],
)
def test_ways_to_a_linear_layer(head) -> None:
    (layer,) = find_layers(Head(head), small_example())
    assert (layer.role, layer.consumers) == ("inner", ("linear",))


@pytest.mark.parametrize(
    "model",
    [
        Head(lambda x: x.mean(1).flatten(1), width=36),
        Head(lambda x: x.mean([3]).mean([-2]), width=6),
        Head(lambda x: x, width=6),
        Head(lambda x: x.mean([2, 3]), calls=2),
    ],
)
def test_a_linear_layer_that_reads_something_else_than_channels(model: nn.Module) -> None:
    with pytest.raises(InputError, match="layer 'first' cannot be pruned: its channels reach"):
        find_layers(model, small_example())


def test_a_sum_does_not_hide_an_operation_that_maps_0_elsewhere() -> None:
    class SumAndSigmoid(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first_bn(self.first(x))
            return self.linear(
                (x + F.pad(self.second_bn(self.second(x.sigmoid())), (1,) * 4)).mean([2, 3])
            )

    with pytest.raises(
        InputError, match="layer 'first' cannot be pruned: its channels reach 'sigmoid'"
    ):
        find_layers(SumAndSigmoid(nn.Identity()), small_example())


@pytest.mark.parametrize("name", ["first", "between"])
def test_a_weight_that_is_computed_is_refused(name: str) -> None:
    """Of the layer itself, and of a depthwise convolution that goes with it."""
    model = with_(
        "between", nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4))
    )
    weight_norm(model.between[0] if name == "between" else model.first)
    with pytest.raises(InputError, match="layer 'first' cannot be pruned: its weight is computed"):
        find_layers(model, small_example())


def test_a_reader_that_computes_its_weight_is_refused() -> None:
    with pytest.raises(
        InputError, match="'second' cannot be pruned: its channels reach 'linear', which computes"
    ):
        find_layers(with_("linear", weight_norm(nn.Linear(4, 2))), small_example())
    model = Small()  # inner reads the whole residual stream, whatever the stem loses
    weight_norm(model.inner)
    assert "stem" in {
        layer.name for layer in find_layers(model, small_example(), exclude=["inner"])
    }


def test_a_subclass_with_the_forward_of_its_parent_is_fine() -> None:
    class Named(nn.BatchNorm2d):
        pass

    assert len(find_layers(with_("first_bn", Named(4)), small_example())) == 2


def test_a_sum_is_known_however_it_is_called() -> None:
    class Named(Small):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem_bn(self.stem(x)))
            branch = self.outer_bn(self.outer(F.relu(self.inner_bn(self.inner(x)))))
            return torch.add(input=x, other=branch)

    roles = {layer.name: layer.role for layer in find_layers(Named(), small_example())}
    assert roles == {"stem": "residual", "inner": "inner", "outer": "residual"}


def test_a_network_with_two_outputs_is_refused() -> None:
    class Pair(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x), x  # type: ignore[return-value]

    with pytest.raises(InputError, match="Pair cannot be traced"):
        find_layers(Pair(), small_example())
