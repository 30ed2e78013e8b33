"""What can be pruned, what is left alone and why, in a user's words."""

import pytest
import torch
import torchvision
from torch import Tensor, nn

from psap_core import PSAP, InputError, report
from tests.core.networks import Small, sgd, small_example


class Mixed(nn.Module):
    """A stream that LayerNorm needs whole, a block beside it, attention whose queries and keys shrink alike."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.queries, self.keys = nn.Linear(8, 6), nn.Linear(8, 6)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        weights = (self.queries(y) @ self.keys(y).transpose(1, 2)).softmax(-1)
        x = weights @ x + self.down(self.up(y).relu())
        return self.head(x.mean(1))


def test_reasons_name_the_operation_and_its_module() -> None:
    found = report(Mixed(), torch.randn(2, 3, 4, 4), scope="coupled")
    assert [group.name for group in found.groups] == ["queries", "up"]
    reasons = {layer.name: layer.reason for layer in found.left_alone}
    assert reasons == {
        "stem": "its channels cannot go: they reach layer_norm in norm, over channels",
        "down": "its channels cannot go: they reach layer_norm in norm, over channels",
        "head": "its channels cannot go: the model returns them",
    }


def test_a_report_prints_as_a_table() -> None:
    found = report(Small(), small_example(), scope="all")
    text = str(found)
    assert text.startswith("Small: up to 78.8% of the MACs can be cut\n")
    assert "expand   10       8.2%   expand, expand_bn, depthwise, depthwise_bn" in text
    assert "shortcut    0.9%  it is a projection shortcut" in text
    assert found.largest_macs_cut == pytest.approx(0.788, abs=1e-3)


def test_shares_are_what_would_go_with_a_group() -> None:
    found = report(Small(), small_example(), scope="inner")
    by_name = {group.name: group.macs_share for group in found.groups}
    assert by_name["inner"] == pytest.approx(0.71, abs=0.005)
    assert sum(layer.macs_share for layer in found.left_alone) < 1


def test_exclude_takes_modules_and_what_lies_inside() -> None:
    model, example = torchvision.models.resnet18(num_classes=2), torch.zeros(1, 3, 32, 32)
    for excluded in ("layer4", "layer4."):
        found = report(model, example, exclude=[excluded])
        assert not [group for group in found.groups if group.name.startswith("layer4")]
        reasons = {layer.name: layer.reason for layer in found.left_alone}
        assert reasons["layer4.0.conv1"] == f"excluded ({excluded})"
    assert "layer1.0.conv1" in [
        g.name for g in report(model, example, exclude=["layer1.0.conv2"]).groups
    ]
    with pytest.raises(InputError, match="excluded 'layer' is no module of ResNet"):
        report(model, example, exclude=["layer"])


def test_an_unreachable_target_names_the_largest_cut_and_what_costs_most() -> None:
    model = Mixed()
    says = (
        r"a cut of 0\.9000 is unreachable: at most 0\.\d+ can go; "
        r"\d+\.\d% of the MACs are left alone: its channels cannot go: they reach (layer_norm|matmul)"
    )
    with pytest.raises(InputError, match=says):
        PSAP(
            model,
            sgd(model),
            torch.randn(2, 3, 4, 4),
            target_macs_cut=0.9,
            total_epochs=4,
            scope="coupled",
        )


def test_nothing_to_prune() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with pytest.raises(
        InputError,
        match=r"Sequential has nothing to prune: 100\.0% .* left alone: .* returns them$",
    ):
        PSAP(model, sgd(model), torch.randn(2, 3, 2, 2), target_macs_cut=0.1, total_epochs=4)


def test_minimum_filters_are_a_reason_of_their_own() -> None:
    model = Small()
    optimizer = sgd(model)
    says = "at most 0\\.0000 can go; .*min_filters and min_filter_share keep the rest$"
    with pytest.raises(InputError, match=says):
        PSAP(
            model,
            optimizer,
            small_example(),
            target_macs_cut=0.5,
            total_epochs=4,
            min_filter_share=1.0,
        )
