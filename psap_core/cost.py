"""Multiply-accumulates and parameters: one definition, and the cost model that allocation uses.

MACs are those of convolution and linear modules, counted by torch's FlopCounterMode (two FLOPs each).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from psap_core.groups import ChannelGroup, Entries
from psap_core.inputs import Example, batch_size, call, copy_network


class LayerCost(NamedTuple):
    """One row of `layer_table`.

    Attributes:
        name: path of the module in the network.
        kind: name of its class.
        macs: multiply-accumulates for one input.
        params: number of its parameters.
    """

    name: str
    kind: str
    macs: int
    params: int


@dataclass(frozen=True)
class CostModel:
    """Cost of the exported network as a function of the kept filters k_l of its channel groups.

    cost(k) = fixed + sum_l linear[l] * k_l + sum_(l, m, c) c * k_l * k_m, every coefficient >= 0. A convolution that
    reads what it writes has l = m; one that reads a concatenation has a term for each of its groups.

    Attributes:
        filters: of every group in the dense network.
        fixed: what stays whatever is pruned.
        linear: what one filter of a group costs, whatever the others keep.
        bilinear: (l, m, c): what a filter of group l costs with every filter of group m.
    """

    filters: tuple[int, ...]
    fixed: int
    linear: tuple[int, ...]
    bilinear: tuple[tuple[int, int, int], ...]

    def cost(self, kept: Sequence[float]) -> float:
        """Cost with kept[l] filters in group l; an exact integer for integers."""
        own = sum(map(mul, self.linear, kept))
        return self.fixed + own + sum([c * kept[l] * kept[m] for l, m, c in self.bilinear])

    def marginal(self, kept: Sequence[int], l: int, more: int = 1) -> int:
        """What `more` filters of group l cost beyond those that are kept."""
        per_filter = self.linear[l]
        for other, c in self._partners[l]:
            if other == l:
                per_filter += c * (2 * kept[l] + more)
            else:
                per_filter += c * kept[other]
        return per_filter * more

    @cached_property
    def _partners(self) -> list[list[tuple[int, int]]]:
        """For every group the groups that it is multiplied with, and by how much."""
        partners: list[list[tuple[int, int]]] = [[] for _ in self.filters]
        for l, m, c in self.bilinear:
            partners[l].append((m, c))
            if l != m:
                partners[m].append((l, c))
        return partners

    @property
    def dense(self) -> int:
        """Cost of the dense network."""
        return int(self.cost(self.filters))

    def budget(self, cut: float) -> float:
        """What the network may cost once the share `cut` is removed; rounding never misses a whole number."""
        budget = (1 - cut) * self.dense
        return round(budget) if math.isclose(budget, round(budget), rel_tol=1e-12) else budget


def macs(model: nn.Module, example_input: Example) -> int:
    """Multiply-accumulates of all convolutions and linear layers for one input of the example's shape."""
    return sum(row.macs for row in layer_table(model, example_input))


def params(model: nn.Module) -> int:
    """Number of parameters of a network."""
    return sum(parameter.numel() for parameter in model.parameters())


def layer_table(model: nn.Module, example_input: Example) -> list[LayerCost]:
    """MACs for one input and parameters of every convolution, transposed or not, and linear layer, in module order."""
    # A copy in evaluation mode leaves the caller's statistics alone; under inference_mode the counter sees nothing.
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(False), torch.no_grad(), counter:
        call(copy_network(model).eval(), example_input)
    counts = counter.get_flop_counts()
    flops = defaultdict[nn.Module, int](int)
    for name, module in model.named_modules(
        remove_duplicate=False
    ):  # a module may have several names
        flops[module] += sum(counts.get(f"{type(model).__name__}.{name}", {}).values())
    inputs = batch_size(example_input)
    return [
        LayerCost(name, type(module).__name__, flops[module] // 2 // inputs, params(module))
        for name, module in model.named_modules()
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
    ]


def macs_cost_model(
    model: nn.Module, groups: Sequence[ChannelGroup], example_input: Example
) -> CostModel:
    """MACs of the exported network for one input, as a function of the kept filters of `groups`."""
    lies_along = defaultdict[tuple[str, int], list[tuple[int, Entries]]](list)
    for l, group in enumerate(groups):
        for entries in (*group.members, *group.readers):
            lies_along[entries.tensor, entries.dim].append((l, entries))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fixed = 0
    linear = [0] * len(groups)
    bilinear = list[tuple[int, int, int]]()
    for row in layer_table(model, example_input):
        weight = model.get_submodule(row.name).weight
        assert isinstance(weight, Tensor)
        name = names.get(id(weight), "")
        outputs, other_outputs = _side(lies_along[name, 0], weight.shape[0])
        inputs, other_inputs = _side(lies_along[name, 1], weight.shape[1])
        coefficient = row.macs // (weight.shape[0] * weight.shape[1])
        fixed += coefficient * other_outputs * other_inputs
        for l, per_filter in outputs:
            linear[l] += coefficient * per_filter * other_inputs
        for m, per_filter in inputs:
            linear[m] += coefficient * per_filter * other_outputs
        for l, per_output in outputs:
            for m, per_input in inputs:
                bilinear.append((l, m, coefficient * per_output * per_input))
    filters = tuple(group.filters for group in groups)
    return CostModel(filters, fixed, tuple(linear), tuple(bilinear))


def _side(parts: Sequence[tuple[int, Entries]], size: int) -> tuple[list[tuple[int, int]], int]:
    """(group, entries of one of its filters) along one dimension of a weight, and how many entries are of no group."""
    per_filter = [(l, entries.index.shape[1]) for l, entries in parts]
    return per_filter, size - sum(entries.index.numel() for _, entries in parts)


def filters_cost_model(groups: Sequence[ChannelGroup]) -> CostModel:
    """The number of kept filters, for a budget in filters instead of MACs."""
    return CostModel(tuple(group.filters for group in groups), 0, (1,) * len(groups), ())
