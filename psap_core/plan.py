"""A pruning plan: a validated, frozen value that is logged, compared and saved before anything is mutated."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from psap_core.cost import CostModel
from psap_core.errors import InputError
from psap_core.layers import PrunableLayer

Unit = Literal["macs", "filters"]


@dataclass(frozen=True)
class LayerPlan:
    """Which filters of one layer are pruned: sorted, distinct indices below `filters`, at least one kept."""

    name: str
    filters: int
    pruned: tuple[int, ...]

    def __post_init__(self) -> None:
        if list(self.pruned) != [f for f in sorted(set(self.pruned)) if f in range(self.filters)]:
            raise InputError(
                f"pruned filters of {self.name!r} are not sorted, distinct and in 0..{self.filters - 1}"
            )
        if len(self.pruned) >= self.filters:
            raise InputError(f"the plan keeps no filter of layer {self.name!r}")

    @property
    def kept(self) -> int:
        return self.filters - len(self.pruned)


@dataclass(frozen=True)
class PrunePlan:
    """Which filters of which layers are pruned, and what that saves.

    Attributes:
        layers: every prunable layer in scope, in network order.
        input_shape: shape of one input, [C, H, W].
        macs: multiply-accumulates of the exported network, one input.
        dense_macs: the same of the dense network.
        target_cut: the cut that was asked for, as a share of `unit`; 0 where nothing was asked for.
        unit: what target_cut is a share of.
    """

    layers: tuple[LayerPlan, ...]
    input_shape: tuple[int, ...]
    macs: int
    dense_macs: int
    target_cut: float = 0.0
    unit: Unit = "macs"

    def __post_init__(self) -> None:
        if len(self.pruned) != len(self.layers):
            raise InputError("the plan names a layer twice")

    @property
    def macs_cut(self) -> float:
        return 1 - self.macs / self.dense_macs

    @property
    def pruned(self) -> dict[str, tuple[int, ...]]:
        return {layer.name: layer.pruned for layer in self.layers}

    @property
    def digest(self) -> str:
        """SHA-256 over layer names, widths and pruned indices only, never over floats."""
        content = [[layer.name, layer.filters, layer.pruned] for layer in self.layers]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def match(self, layers: Sequence[PrunableLayer]) -> list[tuple[PrunableLayer, LayerPlan]]:
        """The plan's layers beside a network's; raises InputError if the plan is of another network."""
        found = {(layer.name, layer.filters): layer for layer in layers}
        for part in self.layers:
            if (part.name, part.filters) not in found:
                raise InputError(
                    f"the plan is of another network: no layer {part.name!r} with {part.filters} filters"
                )
        return [(found[part.name, part.filters], part) for part in self.layers]

    def to_json(self) -> str:
        return json.dumps(asdict(self) | {"digest": self.digest}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "PrunePlan":
        """Raises InputError if `text` is no plan, or its digest is not that of its layers."""
        try:
            data: dict[str, Any] = json.loads(text)
            digest = data.pop("digest")
            layers = tuple(
                LayerPlan(d["name"], d["filters"], tuple(d["pruned"])) for d in data.pop("layers")
            )
            plan = cls(layers=layers, input_shape=tuple(data.pop("input_shape")), **data)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a pruning plan: {error}") from error
        if plan.digest != digest:
            raise InputError("the pruning plan does not match its digest: it was edited or damaged")
        return plan


def make_plan(
    layers: Sequence[PrunableLayer],
    pruned: Mapping[str, Collection[int]],
    cost: CostModel,
    input_shape: Sequence[int],
    target_cut: float = 0.0,
    unit: Unit = "macs",
) -> PrunePlan:
    """The plan that prunes the filters `pruned` (layer name to indices, none where absent).

    Args:
        cost: MACs of the exported network, over the same layers.
    """
    if unknown := sorted(set(pruned) - {layer.name for layer in layers}):
        raise InputError(f"the plan prunes {unknown[0]!r}, which is not a prunable layer in scope")
    plans = tuple(
        LayerPlan(x.name, x.filters, tuple(sorted(pruned.get(x.name, ())))) for x in layers
    )
    macs = int(cost.cost([plan.kept for plan in plans]))
    return PrunePlan(plans, tuple(input_shape), macs, cost.dense, target_cut, unit)
