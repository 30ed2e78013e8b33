"""The dataflow analysis: which filters are prunable, what goes with a filter, who reads its channels, and why not."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from psap_core.cost import macs_cost_model
from psap_core.errors import InputError
from psap_core.exported import export
from psap_core.groups import (
    ChannelGroup,
    Entries,
    GroupSearch,
    Scope,
    find_groups,
    search_groups,
)
from psap_core.inputs import describe
from psap_core.plan import make_plan
from psap_core.suspension import apply_
from tests.core.networks import (
    KINDS,
    NETWORKS,
    SCOPES,
    SMALL_FILTERS,
    DenselyConnected,
    Small,
    by_topology,
    draw_filters,
    grouped,
    randomise_,
    small_example,
)

# Groups in scope coupled.
COUPLED = {
    "cifar_resnet20_projection": 12,  # 9 inner layers and 3 streams
    "cifar_vgg16_bn": 13,
    "vgg16_bn": 15,  # 2 hidden linear layers
    "resnet18": 12,
    "resnet34": 20,
    "resnet50": 37,
    "mobilenet_v2": 25,
}
IS_RETURNED = "its channels cannot go: the model returns them"


def search(model: nn.Module, scope: Scope = "all", **options) -> GroupSearch:
    return search_groups(model, small_example(), scope=scope, **options)


def names_of(groups: tuple[ChannelGroup, ...]) -> list[str]:
    return [group.name for group in groups]


def tensors_of(entries: tuple[Entries, ...]) -> list[str]:
    return [part.tensor for part in entries]


def weights_of(entries: tuple[Entries, ...]) -> list[str]:
    """Without the numbers that count channels."""
    return [name for name in tensors_of(entries) if name.endswith("weight")]


def check_exports(model: nn.Module, scope: Scope) -> None:
    """30 % of every group goes; `export` compares with the masked network in float64 itself."""
    randomise_(model)
    groups = find_groups(model, small_example(), scope=scope)
    cost = macs_cost_model(model, groups, small_example())
    plan = make_plan(groups, draw_filters(groups), cost, describe(small_example()), scope)
    apply_(model, groups, plan)
    export(model, plan)


# ---------------------------------------------------------------------------- real networks


@pytest.mark.parametrize("name", by_topology())
def test_every_network_has_its_prunable_layers(name: str) -> None:
    make, side, layers, inner = NETWORKS[name]
    model, example = make(), torch.zeros(1, 3, side, side)
    found = find_groups(model, example, scope="all")
    assert len(found) == layers
    plain = [group for group in found if group.scattered is None]
    assert len(plain) == inner
    assert names_of(tuple(plain)) == names_of(find_groups(model, example, scope="inner"))
    assert not any("downsample" in group.name or "shortcut" in group.name for group in found)
    order = [module_name for module_name, _ in model.named_modules()]
    assert names_of(found) == sorted(names_of(found), key=order.index)
    for group in found:
        assert tensors_of(group.writers) == [f"{group.name}.weight"]


@pytest.mark.parametrize("name", by_topology(COUPLED))
def test_coupled_groups_hold_whole_streams(name: str) -> None:
    make, side, *_ = NETWORKS[name]
    model, example = make(), torch.zeros(1, 3, side, side)
    found = search_groups(model, example, scope="coupled")
    assert len(found.groups) == COUPLED[name]
    assert all(group.scattered is None for group in found.groups)
    assert [*found.left_alone.values()] == [IS_RETURNED]
    writers = [writer for group in found.groups for writer in tensors_of(group.writers)]
    assert len(writers) == len({*writers})
    dense = [
        f"{module_name}.weight"
        for module_name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and getattr(module, "groups", 1) == 1
    ]
    assert {*writers} == {*dense} - {f"{layer}.weight" for layer in found.left_alone}


def test_resnet50_stem_is_inner_and_feeds_both_branches() -> None:
    model = torchvision.models.resnet50()
    for scope in ("coupled", "all"):
        groups = find_groups(model, torch.zeros(1, 3, 32, 32), scope=scope)
        assert (groups[0].name, groups[0].scattered) == ("conv1", None)
        readers = tensors_of(groups[0].readers)
        assert readers == ["layer1.0.conv1.weight", "layer1.0.downsample.0.weight"]


# ---------------------------------------------------------------------------- Small in detail


@pytest.mark.parametrize("scope", SCOPES)
def test_small_network_in_detail(scope: Scope) -> None:
    groups = {group.name: group for group in find_groups(Small(), small_example(), scope=scope)}
    assert {name: group.filters for name, group in groups.items()} == SMALL_FILTERS[scope]
    expand = groups["expand"]
    assert expand.modules == ("expand", "expand_bn", "depthwise", "depthwise_bn")
    assert tensors_of(expand.silencers) == ["depthwise_bn.weight", "depthwise_bn.bias"]
    assert weights_of(expand.readers) == ["project.weight"]
    assert tensors_of(groups["inner"].members) == [
        "inner.weight",
        "inner.bias",
        "inner_bn.running_mean",
        "inner_bn.running_var",
        "inner_bn.weight",
        "inner_bn.bias",
    ]
    assert tensors_of(groups["inner"].readers) == ["outer.weight"]
    (linear,) = groups["last"].readers
    assert (linear.tensor, linear.dim) == ("linear.weight", 1)
    assert linear.index.tolist() == [[4 * f, 4 * f + 1, 4 * f + 2, 4 * f + 3] for f in range(5)]
    scattered = {name: group.scattered for name, group in groups.items() if group.scattered}
    if scope == "all":
        assert scattered == {"stem": "stem_bn", "outer": "outer_bn", "project": "project_bn"}
        assert groups["stem"].readers == ()
    else:
        assert not scattered
    if scope == "coupled":
        assert tensors_of(groups["stem"].writers) == ["stem.weight", "outer.weight"]
        readers = ["inner.weight", "expand.weight", "shortcut.weight"]
        assert tensors_of(groups["stem"].readers) == readers
        assert groups["project"].modules == ("project", "project_bn", "shortcut", "shortcut_bn")


@pytest.mark.parametrize(
    ("scope", "alone"),
    [
        ("coupled", {"linear": IS_RETURNED}),
        ("all", {"linear": IS_RETURNED, "shortcut": "it is a projection shortcut"}),
        (
            "inner",
            {
                "linear": IS_RETURNED,
                "shortcut": "it is a projection shortcut",
                "stem": "its channels cannot go: they reach a sum (add)",
                "outer": "its channels cannot go: they reach a sum (add)",
                "project": "its channels cannot go: they reach a sum (add)",
            },
        ),
    ],
)
def test_what_of_the_small_network_is_left_alone(scope: Scope, alone: dict[str, str]) -> None:
    assert search(Small(), scope).left_alone == alone


@pytest.mark.parametrize("scope", SCOPES)
def test_the_analysis_changes_nothing(scope: Scope) -> None:
    model = Small().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    find_groups(model, torch.randn(1, 3, 8, 8, generator=torch.Generator()), scope=scope)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(generator, torch.get_rng_state())


def test_a_grouped_convolution_makes_a_filter_of_each_group() -> None:
    (group,) = find_groups(grouped(), small_example())
    of_tensor = {entries.tensor: entries.index.tolist() for entries in group.members}
    assert of_tensor["conv.weight"] == [[2 * f, 2 * f + 1] for f in range(5)]
    assert of_tensor["norm.bias"] == of_tensor["conv.weight"]
    assert of_tensor["grouped.weight"] == [[3 * f, 3 * f + 1, 3 * f + 2] for f in range(5)]
    assert of_tensor["grouped_norm.weight"] == of_tensor["grouped.weight"]


def test_a_concatenation_lays_channels_side_by_side() -> None:
    stem, conv1, conv2 = find_groups(DenselyConnected(), small_example())
    columns = {
        group.name: {part.tensor: part.index.flatten().tolist() for part in group.readers}
        for group in (stem, conv1, conv2)
    }
    assert columns["stem"]["conv2.weight"] == [*range(6)]
    assert columns["conv1"]["conv2.weight"] == [*range(6, 10)]
    assert columns["conv2"]["head.linear.weight"] == [*range(10, 14)]


@pytest.mark.parametrize("network", [name for name, kind in KINDS.items() if len(kind.scopes) == 1])
def test_without_a_sum_all_scopes_have_the_same_groups(network: str) -> None:
    """Scopes `all` and `inner` leave linear layers alone."""
    model = KINDS[network].make()
    coupled, others, inner = (search(model, scope) for scope in SCOPES)
    expected = coupled.groups if network != "hidden_linear" else ()
    for found in (others, inner):
        assert names_of(found.groups) == names_of(expected)
        for group, same in zip(found.groups, expected, strict=True):
            assert group.scattered is None
            for part in ("writers", "members", "silencers", "readers"):
                entries, expected_entries = getattr(group, part), getattr(same, part)
                assert tensors_of(entries) == tensors_of(expected_entries)
                for ours, theirs in zip(entries, expected_entries, strict=True):
                    assert torch.equal(ours.index, theirs.index)
    if network == "hidden_linear":
        assert inner.left_alone["hidden"] == "scope inner prunes filters of convolutions only"


# ---------------------------------------------------------------------------- exclusions


def test_excluded_layers_are_left_alone() -> None:
    excluded = ["stem", "expand", "shortcut"]
    found = search(Small(), exclude=excluded)
    assert names_of(found.groups) == ["inner", "outer", "project", "last"]
    assert found.left_alone["stem"] == "excluded (stem)"
    assert found.left_alone["expand"] == found.left_alone["depthwise"] == "excluded (expand)"
    found = search(Small(), "coupled", exclude=excluded)  # what goes together stays together
    assert names_of(found.groups) == ["inner", "last"]
    assert found.left_alone["outer"] == "excluded (stem)"
    assert found.left_alone["project"] == "excluded (shortcut)"


def test_unknown_excluded_layer() -> None:
    with pytest.raises(InputError, match=r"excluded 'conv99' is no module of Small"):
        search(Small(), exclude=["conv99"])


def test_an_unknown_scope() -> None:
    with pytest.raises(InputError, match="scope must be coupled, all or inner, not 'outer'"):
        search(Small(), "outer")  # type: ignore[arg-type]


@pytest.mark.parametrize("scope", SCOPES)
def test_what_is_not_trained_is_left_alone(scope: Scope) -> None:
    model = Small()
    model.inner_bn.bias.requires_grad_(False)
    says = "inner_bn.bias is frozen, or the optimizer does not train it"
    found = search(model, scope)
    assert "inner" not in names_of(found.groups)
    assert found.left_alone["inner"] == says
    everything = [name for name, _ in model.named_parameters()]
    assert "inner" in names_of(search(model, scope, trained=everything).groups)
    found = search(Small(), scope, trained=[name for name in everything if name != "inner_bn.bias"])
    assert found.left_alone["inner"] == says


# ---------------------------------------------------------------------------- what lies between two layers


class Chain(nn.Module):
    """conv - bn - `between` - conv - bn - relu - pool - linear."""

    def __init__(self, between, groups: int = 1, affine: bool = True) -> None:
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


NOT_SILENT = "nothing silences its channels where conv2d in second reads them"
TAKEN = "its channels cannot go: a part of them is taken by number in getitem"


@pytest.mark.parametrize("scope", ["coupled", "all"])
@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Chain(nn.Sigmoid()), NOT_SILENT),
        (Chain(nn.Softplus()), NOT_SILENT),
        (Chain(torch.cos), NOT_SILENT),
        (Chain(lambda x: x + 1), NOT_SILENT),
        (Chain(lambda x: x.clamp(min=0.1)), NOT_SILENT),
        (Chain(lambda x: F.pad(x, (1, 1), value=1.0)), NOT_SILENT),
        (Chain(nn.ReLU(), affine=False), NOT_SILENT),
        (with_("first_bn", NormAndActivation(4)), NOT_SILENT),
        (Chain(lambda x: x.sort(1).values), "its channels cannot go: they reach sort"),
        (Chain(lambda x: x.softmax(1)), "its channels cannot go: they reach softmax"),
        (Chain(lambda x: torch.cat([x, x], 1)[:, :4]), TAKEN),
        (Chain(lambda x: x[:, [3, 2, 1, 0]]), TAKEN),
        (Chain(lambda x: x * x.mean(1, keepdim=True)), "its channels cannot go: they reach mean"),
        (Chain(nn.LayerNorm([4, 6, 6])), "its channels cannot go: they reach layer_norm"),
        (
            Chain(lambda x: (x.flatten(2).mT @ torch.ones(4, 4)).mT.unflatten(2, (6, 6))),
            "its channels cannot go: they reach matmul",
        ),
    ],
)
def test_a_layer_that_cannot_be_silenced_or_cut_is_left_alone(
    model: nn.Module, says: str, scope: Scope
) -> None:
    """Where only what comes behind its BatchNorm is to blame, scope `all` scatters what is left of it."""
    found = search(model, scope)
    scattered = {group.name: group.scattered for group in found.groups}
    if scope == "all" and "cannot go" in says:
        assert scattered == {"first": "first_bn", "second": None}
    else:
        assert scattered == {"second": None}
        assert found.left_alone["first"].startswith(says)
    check_exports(model, scope)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("between", "says"),
    [
        (lambda x: torch.cat(x.split([1, 3], 1), 1), "they are split by sizes in split"),
        (lambda x: x.flatten(2).view(-1, 4, 6, 6), "their number is written in the code of view"),
    ],
)
def test_a_size_written_in_the_code_keeps_all_channels(between, says: str, scope: Scope) -> None:
    model = Chain(between)
    found = search(model, scope)
    if scope == "all":
        assert [group.scattered for group in found.groups] == ["first_bn", None]
    else:
        assert names_of(found.groups) == ["second"]
        assert found.left_alone["first"] == f"its channels cannot go: {says}"
    check_exports(model, scope)


class SqueezeExcite(nn.Module):
    """A gate without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean([2, 3], keepdim=True).sigmoid()


@pytest.mark.parametrize(
    "between",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        nn.SiLU(),
        nn.ReLU6(),
        nn.GELU(),
        nn.Hardswish(),
        nn.Tanh(),
        nn.PReLU(),
        nn.PReLU(4),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.AdaptiveMaxPool2d(3),
        nn.Dropout(),
        nn.Dropout2d(),
        nn.ZeroPad2d(1),
        nn.ReflectionPad2d(1),
        nn.Upsample(scale_factor=2),
        nn.InstanceNorm2d(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(4, 4),
        nn.LayerNorm([6, 6], elementwise_affine=False),
        nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4, bias=False),
        SqueezeExcite(),
        lambda x: x * 0.5,
        lambda x: -x / 2,
        lambda x: x + 0,
        lambda x: x.clamp(0, 6),
        lambda x: x.abs().sqrt(),
        lambda x: x * x.sigmoid(),
        lambda x: x**2,
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x.masked_fill(x < 0, 0.0),
        lambda x: x * x.amax((2, 3), keepdim=True),
        lambda x: x.flatten(2).view(x.size(0), -1, 6, 6),
        lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
        lambda x: x[:, :, ::2, 1:],
        lambda x: x[..., None].squeeze(-1),
        lambda x: torch.cat([x, x], 3),
        lambda x: torch.cat([x[:, :, :3], x[:, :, 3:]], 2),
        lambda x: x.to(x.dtype).clone(),
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        lambda x: F.softmax(x.flatten(2), 2).view_as(x) * x,
        lambda x: F.normalize(x, dim=3),
    ],
)
def test_operations_that_map_0_to_0_channel_by_channel_are_fine(between) -> None:
    model = Chain(between)
    for scope in ("coupled", "all"):
        found = search(model, scope)
        assert names_of(found.groups) == ["first", "second"]
        assert all(group.scattered is None for group in found.groups)
        assert found.left_alone == {"linear": IS_RETURNED}
    check_exports(model, "coupled")


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("model", "filters", "silencers"),
    [
        # Both channels of a group go together.
        (Chain(nn.ReLU(), groups=2), {"first": 2}, ["second_bn.weight", "second_bn.bias"]),
        (
            Chain(nn.GroupNorm(2, 4)),
            {"first": 2, "second": 4},
            ["between.weight", "between.bias"],
        ),
        # Its bias would keep a channel alive behind a silent BatchNorm.
        (
            with_("between", nn.Conv2d(4, 4, 3, groups=4)),
            {"first": 4, "second": 4},
            ["between.weight", "between.bias"],
        ),
        # The places of both halves go together.
        (
            Chain(lambda x: torch.cat([a * b for a, b in [x.chunk(2, 1)]] * 2, 1)),
            {"first": 2, "second": 4},
            ["first_bn.weight", "first_bn.bias"],
        ),
        (
            Chain(lambda x: x.view(len(x), 2, -1, 6, 6).transpose(1, 2).flatten(1, 2)),
            {"first": 2, "second": 4},
            ["first_bn.weight", "first_bn.bias"],
        ),
        (Chain(nn.ChannelShuffle(2)), {"first": 2, "second": 4}, ["first_bn.weight", "first_bn.bias"]),
    ],
)  # fmt: skip
def test_channels_that_go_together(
    model: nn.Module, filters: dict[str, int], silencers: list[str], scope: Scope
) -> None:
    found = search(model, scope)
    assert {group.name: group.filters for group in found.groups} == filters
    assert tensors_of(found.groups[0].silencers) == silencers
    check_exports(model, scope)


# ---------------------------------------------------------------------------- readers


class Head(nn.Module):
    """conv - bn - relu, then `head`, then one linear layer called once or twice."""

    def __init__(self, head, width: int = 4, calls: int = 1) -> None:
        super().__init__()
        self.first, self.first_bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.head, self.calls = head, calls
        self.linear = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(F.relu(self.first_bn(self.first(x))))
        return sum(self.linear(x) for _ in range(self.calls)) + torch.zeros(2)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("head", "width"),
    [
        (lambda x: x.mean([2, 3]), 4),
        (lambda x: x.mean(3).mean(2), 4),
        (lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(), 4),
        (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), 4),
        (lambda x: x.mean((-2, -1)), 4),
        (lambda x: x.flatten(1), 4 * 36),
        (lambda x: x.permute(0, 2, 3, 1).flatten(1), 4 * 36),
        (lambda x: x.reshape(len(x), -1), 4 * 36),
        (lambda x: x.permute(0, 2, 3, 1), 4),
    ],
)
@pytest.mark.parametrize("calls", [1, 2])
def test_ways_to_a_linear_layer(head, width: int, calls: int, scope: Scope) -> None:
    model = Head(head, width, calls)
    (group,) = search(model, scope).groups
    assert (group.name, group.scattered) == ("first", None)
    (reader,) = group.readers
    assert reader.tensor == "linear.weight"
    assert reader.index.shape == (4, width // 4)
    check_exports(model, scope)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(
    ("model", "says"),
    [
        (Head(lambda x: x.mean(1).flatten(1), width=36), "they reach mean"),
        (Head(lambda x: x.mean([3]).mean([-2]), width=6), "they reach mean"),
        (Head(lambda x: x, width=6), "they reach linear in linear, over positions"),
    ],
)
def test_a_linear_layer_that_reads_something_else_than_channels(
    model: nn.Module, says: str, scope: Scope
) -> None:
    found = search(model, scope)
    if scope == "all":
        assert [group.scattered for group in found.groups] == ["first_bn"]
    else:
        assert not found.groups
        assert found.left_alone["first"] == f"its channels cannot go: {says}"
    check_exports(model, scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_sum_does_not_hide_an_operation_that_maps_0_elsewhere(scope: Scope) -> None:
    class SumAndSigmoid(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first_bn(self.first(x))
            return self.linear(
                (x + F.pad(self.second_bn(self.second(x.sigmoid())), (1,) * 4)).mean([2, 3])
            )

    found = search(SumAndSigmoid(nn.Identity()), scope)
    assert "first" not in names_of(found.groups)
    assert found.left_alone["first"] in (
        NOT_SILENT,
        "its channels cannot go: they reach a sum (add)",
    )


# ---------------------------------------------------------------------------- computed weights


@pytest.mark.parametrize("scope", SCOPES)
def test_a_layer_whose_weight_is_computed_is_left_alone(scope: Scope) -> None:
    model = Chain(nn.ReLU())
    weight_norm(model.first)
    found = search(model, scope)
    assert names_of(found.groups) == ["second"]
    assert "computed" in found.left_alone["first"]
    check_exports(model, scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_depthwise_convolution_that_computes_its_weight_fixes_its_channels(scope: Scope) -> None:
    model = with_(
        "between", nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4))
    )
    weight_norm(model.between[0])
    found = search(model, scope)
    if scope == "all":
        assert [group.scattered for group in found.groups] == ["first_bn", None]
    else:
        assert names_of(found.groups) == ["second"]
        assert found.left_alone["first"] == (
            "its channels cannot go: they reach conv2d in between.0, whose weight is computed"
        )
    check_exports(model, scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_reader_that_computes_its_weight_fixes_what_it_reads(scope: Scope) -> None:
    model = with_("linear", weight_norm(nn.Linear(4, 2)))
    found = search(model, scope)
    if scope == "all":
        assert [group.scattered for group in found.groups] == [None, "second_bn"]
    else:
        assert names_of(found.groups) == ["first"]
        assert found.left_alone["second"] == (
            "its channels cannot go: they reach linear in linear, whose weight is computed"
        )
    check_exports(model, scope)


class Standardised(nn.Conv2d):
    """A convolution that standardises its own weight, as BiT's and NFNet's do."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, padding=1)


def test_a_layer_whose_weight_is_computed_is_left_alone_with_that_reason() -> None:
    model = with_("between", Standardised(4, 4, 3))
    assert search(model, "coupled").left_alone["between"] == "its weight is computed"
    check_exports(model, "coupled")


def test_in_scope_all_a_reader_of_the_stream_fixes_nothing() -> None:
    model = Small()  # inner reads the whole residual stream, whatever the stem loses
    weight_norm(model.inner)
    assert "stem" in names_of(search(model).groups)
    assert "stem" not in names_of(search(model, "coupled").groups)


# ---------------------------------------------------------------------------- any network that runs


def test_network_without_prunable_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    for scope in SCOPES:
        assert search(model, scope) == GroupSearch((), {"0": IS_RETURNED})


class DataDependent(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Pair(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x), {"input": x}  # type: ignore[return-value]


class NamedSum(Small):
    """The sum, called by name."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_bn(self.stem(x)))
        branch = self.outer_bn(self.outer(F.relu(self.inner_bn(self.inner(x)))))
        x = torch.add(input=x, other=branch).relu_()
        branch = F.relu6(self.depthwise_bn(self.depthwise(F.relu6(self.expand_bn(self.expand(x))))))
        total = self.project_bn(self.project(branch))
        total += self.shortcut_bn(self.shortcut(x))
        x = F.max_pool2d(F.relu(self.last_bn(self.last(total))), 2)
        return self.linear(x.reshape(x.size(0), -1))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("make", [DataDependent, Pair, NamedSum])
def test_however_it_is_written_the_groups_are_the_same(make, scope: Scope) -> None:
    found = search(make(), scope)
    assert {group.name: group.filters for group in found.groups} == SMALL_FILTERS[scope]
    assert found.left_alone == search(Small(), scope).left_alone
    check_exports(make(), scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_subclass_with_the_forward_of_its_parent_is_fine(scope: Scope) -> None:
    class Named(nn.BatchNorm2d):
        pass

    model = Small()
    model.stem_bn = Named(6)
    assert {g.name: g.filters for g in search(model, scope).groups} == SMALL_FILTERS[scope]


def test_a_norm_of_the_users_own_is_not_scattered() -> None:
    model = Small()
    model.stem_bn = NormAndActivation(6)
    assert "stem" not in names_of(search(model).groups)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_module_that_is_called_twice_joins_its_channels(scope: Scope) -> None:
    class Twice(Chain):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first_bn(self.first(x)))
            x = F.relu(self.second_bn(self.second(x)))
            x = F.relu(self.second_bn(self.second(x)))
            return self.linear(x.mean([2, 3]))

    (group,) = search(Twice(None), scope).groups
    assert tensors_of(group.writers) == ["first.weight", "second.weight"]
    assert tensors_of(group.readers) == ["second.weight", "linear.weight"]
    check_exports(Twice(None), scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_shared_parameters_are_joined(scope: Scope) -> None:
    model = Chain(nn.ReLU())
    model.second_bn.weight = model.first_bn.weight
    (group,) = search(model, scope).groups
    assert (group.name, group.filters) == ("first", 4)
    assert weights_of(group.writers) == ["first.weight", "second.weight"]
    silencers = ["first_bn.weight", "first_bn.bias", "second_bn.bias"]
    assert tensors_of(group.silencers) == silencers
    check_exports(model, scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_what_shares_parameters_with_a_fixed_layer_is_fixed(scope: Scope) -> None:
    model = Small()
    model.project_bn.weight = model.shortcut_bn.weight
    found = search(model, scope)
    assert ("project" in names_of(found.groups)) == (scope == "coupled")
    check_exports(model, scope)


def test_input_of_the_wrong_shape() -> None:
    with pytest.raises(
        InputError, match=r"Small does not run on example_input \(\[1, 5, 8, 8\]\): .*channels"
    ):
        find_groups(Small(), torch.zeros(1, 5, 8, 8))
