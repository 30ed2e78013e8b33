"""Multiply-accumulates and parameters: one definition, and the cost model that allocation uses.

MACs are those of convolution and linear modules, counted by torch's FlopCounterMode (two FLOPs each).
"""

import copy
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from psap_core.layers import PrunableLayer


class LayerCost(NamedTuple):
    """One row of `layer_table`: module path, class name, MACs for one input, parameters."""

    name: str
    kind: str
    macs: int
    params: int


@dataclass(frozen=True)
class CostModel:
    """Cost of the exported network as a function of the kept filters k_l of its prunable layers.

    cost(k) = fixed + sum_l linear[l] * k_l + sum_(l, m, c) c * k_l * k_m, every coefficient >= 0.
    A layer's own output costs k_l; its share of a consumer's input costs k_m too if it is an inner layer.
    """

    filters: tuple[int, ...]
    fixed: int
    linear: tuple[int, ...]
    bilinear: tuple[tuple[int, int, int], ...]

    def cost(self, kept: Sequence[float]) -> float:
        """Cost with kept[l] filters in layer l; an exact integer for integers."""
        own = sum(map(mul, self.linear, kept))
        return self.fixed + own + sum([c * kept[l] * kept[m] for l, m, c in self.bilinear])

    def marginal(self, kept: Sequence[int], l: int) -> int:
        """What one more filter of layer l costs: its own output and its share of its consumers' input."""
        return self.linear[l] + sum(
            [c * kept[b if a == l else a] for a, b, c in self.bilinear if l in (a, b)]
        )

    @property
    def dense(self) -> int:
        return int(self.cost(self.filters))

    def budget(self, cut: float) -> float:
        """What the network may cost once the share `cut` is removed; rounding never misses a whole number."""
        left = (1 - cut) * self.dense
        return round(left) if math.isclose(left, round(left), rel_tol=1e-12) else left


def macs(model: nn.Module, example_input: Tensor) -> int:
    """Multiply-accumulates of all convolutions and linear layers for one input; example_input is [N, C, H, W]."""
    return sum(row.macs for row in layer_table(model, example_input))


def params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def layer_table(model: nn.Module, example_input: Tensor) -> list[LayerCost]:
    """MACs for one input and parameters of every convolution, transposed or not, and linear layer, in module order."""
    # A copy in evaluation mode leaves the caller's statistics alone; under inference_mode the counter sees nothing.
    with torch.inference_mode(False), torch.no_grad(), (counter := FlopCounterMode(display=False)):
        copy.deepcopy(model).eval()(example_input)
    counts, flops = counter.get_flop_counts(), defaultdict[nn.Module, int](int)
    for name, module in model.named_modules(
        remove_duplicate=False
    ):  # a module may have several names
        flops[module] += sum(counts.get(f"{type(model).__name__}.{name}", {}).values())
    counted = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))
    ]
    return [
        LayerCost(name, type(m).__name__, flops[m] // 2 // len(example_input), params(m))
        for name, m in counted
    ]


def macs_cost_model(
    model: nn.Module, layers: Sequence[PrunableLayer], example_input: Tensor
) -> CostModel:
    """MACs of the exported network for one input, as a function of the kept filters of `layers`."""
    writes = {member: l for l, layer in enumerate(layers) for member in layer.members}
    reads = {consumer: l for l, layer in enumerate(layers) for consumer in layer.consumers}
    filters = tuple(layer.filters for layer in layers)
    fixed, linear, bilinear = 0, [0] * len(layers), list[tuple[int, int, int]]()
    for row in layer_table(model, example_input):
        touched = [side[row.name] for side in (writes, reads) if row.name in side]
        coefficient = row.macs // math.prod(filters[l] for l in touched)
        if len(touched) == 2:
            bilinear.append((touched[0], touched[1], coefficient))
        elif touched:
            linear[touched[0]] += coefficient
        else:
            fixed += row.macs
    return CostModel(filters, fixed, tuple(linear), tuple(bilinear))


def filters_cost_model(layers: Sequence[PrunableLayer]) -> CostModel:
    """The number of kept filters, for a budget in filters instead of MACs."""
    return CostModel(tuple(layer.filters for layer in layers), 0, (1,) * len(layers), ())
