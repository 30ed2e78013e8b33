"""Eq. 4, 6, 7: suspend, restore and freeze filters. The only code that mutates weights or optimiser state."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from psap_core.errors import InputError
from psap_core.layers import PrunableLayer
from psap_core.plan import PrunePlan


@dataclass(frozen=True)
class FilterTensors:
    """The live tensors of one layer in which dimension 0 is the filter, by name; nothing here is a copy.

    Attributes:
        parameters: convolution weights [O, ...] (and biases), gamma and beta of every member's BatchNorm.
        buffers: BatchNorm statistics.
        state: optimiser state of those parameters, where it has the parameter's shape and exists yet.
        affine: names of gamma [O] and beta [O] of the layer's affine, among the parameters.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    state: dict[str, Tensor]
    affine: tuple[str, str]

    @property
    def gamma(self) -> Tensor:
        return self.parameters[self.affine[0]]

    @property
    def beta(self) -> Tensor:
        return self.parameters[self.affine[1]]

    @property
    def all(self) -> dict[str, Tensor]:
        return self.parameters | self.buffers | self.state


@dataclass(frozen=True)
class Snapshot:
    """What suspended filters were: sorted filter numbers and, by tensor name, their rows [n, ...]."""

    filters: tuple[int, ...]
    rows: dict[str, Tensor]

    @cached_property
    def index(self) -> Tensor:
        """The filter numbers on the rows' device, int64 [n]; only of a snapshot that holds some."""
        return torch.tensor(self.filters, device=next(iter(self.rows.values())).device)

    def take(self, filters: Collection[int]) -> "Snapshot":
        """The part of the snapshot that holds the given filters."""
        if len(filters) == len(self.filters):
            return self
        if not filters:
            return NOTHING_SUSPENDED
        wanted = set(filters)
        positions = torch.tensor(
            [i for i, f in enumerate(self.filters) if f in wanted], device=self.index.device
        )
        rows = {name: row.index_select(0, positions) for name, row in self.rows.items()}
        return Snapshot(tuple(sorted(wanted)), rows)

    def join(self, later: "Snapshot") -> "Snapshot":
        """Both snapshots in one; state that the earlier one did not have yet counts as zero."""
        if not self.filters or not later.filters:
            return later if later.filters else self
        filters = self.filters + later.filters
        order = torch.tensor(sorted(range(len(filters)), key=filters.__getitem__), device=later.index.device)
        rows = {}
        for name, new in later.rows.items():
            old = self.rows.get(name, new.new_zeros(len(self.filters), *new.shape[1:]))
            rows[name] = torch.cat([old, new]).index_select(0, order)
        return Snapshot(tuple(sorted(filters)), rows)


NOTHING_SUSPENDED = Snapshot((), {})


def filter_tensors(
    model: nn.Module, layer: PrunableLayer, optimizer: Optimizer | None = None
) -> FilterTensors:
    """Everything that goes when a filter of `layer` is exported, and its optimiser state."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for member in layer.members:
        module = model.get_submodule(member)
        for name, parameter in module.named_parameters(member, recurse=False):
            parameters[name] = parameter
            for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[f"{name}:{key}"] = value
        buffers |= {name: b for name, b in module.named_buffers(member, recurse=False) if b.ndim}
    return FilterTensors(parameters, buffers, state, (f"{layer.affine}.weight", f"{layer.affine}.bias"))


@torch.no_grad()
def suspend_(tensors: FilterTensors, filters: Sequence[int]) -> Snapshot:
    """Eq. 4: silence filters (sorted numbers) and return what they were; nothing is lost.

    The affine becomes (0, 0), so the contribution is exactly zero in training and in evaluation; the live
    optimiser state of the filters becomes zero.
    """
    if not filters:
        return NOTHING_SUSPENDED
    index = torch.tensor(filters, device=tensors.gamma.device)
    snapshot = Snapshot(tuple(filters), {name: t.index_select(0, index) for name, t in tensors.all.items()})
    for tensor in (tensors.gamma, tensors.beta, *tensors.state.values()):
        tensor.index_fill_(0, index, 0.0)
    return snapshot


@torch.no_grad()
def restore_(tensors: FilterTensors, snapshot: Snapshot) -> None:
    """Eq. 6: give filters back exactly, optimiser state included; state that did not exist yet counts as zero."""
    _write_(tensors.all, snapshot)


@torch.no_grad()
def refresh_(tensors: FilterTensors, snapshot: Snapshot) -> None:
    """Undo what weight decay and running statistics did to the live rows of suspended filters.

    They stay suspended, so this changes neither the network nor its training.
    """
    rows = tensors.parameters | tensors.buffers
    _write_({name: tensor for name, tensor in rows.items() if name not in tensors.affine}, snapshot)


@torch.no_grad()
def freeze_(tensors: FilterTensors, filters: Sequence[int]) -> None:
    """Eq. 7: zero filters for good: weights, affine and optimiser state."""
    index = torch.tensor(filters, dtype=torch.long, device=tensors.gamma.device)
    for tensor in (*tensors.parameters.values(), *tensors.state.values()):
        tensor.index_fill_(0, index, 0.0)


def apply_(
    model: nn.Module, layers: Sequence[PrunableLayer], plan: PrunePlan, optimizer: Optimizer | None = None
) -> None:
    """Zero the plan's filters for good, whoever made the plan.

    Raises:
        InputError: the plan is of another network.
    """
    by_name = {layer.name: layer for layer in layers}
    for layer_plan in plan.layers:
        layer = by_name.get(layer_plan.name)
        if layer is None or layer.filters != layer_plan.filters:
            raise InputError(
                f"the plan's layer {layer_plan.name!r} with {layer_plan.filters} filters is not in the network"
            )
    for layer_plan in plan.layers:
        freeze_(filter_tensors(model, by_name[layer_plan.name], optimizer), layer_plan.pruned)


def _write_(tensors: Mapping[str, Tensor], snapshot: Snapshot) -> None:
    if not snapshot.filters:
        return
    for name, tensor in tensors.items():
        if name in snapshot.rows:
            tensor.index_copy_(0, snapshot.index, snapshot.rows[name])
        else:
            tensor.index_fill_(0, snapshot.index, 0.0)
