"""A pruning plan: a validated, frozen value that is logged, compared and saved before anything is mutated."""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from psap_core.checks import require_choice, require_number, require_whole
from psap_core.cost import CostModel
from psap_core.errors import InputError
from psap_core.files import sealed, unsealed
from psap_core.groups import SCOPES, ChannelGroup, Scope
from psap_core.inputs import Description, require_description

Unit = Literal["macs", "filters"]


@dataclass(frozen=True)
class LayerPlan:
    """Which filters of one channel group are pruned.

    Attributes:
        name: the group's, which is that of the first layer that writes its channels.
        filters: of the group in the dense network.
        pruned: their sorted, distinct indices; at least one filter is kept.

    Raises:
        InputError: the indices are not sorted, distinct integers below `filters`, or none is kept.
    """

    name: str
    filters: int
    pruned: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise InputError(f"a layer's name is a text, not {self.name!r}")
        require_whole(f"filters of {self.name!r}", self.filters, 1)
        if not isinstance(self.pruned, Iterable):
            raise InputError(
                f"pruned filters of {self.name!r} are a list of integers, not {self.pruned!r}"
            )
        pruned = tuple(self.pruned)
        for index in pruned:
            require_whole(f"a pruned filter of {self.name!r}", index, 0)
        object.__setattr__(self, "filters", int(self.filters))  # whatever types numpy has
        object.__setattr__(self, "pruned", tuple(map(int, pruned)))
        if list(self.pruned) != [f for f in sorted(set(self.pruned)) if f in range(self.filters)]:
            raise InputError(
                f"pruned filters of {self.name!r} are not sorted, distinct and in 0..{self.filters - 1}"
            )
        if len(self.pruned) >= self.filters:
            raise InputError(f"the plan keeps no filter of layer {self.name!r}")

    @property
    def kept(self) -> int:
        """Number of filters that are left."""
        return self.filters - len(self.pruned)


@dataclass(frozen=True)
class PrunePlan:
    """Which filters of which channel groups are pruned, and what that saves.

    Attributes:
        layers: every channel group in scope, in network order.
        scope: what ends channels, see `find_groups`.
        inputs: what the network is called with, see `inputs.describe`.
        macs: multiply-accumulates of the exported network, one input.
        dense_macs: the same of the dense network.
        target_cut: the cut that was asked for, as a share of `unit`; 0 where nothing was asked for.
        unit: what target_cut is a share of.
    """

    layers: tuple[LayerPlan, ...]
    scope: Scope
    inputs: Description
    macs: int
    dense_macs: int
    target_cut: float = 0.0
    unit: Unit = "macs"

    def __post_init__(self) -> None:
        if len(self.pruned) != len(self.layers):
            raise InputError("the plan names a layer twice")
        if self.scope not in SCOPES:
            raise InputError(f"the plan's scope {self.scope!r} is none of {', '.join(SCOPES)}")
        require_choice("the plan's unit", self.unit, ("macs", "filters"))
        require_whole("the plan's macs", self.macs, 0)
        require_whole("the plan's dense_macs", self.dense_macs, 1)
        require_number("the plan's target_cut", self.target_cut, 0, 1, "a share in [0, 1]")
        require_description(self.inputs)
        object.__setattr__(self, "macs", int(self.macs))
        object.__setattr__(self, "dense_macs", int(self.dense_macs))
        object.__setattr__(self, "target_cut", float(self.target_cut))
        if self.macs > self.dense_macs:
            raise InputError(
                f"the plan's macs, {self.macs}, are more than the dense network's {self.dense_macs}"
            )

    @property
    def macs_cut(self) -> float:
        """Share of the dense network's multiply-accumulates that is removed."""
        return 1 - self.macs / self.dense_macs

    @property
    def pruned(self) -> dict[str, tuple[int, ...]]:
        return {layer.name: layer.pruned for layer in self.layers}

    @property
    def digest(self) -> str:
        """SHA-256 over group names, widths and pruned indices only, never over floats."""
        content = [[layer.name, layer.filters, layer.pruned] for layer in self.layers]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def match(self, groups: Sequence[ChannelGroup]) -> list[tuple[ChannelGroup, LayerPlan]]:
        """A network's groups beside the plan's layers; raises InputError if the plan is of another network."""
        group_of = {(group.name, group.filters): group for group in groups}
        for part in self.layers:
            if (part.name, part.filters) not in group_of:
                raise InputError(f"the plan is of another network: {self._misfit(part, groups)}")
        return [(group_of[part.name, part.filters], part) for part in self.layers]

    def _misfit(self, part: LayerPlan, groups: Sequence[ChannelGroup]) -> str:
        """What is wrong where a network has no group for a layer of the plan."""
        widths = {group.name: group.filters for group in groups}
        missing = f"no layer {part.name!r} with {part.filters} filters"
        if all(widths.get(layer.name) == layer.kept for layer in self.layers):
            return f"{missing}, but with {part.kept}: the plan's filters are cut already, nothing is left to export"
        if any(name.endswith(f".{part.name}") for name in widths):
            return f"{missing}; if the network is wrapped, give the bare one"
        return missing

    def to_json(self) -> str:
        """The plan as JSON, sealed with a SHA-256; `from_json` reads it back."""
        content = json.loads(json.dumps(asdict(self) | {"digest": self.digest}))
        return json.dumps(sealed(content), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "PrunePlan":
        """Raises InputError if `text` is no plan, or was changed."""
        try:
            data = unsealed(json.loads(text))
            del data["digest"]
            layers = tuple(
                LayerPlan(part["name"], part["filters"], tuple(part["pruned"]))
                for part in data.pop("layers")
            )
            plan = cls(layers=layers, **data)
        except InputError as error:
            raise InputError(f"the pruning plan was edited or damaged: {error}") from error
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not a pruning plan: {error}") from error
        return plan


def make_plan(
    groups: Sequence[ChannelGroup],
    pruned: Mapping[str, Collection[int]],
    cost: CostModel,
    inputs: Description,
    scope: Scope,
    target_cut: float = 0.0,
    unit: Unit = "macs",
) -> PrunePlan:
    """The plan that prunes the filters `pruned` (group name to indices, none where absent).

    Args:
        groups: every group in scope.
        cost: MACs of the exported network, over the same groups.
        inputs: what the network is called with, see `inputs.describe`.
    """
    if unknown := sorted(set(pruned) - {group.name for group in groups}):
        raise InputError(
            f"the plan prunes {unknown[0]!r}, which is not a prunable layer in scope {scope}"
        )
    layers = tuple(
        LayerPlan(group.name, group.filters, tuple(sorted(pruned.get(group.name, ()))))
        for group in groups
    )
    macs = int(cost.cost([layer.kept for layer in layers]))
    return PrunePlan(layers, scope, inputs, macs, cost.dense, target_cut, unit)
