"""MACs and parameters: published totals, and the cost model against really exported networks."""

import random

import pytest
import torch
import torchvision
from torch import nn

from psap_core import (
    apply_,
    export,
    find_layers,
    layer_table,
    macs,
    macs_cost_model,
    make_plan,
    params,
)
from tests.core.networks import NETWORKS, Small, by_topology, cifar_resnet, small_example

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


@pytest.mark.parametrize("scope", ["all", "inner"])
@pytest.mark.parametrize("make", [Small, lambda: cifar_resnet("resnet20")])
def test_the_cost_model_is_the_exported_networks_cost(make, scope) -> None:
    model, example = make(), small_example()
    layers = find_layers(model, example, scope=scope)
    cost = macs_cost_model(model, layers, example)
    assert cost.dense == macs(model, example)
    draw = random.Random(0)
    for _ in range(5):
        pruned = {x.name: draw.sample(range(x.filters), draw.randrange(x.filters)) for x in layers}
        plan = make_plan(layers, pruned, cost, (3, 8, 8))
        masked = make()
        apply_(masked, layers, plan)
        assert macs(export(masked, plan), example) == plan.macs


def test_marginal_cost_is_the_difference() -> None:
    model = Small()
    cost = macs_cost_model(model, find_layers(model, small_example()), small_example())
    kept = [3, 4, 2, 5, 3, 1]
    for l, marginal in enumerate(cost.marginal(kept, l) for l in range(len(kept))):
        more = [k + (i == l) for i, k in enumerate(kept)]
        assert cost.cost(more) - cost.cost(kept) == marginal
