"""Views, splits and attention: which of several dimensions shrinks, and the numbers that must shrink with it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psap_core import export, load_exported, save_exported
from psap_core.cost import macs_cost_model
from psap_core.groups import search_groups
from psap_core.inputs import describe
from psap_core.plan import make_plan
from psap_core.sizes import Size, counted, read_number, track_attributes_, write_number_
from psap_core.suspension import apply_
from tests.core.networks import draw_filters, randomise_

WIDTH, SIDE = 12, 4


class Between(nn.Module):
    """stem, a body [N, 12, 4, 4] -> [N, 12, 4, 4], head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.body = body
        self.head = nn.Conv2d(WIDTH, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


class Attention(nn.Module):
    """Over positions, three heads of four entries, torch's fused operation."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 3, 4
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        qkv = self.qkv(x.flatten(2).transpose(1, 2))
        qkv = qkv.reshape(n, h * w, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = self.attend(q, k, v).transpose(1, 2)
        return self.proj(x.flatten(2)).transpose(1, 2).unflatten(2, (h, w))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class ScaledAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q * 0.5 @ k.transpose(-2, -1)).softmax(-1) @ v


class RootAttention(Attention):
    """The scale is computed from the number of entries, which must stay then."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
        return scores.softmax(-1) @ v


class SizedAttention(ScaledAttention):
    """The heads are laid side by side by sizes that the tensors have."""

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        shape = (n, h * w, self.num_heads, self.head_dim)
        x = x.flatten(2).transpose(1, 2)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = self.attend(q, k, v)
        x = x.permute(1, 3, 0, 2).reshape(self.num_heads, q.size(-1), n, h * w)
        return self.proj(x.flatten(0, 1).permute(1, 2, 0)).transpose(1, 2).unflatten(2, (h, w))


class ScaledFusedAttention(Attention):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.5)


class BiasedAttention(Attention):
    """What is added to the scores has an entry for every head."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.randn(3, SIDE**2, SIDE**2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.scores)


class DividedAttention(Attention):
    """Its view divides the input's channels by the number of heads: neither can follow."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(x).reshape(n, h * w, 3, self.num_heads, c // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = self.attend(q, k, v).transpose(1, 2)
        return self.proj(x.reshape(n, h * w, c)).transpose(1, 2).reshape(n, c, h, w)


class EvoNorm(nn.Module):
    """Divides by the deviation within four groups of three channels."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = 4
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.bias = nn.Parameter(torch.zeros(WIDTH))
        self.slope = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        grouped = x.reshape(n, self.groups, c // self.groups, h, w)
        deviation = grouped.var((2, 3, 4), keepdim=True).add(1e-5).sqrt()
        deviation = deviation.expand(grouped.shape).reshape(n, c, h, w)
        x = x * (x * self.slope.view(1, -1, 1, 1)).sigmoid() / deviation
        return x * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class FilterResponseNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, WIDTH, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, WIDTH, 1, 1))
        self.tau = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x * x.square().mean((2, 3), keepdim=True).add(1e-5).rsqrt()
        return torch.maximum(x * self.weight + self.bias, self.tau.view(1, -1, 1, 1))


class MixedConvolution(nn.Module):
    """Parts of the channels, of sizes that stand in an attribute, go through kernels of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = [5, 7]
        self.small = nn.Conv2d(5, 5, 3, padding=1, groups=5)
        self.large = nn.Conv2d(7, 7, 5, padding=2, groups=7)

    def forward(self, x: Tensor) -> Tensor:
        small, large = torch.split(x, self.splits, 1)
        return torch.cat([self.small(small), self.large(large)], 1)


class SplitAttention(nn.Module):
    """ResNeSt's: two halves of the channels, weighed against each other."""

    def __init__(self) -> None:
        super().__init__()
        self.radix = 2
        self.both = nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1, groups=2)
        self.down, self.up = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(4, 2 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.both(x)
        n, c, h, w = x.shape
        parts = x.reshape(n, self.radix, c // self.radix, h, w)
        gate = self.up(self.down(parts.sum(1).mean((2, 3), keepdim=True)).relu())
        gate = gate.view(n, 1, self.radix, -1).transpose(1, 2).softmax(1).reshape(n, -1, 1, 1)
        return (parts * gate.reshape(n, self.radix, c // self.radix, 1, 1)).sum(1)


class Positions(nn.Module):
    """An embedding of positions with the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(1, WIDTH, SIDE, SIDE))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.embedding


class ShapedByOthers(nn.Module):
    """A result of other channels is given the shape of the input: both shrink alike."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return self.value(x).flatten(2).transpose(1, 2).reshape(n, h * w, c).mT.reshape(n, c, h, w)


class ShapesPositions(nn.Module):
    """Twelve positions are laid out by the number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(WIDTH, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, _, _ = x.shape
        positions = F.adaptive_avg_pool2d(self.one(x), (4, 3)).view(n, c)
        return x * positions.mean(1).view(n, 1, 1, 1)


class NamedGroupNorm(nn.Module):
    """GroupNorm in a class of the user's, which keeps the number of groups itself."""

    def __init__(self) -> None:
        super().__init__()
        self.num_groups = 3
        self.weight = nn.Parameter(torch.ones(WIDTH))
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.num_groups, self.weight, self.bias)


CASES: dict[str, tuple[nn.Module, dict[str, int]]] = {
    "heads": (Attention(), {"stem": 12, "body.qkv": 3, "body.proj": 12}),
    "entries of heads": (ScaledAttention(), {"stem": 12, "body.qkv": 4, "body.proj": 12}),
    "fused, with a scale": (ScaledFusedAttention(), {"stem": 12, "body.qkv": 4, "body.proj": 12}),
    "scaled by a root": (RootAttention(), {"stem": 12, "body.proj": 12}),
    "sizes of tensors": (SizedAttention(), {"stem": 12, "body.qkv": 4, "body.proj": 12}),
    "a mask of the heads": (BiasedAttention(), {"stem": 12, "body.proj": 12}),
    "computed head size": (DividedAttention(), {}),
    "evo norm": (EvoNorm(), {"stem": 4}),
    "filter response norm": (FilterResponseNorm(), {"stem": 12}),
    "split by an attribute": (MixedConvolution(), {"stem": 5, "stem:2": 7}),
    "two large groups": (
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=2),
        {"stem": 6, "body": 6},
    ),
    "many small groups": (nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=4), {"stem": 4}),
    "large groups, transposed": (
        nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1, groups=2),
        {"stem": 6, "body": 6},
    ),
    "split attention": (SplitAttention(), {"stem": 6, "body.both": 12, "body.down": 4}),
    "positions": (Positions(), {"stem": 12}),
    "shaped by others": (ShapedByOthers(), {"stem": 12}),
    "groups of a norm": (NamedGroupNorm(), {"stem": 3}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_right_dimension_shrinks_and_its_numbers_with_it(name: str, tmp_path) -> None:
    body, expected = CASES[name]
    model = Between(body).eval()
    example = torch.randn(2, 3, SIDE, SIDE)
    found = search_groups(model, example, scope="coupled")
    assert {group.name: group.filters for group in found.groups} == expected
    if not expected:
        return
    randomise_(model)
    cost = macs_cost_model(model, found.groups, example)
    plan = make_plan(found.groups, draw_filters(found.groups), cost, describe(example), "coupled")
    apply_(model, found.groups, plan)
    small = export(model, plan)  # which compares with the masked network
    save_exported(tmp_path, small, plan)
    loaded = load_exported(tmp_path, Between(body))
    assert torch.equal(loaded(example), small(example))


def test_a_second_round_prunes_what_the_first_left() -> None:
    model, example = Between(Attention()).eval(), torch.randn(2, 3, SIDE, SIDE)
    for heads in (3, 2):
        found = search_groups(model, example, scope="coupled")
        assert {group.name: group.filters for group in found.groups}["body.qkv"] == heads
        cost = macs_cost_model(model, found.groups, example)
        plan = make_plan(found.groups, {"body.qkv": [0]}, cost, describe(example), "coupled")
        apply_(model, found.groups, plan)
        model = export(model, plan)


@pytest.mark.parametrize(
    ("body", "layer", "reason"),
    [
        (ShapesPositions(), "stem", "their number shapes something else in view"),
        (DividedAttention(), "body.qkv", "their number shapes something else in reshape"),
        (RootAttention(), "body.qkv", "something is calculated with their number"),
        (BiasedAttention(), "body.qkv", "they reach scaled_dot_product_attention in body"),
        (nn.Unflatten(1, (3, 4)), "stem", "their number is written in the code of unflatten"),
    ],
)
def test_a_size_that_cannot_follow_is_named(body: nn.Module, layer: str, reason: str) -> None:
    model = Between(
        nn.Sequential(body, nn.Flatten(1, 2)) if isinstance(body, nn.Unflatten) else body
    )
    found = search_groups(model, torch.randn(2, 3, SIDE, SIDE), scope="coupled")
    assert reason in found.left_alone[layer]


# ---------------------------------------------------------------------------- numbers that know their source


def test_arithmetic_keeps_the_sources() -> None:
    ids = torch.arange(12)
    channels, groups = Size(12, ids=ids), Size(4, "body.groups")
    for computed in (channels // groups, 2 * channels):
        assert isinstance(computed, Size)
        assert channels in computed.sources
        assert counted(computed, 12) == [ids]
        assert counted(computed, 6) == []
    for computed in (
        channels - 1,
        13 % channels,
        2 * (channels + 1),
    ):  # which do not follow in proportion
        assert channels in computed.sources
        assert counted(computed, 12) == []
    assert channels // groups == 3
    assert (channels // groups).sources == (channels, groups)
    assert type(channels / groups) is float
    assert counted(groups * 2, 12) == []


@pytest.mark.parametrize(
    "use",
    [
        lambda size: size**-0.5,
        lambda size: 2**size,
        lambda size: 1 / size,
        lambda size: size * 0.5,
        lambda size: math.sqrt(size),
        lambda size: (size // 2) ** 0.5,
    ],
)
def test_a_size_that_becomes_a_factor_says_so(use) -> None:
    size = Size(12, "dim")
    assert math.isclose(use(size), use(12))
    assert size.is_value


def test_numbers_of_modules_are_read_and_written() -> None:
    network = nn.Sequential(MixedConvolution(), EvoNorm())
    track_attributes_(network)
    assert network[0].splits[1].attribute == "0.splits[1]"
    assert network[1].groups.attribute == "1.groups"
    assert type(network[0].small.groups) is int  # torch's own modules are known
    write_number_(network[0], "splits[1]", 6)
    write_number_(network[1], "groups", 3)
    assert network[0].splits == [5, 6]
    assert read_number(network[0], "splits[1]") == 6
    assert read_number(network[1], "groups") == 3


def test_a_size_that_is_copied_is_no_value() -> None:
    size = Size(4, "groups")
    assert Size(size, "groups") == 4
    assert not size.is_value
