"""Networks that use torch in ways that mislead an analysis: what is exported computes the same, or is left alone."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psap_core.cost import macs, macs_cost_model
from psap_core.errors import InputError
from psap_core.groups import Scope, search_groups
from psap_core.inputs import Example, call, describe, map_tensors, tensors_in
from psap_core.plan import make_plan
from psap_core.surgery import smaller_copy
from psap_core.suspension import apply_
from tests.core.networks import draw_filters, randomise_

WIDTH, SIDE = 8, 8


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


class Around(nn.Module):
    """stem, a function of this module and the stem's output, head."""

    def __init__(self, function, outputs: int = WIDTH, norm: bool = True, **parts) -> None:
        super().__init__()
        self.stem, self.between = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.norm = nn.BatchNorm2d(WIDTH) if norm else nn.Identity()
        self.head = nn.Conv2d(outputs, 5, 1)
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self, self.norm(self.stem(x))))


def gate(content: list) -> float:
    return float(np.tanh(np.mean(content)))


def images() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def in_double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def check_exact(
    model: nn.Module, scope: Scope = "coupled", example: Example = None
) -> tuple[dict[str, int], dict[str, str]]:
    """Groups and what is left alone; every group loses filters, drawn in several ways, and nothing else changes."""
    example = images() if example is None else example
    model.eval()
    found = search_groups(model, example, scope=scope)
    for seed in range(3 if found.groups else 0):
        masked = copy.deepcopy(model)
        randomise_(masked, seed)
        cost = macs_cost_model(masked, found.groups, example)
        filters = draw_filters(found.groups, 0.4, seed)
        plan = make_plan(found.groups, filters, cost, describe(example), scope)
        apply_(masked, found.groups, plan)
        small = smaller_copy(masked, found.groups, plan)
        assert macs(small, example) == plan.macs
        ours, theirs = (
            [*tensors_in(call(net.double(), map_tensors(example, in_double)))]
            for net in (masked, small)
        )
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() <= 1e-9 * one.abs().max()
    return {group.name: group.filters for group in found.groups}, found.left_alone


# ---------------------------------------------------------------------------- what no size or dimension may hide


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


def images_of(x: Tensor) -> Tensor:
    return x.transpose(1, 2).unflatten(2, (SIDE, SIDE))


class Heads(nn.Module):
    """Attention whose query, key and value are layers of their own."""

    def __init__(self, attend, values: int = 4, heads: int = 2, **parts) -> None:
        super().__init__()
        self.heads, self.keys, self.entries, self.values, self.attend = heads, 4, 4, values, attend
        self.q, self.k = nn.Linear(WIDTH, heads * 4), nn.Linear(WIDTH, heads * 4)
        self.v, self.proj = nn.Linear(WIDTH, heads * values), nn.Linear(heads * values, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q = self.q(x).view(n, length, self.heads, self.keys).transpose(1, 2)
        k = self.k(x).view(n, length, self.heads, self.keys).transpose(1, 2)
        v = self.v(x).view(n, length, self.heads, self.values).transpose(1, 2)
        return self.proj(self.attend(self, q, k, v).transpose(1, 2).flatten(2))


def around_heads(attend, **options) -> nn.Module:
    return Around(lambda m, x: images_of(m.body(tokens(x))), body=Heads(attend, **options))


EXACT = {
    "pooled channels": Around(lambda m, x: images_of(F.max_pool1d(tokens(m.between(x)), 3, 1, 1))),
    "channels pooled to one": Around(
        lambda m, x: x * images_of(F.adaptive_avg_pool1d(tokens(m.between(x)), 1))
    ),
    "channels pooled in a volume": Around(
        lambda m, x: x * F.max_pool3d(m.between(x)[:, None], (3, 1, 1), 1, (1, 0, 0))[:, 0]
    ),
    "interpolated channels": Around(
        lambda m, x: images_of(F.interpolate(tokens(m.between(x)), scale_factor=2.0)[..., ::2])
    ),
    "split by half of the channels": Around(
        lambda m, x: torch.cat(m.between(x).split(x.shape[1] // 2, 1)[::-1], 1)
    ),
    "split by a quarter and the rest": Around(
        lambda m, x: torch.cat(
            m.between(x).split([x.shape[1] // 4, x.shape[1] - x.shape[1] // 4], 1)[::-1], 1
        )
    ),
    "split into one": Around(lambda m, x: m.between(x).split([WIDTH], 1)[0]),
    "narrow to all": Around(lambda m, x: m.between(x).narrow(1, 0, WIDTH)),
    "indexed by all": Around(lambda m, x: m.between(x)[:, torch.arange(WIDTH)]),
    "selected by all": Around(lambda m, x: m.between(x).index_select(1, torch.arange(WIDTH))),
    "sliced by all": Around(lambda m, x: m.between(x)[:, :WIDTH]),
    "norm shared with fixed channels": Around(
        lambda m, x: torch.cat([m.bn(m.between(x)), m.bn(x.softmax(1))], 1),
        outputs=2 * WIDTH, bn=nn.BatchNorm2d(WIDTH),
    ),
    "slopes shared with fixed channels": Around(
        lambda m, x: torch.cat([m.slopes(m.between(x)), m.slopes(x.softmax(1))], 1),
        outputs=2 * WIDTH, slopes=nn.PReLU(WIDTH),
    ),
    "embedding shared with fixed channels": Around(
        lambda m, x: torch.cat([m.between(x) * m.p, x.softmax(1) * m.p], 1),
        outputs=2 * WIDTH, p=parameter(1, WIDTH, SIDE, SIDE),
    ),
    "tied, transposed": Around(
        lambda m, x: F.linear(F.linear(tokens(x), m.p).relu(), m.p.t()).mT.unflatten(2, (SIDE, SIDE)),
        p=parameter(12, WIDTH),
    ),
    "tied convolutions": Around(
        lambda m, x: F.conv_transpose2d(F.conv2d(x, m.p).relu(), m.p), p=parameter(12, WIDTH, 3, 3)
    ),
    "tied product": Around(
        lambda m, x: images_of(F.linear(tokens(x), m.p).relu() @ m.p), p=parameter(12, WIDTH)
    ),
    "a weight's mean": Around(lambda m, x: m.between(x) * (1 + m.between.weight.abs().mean())),
    "gate of numpy": Around(lambda m, x: x * gate(m.between(x).detach().numpy().tolist())),
    "gate of a list": Around(lambda m, x: x * gate(m.between(x).tolist())),
    "repeated by numbers": Around(
        lambda m, x: m.between(x).repeat_interleave(torch.full((WIDTH,), 2), 1), outputs=2 * WIDTH
    ),
    "a difference in a view": Around(
        lambda m, x: m.between(x).view(2, x.shape[1] - 4, 2, SIDE, SIDE).flatten(1, 2)
    ),
    "divided by its norm": Around(
        lambda m, x: (lambda y: y / y.norm(dim=(2, 3), keepdim=True))(m.between(x))
    ),
    "divided by its root": Around(
        lambda m, x: (lambda y: y * y.square().mean((2, 3), keepdim=True).rsqrt())(m.between(x))
    ),
    "times its logarithm": Around(lambda m, x: (lambda y: y * y.log())(m.between(x).abs())),
    "chosen by a method": Around(lambda m, x: m.between(x).where(x[:, :1] > 0, 0.0)),
    "mixed positions": Around(
        lambda m, x: F.linear(m.between(x).flatten(2), m.p).unflatten(2, (SIDE, SIDE)),
        p=parameter(SIDE**2, SIDE**2),
    ),
    "value of another width": around_heads(
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.5), values=3
    ),
    "live query and key": around_heads(
        lambda m, q, k, v: F.scaled_dot_product_attention(
            q.sigmoid() + torch.arange(64.0).to(q)[:, None],
            k.sigmoid() + torch.arange(64.0).to(k)[:, None],
            v,
            scale=0.01,
        )
    ),
}  # fmt: skip


@pytest.mark.parametrize("scope", ["coupled", "all"])
@pytest.mark.parametrize("name", EXACT)
def test_what_is_exported_computes_the_same(name: str, scope: Scope) -> None:
    check_exact(EXACT[name], scope)


class Opaque(nn.Conv2d):
    """Returns an object of its own."""

    def forward(self, x: Tensor) -> object:
        output = super().forward(x)
        return type("Output", (), {"value": output})()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(torch.jit.script(nn.Conv2d(3, 4, 1))), "0 is a ScriptModule"),
        (nn.Sequential(nn.LazyConv2d(4, 1)), "0 has no weights yet: run the model once"),
        (Opaque(3, 4, 1), "returns a Output in which no tensor is found"),
    ],
)
def test_what_cannot_be_seen_is_refused(model: nn.Module, says: str) -> None:
    with pytest.raises(InputError, match=says):
        search_groups(model, images())


def test_grouped_queries_are_left_alone() -> None:
    model = around_heads(
        lambda m, q, k, v: F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)
    )
    assert set(check_exact(model)[0]) == {"stem", "body.proj"}


def test_a_tied_embedding() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, WIDTH)
            self.first = nn.Conv1d(WIDTH, 12, 3, padding=1)
            self.second = nn.Conv1d(12, WIDTH, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.second(self.first(self.embedding(x).mT).relu()).mT
            return F.linear(x, self.embedding.weight)

    groups, _ = check_exact(Tied(), example=(torch.randint(10, (2, 6)),))
    assert groups == {"first": 12}


BEFORE_THE_NORM = {
    "a view": lambda m, x: x.flatten(2).view(-1, WIDTH, SIDE, SIDE),
    "a constant": lambda m, x: x * torch.arange(1.0, 1 + WIDTH).to(x).view(1, WIDTH, 1, 1),
    "a depthwise convolution": lambda m, x: F.conv2d(x, m.p, padding=1, groups=WIDTH),
    "a factor": lambda m, x: x * x.shape[1] ** -0.5,
}


@pytest.mark.parametrize("name", BEFORE_THE_NORM)
def test_what_is_fixed_before_its_norm_is_not_scattered(name: str) -> None:
    model = Around(
        lambda m, x: m.bn(BEFORE_THE_NORM[name](m, m.between(x))).relu(),
        bn=nn.BatchNorm2d(WIDTH), p=parameter(WIDTH, 1, 3, 3),
    )  # fmt: skip
    assert set(check_exact(model, "all")[0]) == {"stem"}


# ---------------------------------------------------------------------------- sizes that become values

FACTORS = {
    "root of numpy": lambda size, x: 1 / np.sqrt(size),
    "int": lambda size, x: int(size) ** -0.5,
    "negative": lambda size, x: math.exp(-size),
    "quotient": lambda size, x: divmod(size, 2)[0],
    "shifted": lambda size, x: size << 1,
    "in a tensor": lambda size, x: torch.full((1,), size).to(x).rsqrt(),
    "mean of numbers": lambda size, x: torch.arange(size).to(x).mean(),
    "pooled to it": lambda size, x: F.adaptive_avg_pool2d(x[:, :1, :3, :3], size).amax(),
}


@pytest.mark.parametrize("source", ["shape", "attribute"])
@pytest.mark.parametrize("name", FACTORS)
def test_a_size_that_becomes_a_value_stays(name: str, source: str) -> None:
    def function(m: nn.Module, x: Tensor) -> Tensor:
        y = m.between(x) * m.gamma.view(1, -1, 1, 1)
        return y * FACTORS[name](y.shape[1] if source == "shape" else m.dim, images().to(x))

    groups, alone = check_exact(Around(function, gamma=parameter(WIDTH), dim=WIDTH))
    assert "between" not in groups
    assert "something is calculated with their number" in alone["between"]


def test_padding_by_sizes_keeps_them() -> None:
    def function(m: nn.Module, x: Tensor) -> Tensor:
        width = (12 - x.shape[1]) // 2
        return F.pad(m.between(x), (0, 0, 0, 0, width, width))

    check_exact(Around(function, outputs=12))


def test_a_shuffle_into_as_many_channels_joins_halves_only() -> None:
    def function(m: nn.Module, x: Tensor) -> Tensor:
        x = m.between(x)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)

    assert check_exact(Around(function))[0] == {"stem": 8, "between": 4}


def test_nothing_silences_zero_by_zero() -> None:
    model = Around(lambda m, x: (lambda y: y / y.std((2, 3), keepdim=True))(m.between(x)))
    assert "nothing silences" in check_exact(model)[1]["between"]
