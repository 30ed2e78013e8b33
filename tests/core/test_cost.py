"""MACs and parameters: published totals, and the cost model against really exported networks."""

import random

import pytest
import torch
import torchvision
from torch import nn

from psap_core.cost import CostModel, filters_cost_model, layer_table, macs, macs_cost_model, params
from psap_core.exported import export
from psap_core.groups import ChannelGroup, Scope, find_groups
from psap_core.inputs import describe
from psap_core.plan import PrunePlan, make_plan
from psap_core.suspension import apply_
from tests.core.networks import (
    NETWORKS,
    SCOPES,
    SMALL_NETWORKS,
    SMALL_NETWORKS_AND_SCOPES,
    DenselyConnected,
    Small,
    Stream,
    by_topology,
    cifar_resnet,
    grouped,
    small_example,
)

DENSE_MMACS = {
    "cifar_resnet20": 40.55,
    "cifar_resnet32": 68.86,
    "cifar_resnet56": 125.49,
    "cifar_resnet110": 252.89,
}


@pytest.mark.parametrize("name", by_topology(list(DENSE_MMACS)))
def test_macs_of_the_cifar_networks(name: str) -> None:
    model = NETWORKS[name][0]()
    convolutions = sum(
        row.macs for row in layer_table(model, torch.zeros(1, 3, 32, 32)) if row.kind == "Conv2d"
    )
    assert convolutions == pytest.approx(DENSE_MMACS[name] * 1e6, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "gmacs"), [("resnet18", 1.814), ("resnet34", 3.664), ("resnet50", 4.089)]
)
def test_macs_of_the_imagenet_networks(name: str, gmacs: float) -> None:
    model = getattr(torchvision.models, name)()
    assert macs(model, torch.zeros(1, 3, 224, 224)) == pytest.approx(gmacs * 1e9, rel=1e-3)


def test_by_hand() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 25, 7)
    )
    example = torch.zeros(1, 3, 5, 5)
    assert macs(model, example) == 25 * 4 * 3 * 9 + 100 * 7
    assert params(model) == 4 * 3 * 9 + 4 + 700 + 7
    assert [(row.name, row.kind, row.macs) for row in layer_table(model, example)] == [
        ("0", "Conv2d", 25 * 4 * 3 * 9),
        ("3", "Linear", 700),
    ]
    with torch.inference_mode():
        assert macs(model, example) == 25 * 4 * 3 * 9 + 100 * 7


def test_a_transposed_convolution_counts() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 5, 2, 2))
    assert macs(model, torch.zeros(1, 3, 6, 6)) == 36 * 3 * 4 + 36 * 4 * 5 * 4


def test_a_module_with_two_names_counts_once() -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stage = nn.Sequential(nn.Conv2d(3, 4, 3))
            self.also = self.stage[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.also(x)  # called through its second name

    assert macs(Alias(), small_example()) == 36 * 4 * 27


def test_the_cost_is_that_of_one_input() -> None:
    assert macs(Small(), torch.zeros(3, 3, 8, 8)) == macs(Small(), small_example())


def test_counting_leaves_training_mode_and_statistics_alone() -> None:
    model = Small().train()
    macs(model, torch.randn(4, 3, 8, 8))
    assert model.stem_bn.training
    assert model.stem_bn.num_batches_tracked == 0


def random_plans(
    groups: tuple[ChannelGroup, ...], cost: CostModel, scope: Scope, count: int
) -> list[PrunePlan]:
    draw = random.Random(0)
    plans = []
    for _ in range(count):
        pruned = {x.name: draw.sample(range(x.filters), draw.randrange(x.filters)) for x in groups}
        plans.append(make_plan(groups, pruned, cost, describe(small_example()), scope))
    return plans


def check_cost_of_exports(make, scope: Scope, plans: int) -> None:
    model, example = make(), small_example()
    groups = find_groups(model, example, scope=scope)
    cost = macs_cost_model(model, groups, example)
    assert cost.dense == macs(model, example)
    for plan in random_plans(groups, cost, scope, plans):
        masked = make()
        apply_(masked, groups, plan)
        assert macs(export(masked, plan), example) == plan.macs


@pytest.mark.parametrize(("network", "scope"), SMALL_NETWORKS_AND_SCOPES)
def test_the_cost_model_is_the_exported_networks_cost(network: str, scope: Scope) -> None:
    check_cost_of_exports(SMALL_NETWORKS[network], scope, plans=4)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_cost_model_of_a_residual_network(scope: Scope) -> None:
    check_cost_of_exports(lambda: cifar_resnet("resnet20"), scope, plans=2)


@pytest.mark.parametrize(("network", "scope"), SMALL_NETWORKS_AND_SCOPES)
def test_marginal_cost_is_the_difference(network: str, scope: Scope) -> None:
    model = SMALL_NETWORKS[network]()
    groups = find_groups(model, small_example(), scope=scope)
    draw = random.Random(1)
    for cost in (macs_cost_model(model, groups, small_example()), filters_cost_model(groups)):
        kept = [draw.randint(1, group.filters) for group in groups]
        for l in range(len(groups)):
            for more in (1, 3):
                then = [k + more * (i == l) for i, k in enumerate(kept)]
                assert cost.marginal(kept, l, more) == cost.cost(then) - cost.cost(kept)


def cost_of(model: nn.Module, scope: Scope = "coupled") -> tuple[list[str], CostModel]:
    groups = find_groups(model, small_example(), scope=scope)
    return [group.name for group in groups], macs_cost_model(model, groups, small_example())


def test_a_stream_that_layers_read_and_write_by_hand() -> None:
    names, cost = cost_of(Stream())
    assert names == ["stem.conv", "inner.conv"]
    s, i = 4, 5
    convolutions = 9 * 3 * s + 9 * s * s + 9 * s * i + 9 * i * s + s * s
    assert cost.cost([s, i]) == 64 * convolutions + 3 * s
    assert cost.fixed == 0


def test_a_concatenation_by_hand() -> None:
    names, cost = cost_of(DenselyConnected())
    assert names == ["stem", "conv1", "conv2"]
    s, a, b = 5, 3, 2
    convolutions = 9 * 3 * s + 9 * s * a + 9 * (s + a) * b
    assert cost.cost([s, a, b]) == 64 * convolutions + 3 * (s + a + b)


def test_a_grouped_convolution_by_hand() -> None:
    """A filter is a group: two rows of the first convolution, three of the second, which read two columns."""
    names, cost = cost_of(grouped())
    assert names == ["conv"]
    assert cost.cost([3]) == 64 * (9 * 3 * (2 * 3) + 9 * 2 * 3 * 3) + 3 * (3 * 3)


def test_a_flattened_linear_layer_and_a_scattered_filter_by_hand() -> None:
    names, cost = cost_of(Small(), "all")
    assert names == ["stem", "inner", "outer", "expand", "project", "last"]
    kept = stem, inner, outer, expand, project, last = 4, 5, 3, 6, 2, 3
    large = 27 * stem + 9 * 6 * inner + 9 * inner * outer + 6 * expand
    small = 9 * expand + expand * project + 6 * 7 + 9 * 7 * last
    assert cost.cost(kept) == 64 * large + 16 * small + 3 * 4 * last
