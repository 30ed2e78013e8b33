"""Networks of torchvision and timm: what is exported computes what the masked network does, saved and loaded too."""

import pytest

from experiments.benchmarks import zoo
from experiments.benchmarks.zoo import (
    NetworkResult,
    difference,
    examine,
    network_names,
    page,
    read,
    side_of,
    summary,
)

# Quick ones: concatenation, shuffle, squeeze-and-excite, layer scale, splits, a focus of pixels, a class that asks for
# its version.
SOME = [
    "torchvision:mobilenet_v3_small",
    "timm:convnext_atto",
]
# Networks of which more is left alone: normalised over channels, weights that are computed, constants that are learned.
BELOW = {
    "torchvision": set(),
    "timm": {
        "convnextv2_atto",
        "csatv2",
        "test_efficientnet_ln",
        "hgnetv2_b0",
        "coat_lite_tiny",
        "davit_tiny",
        "edgenext_xx_small",
        "maxvit_pico_rw_256",
        "maxxvitv2_nano_rw_256",
        "coatnext_nano_rw_224",
        "convformer_s18",
        "caformer_s18",
        "poolformerv2_s12",
        "mobilenetv5_base",
        "nf_resnet26",
        "nf_regnet_b0",
        "eca_nfnet_l0",
        "dm_nfnet_f0",
        "resnetv2_50x1_bit",
    },
}


def check(name: str) -> None:
    package, _, network = name.partition(":")
    row = examine(package, network)
    assert row.is_exact, row
    if network in BELOW[package]:
        assert row.reach < zoo.REACH  # or it is to be struck from the list
        assert row.left
    else:
        assert row.reach >= zoo.REACH
        assert row.changed is not None
        assert row.changed > 1e-3  # the comparison is not blind


@pytest.mark.parametrize("name", SOME)
def test_a_network_is_pruned_exactly(name: str) -> None:
    check(name)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in network_names() if name not in SOME])
def test_every_other_network_is_pruned_exactly(name: str) -> None:
    check(name)


# ---------------------------------------------------------------------------- the benchmark


def test_a_network_is_tried_once_and_its_rival_after_it(tmp_path, monkeypatch) -> None:
    tried = []

    def tried_network(package: str, name: str) -> NetworkResult:
        tried.append(name)
        return NetworkResult(
            package, name, 64, groups=3, reach=0.9, error=1e-15, loaded_error=2e-15
        )

    monkeypatch.setattr(zoo, "examine", tried_network)
    monkeypatch.setattr(zoo, "rival_apart", lambda package, name: "exact")
    out = tmp_path / "zoo.jsonl"
    chosen = ["torchvision:resnet18", "timm:dla34"]
    for again in (False, False, True):
        rows = zoo.try_networks(chosen, out, again=again)
    assert tried == ["resnet18", "dla34"] * 2
    assert [row.name for row in rows] == ["resnet18", "dla34"]
    assert {row.rival for row in read(out)} == {"exact"}


def test_summary_and_page_count_what_is_exact_and_far_enough() -> None:
    rows = [
        NetworkResult(
            "timm", "dla34", 96, 3, 0.95, 1e-15, 1e-15, 0, 0.5, 2.0, 0.5, "", "", "exact"
        ),
        NetworkResult(
            "timm", "vgg11", 96, 3, 0.95, 1e-3, 1e-15, 0, 0.5, 2.0, 0.5, "", "", "differs by 1e-01"
        ),
        NetworkResult(
            "timm", "nf_resnet26", 96, left="the weight is computed", rival="removes nothing"
        ),
        NetworkResult(
            "timm", "xception41", 96, failure="ValueError: no", rival="its process ended"
        ),
    ]
    figures = {name: values["median"] for name, values in summary(rows).items()}
    assert figures["zoo_timm_networks"] == 4
    assert figures["zoo_timm_exact_pct"] == 50
    assert figures["zoo_timm_reach_80_pct"] == 25
    assert figures["zoo_timm_torch_pruning_works_pct"] == 50
    assert figures["zoo_timm_torch_pruning_exact_pct"] == 25
    assert figures["zoo_analysis_over_forward"] == 4
    text = page(rows)
    assert "- timm: 4 networks, 2 exact, 1 of them" in text
    assert "| dla34 | 96 | 3 | 95.0 | 1e-15 | 1e-15 | 2.0 | 0.50 | exact |" in text
    assert "| xception41 | 0 | ValueError: no |" in text


def test_a_difference_of_shapes_or_of_what_is_not_finite_is_infinite() -> None:
    import torch

    one, two = torch.ones(2), torch.ones(3)
    assert difference([one], [one]) == 0
    assert difference([one], [two]) == float("inf")
    assert difference([one], [one * float("nan")]) == float("inf")


def test_every_network_is_listed_once_with_its_side() -> None:
    assert len({*network_names()}) == len(network_names())
    assert side_of("timm", "levit_conv_128s") == 224
    assert side_of("timm", "dla34") == 96
    assert side_of("torchvision", "resnet18") == 64


def test_torch_pruning_is_compared_with_its_own_mask() -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 1000, 1)).double()
    assert zoo.rival(plain, "timm", 8) == "exact"
    normed = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(1, 8), nn.Conv2d(8, 1000, 1)).double()
    assert zoo.rival(normed, "timm", 8).startswith("differs by")
