"""Eq. 4, 6, 7: suspend, restore and freeze filters. With surgery.py the only code that mutates weights."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from psap_core.errors import InputError
from psap_core.groups import ChannelGroup
from psap_core.plan import PrunePlan
from psap_core.sparsity import FilterRows

SERVING: WeakSet[Optimizer] = WeakSet()  # optimisers whose steps a PSAP follows
PRUNERS: WeakKeyDictionary[nn.Module, ReferenceType[Any]] = WeakKeyDictionary()  # a network's PSAP


@dataclass(frozen=True)
class Rows:
    """The entries of a group's filters in one live tensor; nothing here is a copy.

    Attributes:
        tensor: a parameter, a buffer, or optimiser state of the parameter's shape.
        dim: the dimension along which the entries lie.
        index: int64 [filters, n] on the tensor's device: the n entries of every filter.
        are_in_order: whether filter f has one entry, the one at f.
    """

    tensor: Tensor
    dim: int
    index: Tensor
    are_in_order: bool

    def places(self, filters: Tensor) -> Tensor:
        """The filters' entries: int64 [filters * n]."""
        if self.are_in_order:
            return filters
        return self.index[filters].flatten()

    def take(self, filters: Tensor, source: Tensor | None = None) -> Tensor:
        """A copy of the filters' entries, [filters, n, ...]; of another tensor of the same shape, if given."""
        source = self.tensor if source is None else source
        entries = source.index_select(self.dim, self.places(filters))
        if self.dim > 0:
            entries = entries.movedim(self.dim, 0)
        if self.are_in_order:
            return entries.unsqueeze(1)
        return entries.reshape(len(filters), self.index.shape[1], *entries.shape[1:])

    def put_(self, filters: Tensor, rows: Tensor) -> None:
        """Write rows as `take` gives them."""
        entries = rows.flatten(0, 1).movedim(0, self.dim)
        self.tensor.index_copy_(self.dim, self.places(filters), entries)

    def zero_(self, filters: Tensor) -> None:
        self.tensor.index_fill_(self.dim, self.places(filters), 0.0)

    def all_rows(self) -> Tensor:
        """Every filter's entries, [filters, n, ...]; the tensor itself where each filter is a row of it."""
        if self.dim == 0 and self.are_in_order and len(self.index) == len(self.tensor):
            return self.tensor
        return self.take(torch.arange(len(self.index), device=self.tensor.device))


@dataclass(frozen=True)
class Snapshot:
    """What suspended filters were: tensor name to rows [n, ...], one per filter of `filters`, in their order."""

    filters: tuple[int, ...] = ()
    rows: dict[str, Tensor] = field(default_factory=dict)

    def select(self, filters: Collection[int]) -> "Snapshot":
        """The snapshot of some of its filters."""
        position = {f: i for i, f in enumerate(self.filters)}
        index = torch.tensor([position[f] for f in filters], dtype=torch.long)
        rows = {
            name: saved.index_select(0, index.to(saved.device)) for name, saved in self.rows.items()
        }
        return Snapshot(tuple(filters), rows)


@dataclass(frozen=True)
class FilterTensors:
    """The live tensors that hold one group's filters, by name.

    Attributes:
        parameters: of every member: the writers' weights and biases, gamma and beta, depthwise weights, slopes; and
            constants (buffers) that silence a filter: rows of a weight that nothing trains.
        buffers: normalisation statistics.
        state: optimiser state of those parameters, where it has the parameter's shape and exists yet.
        silencers: names of the parameters and constants that silence a filter.
        writers: names of the weights that write the channels.
    """

    parameters: dict[str, Rows]
    buffers: dict[str, Rows]
    state: dict[str, Rows]
    silencers: tuple[str, ...]
    writers: tuple[str, ...]

    @property
    def everything(self) -> dict[str, Rows]:
        return self.parameters | self.buffers | self.state

    @property
    def constants(self) -> dict[str, Tensor]:
        """The silencers that nothing trains."""
        tensors = {name: self.parameters[name].tensor for name in self.silencers}
        return {name: t for name, t in tensors.items() if not isinstance(t, nn.Parameter)}

    @property
    def device(self) -> torch.device:
        return self.parameters[self.silencers[0]].tensor.device

    def index(self, filters: Collection[int]) -> Tensor:
        """Filter numbers as int64 [n] on the group's device."""
        return torch.tensor([*filters], dtype=torch.long, device=self.device)

    def filter_rows(self) -> list[FilterRows]:
        """The rows of every writer, with the fans of its whole layer."""
        rows = []
        for name in self.writers:
            weight = self.parameters[name]
            outputs, inputs = weight.tensor.shape[weight.dim], weight.tensor.shape[1 - weight.dim]
            positions = weight.tensor[0, 0].numel()
            rows.append(FilterRows(weight.all_rows(), inputs * positions, outputs * positions))
        return rows


def filter_tensors(
    model: nn.Module, group: ChannelGroup, optimizers: Optimizer | Sequence[Optimizer] = ()
) -> FilterTensors:
    """Everything that goes when a filter of `group` is exported, and its optimiser state."""
    return tensors_by_group(model, [group], optimizers)[group.name]


def tensors_by_group(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    optimizers: Optimizer | Sequence[Optimizer] = (),
) -> dict[str, FilterTensors]:
    """The same of several groups, by name."""
    tensors = {}
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            tensors[f"{prefix}.{name}" if prefix else name] = tensor
    return {group.name: _tensors_of(tensors, group, optimizers) for group in groups}


def _tensors_of(
    tensors: Mapping[str, Tensor | None],
    group: ChannelGroup,
    optimizers: Optimizer | Sequence[Optimizer],
) -> FilterTensors:
    parameters: dict[str, Rows] = {}
    buffers: dict[str, Rows] = {}
    state: dict[str, Rows] = {}
    silencers = tuple(entries.tensor for entries in group.silencers)
    for entries in group.members:
        tensor = tensors[entries.tensor]
        assert tensor is not None
        index = entries.index.to(tensor.device)
        rows = Rows(tensor, entries.dim, index, entries.are_in_order)
        if not isinstance(tensor, nn.Parameter) and entries.tensor not in silencers:
            buffers[entries.tensor] = rows
            continue
        parameters[entries.tensor] = rows
        for kind, value in _state_of(tensor, rows.dim, optimizers):
            state[f"{entries.tensor}:{kind}"] = replace(rows, tensor=value)
    writers = tuple(entries.tensor for entries in group.writers)
    return FilterTensors(parameters, buffers, state, silencers, writers)


def _state_of(
    parameter: Tensor, dim: int, optimizers: Optimizer | Sequence[Optimizer]
) -> Iterator[tuple[str, Tensor]]:
    """The optimisers' tensors of a parameter that lie along its dimension `dim` (Adam's step does not)."""
    for optimizer in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
        for kind, value in optimizer.state.get(parameter, {}).items():
            if lies_along(value, parameter.shape) and value.shape[dim] == parameter.shape[dim]:
                yield kind, value


def lies_along(value: Any, shape: Sequence[int]) -> bool:
    """Is it a tensor of a parameter's shape, or of size 1 where it does not vary (Adafactor's factors)?"""
    if not isinstance(value, Tensor) or value.ndim != len(shape):
        return False
    return all(size in (1, full) for size, full in zip(value.shape, shape, strict=True))


def optimizers_in(optimizer: Any) -> tuple[Optimizer, ...]:
    """An optimiser, or several, without the wrappers that hold one as `.optimizer`."""
    optimizers = []
    wrapped: Sequence[Any] = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
    for each in wrapped:
        while hasattr(each, "optimizer") and not isinstance(each, LRScheduler):
            each = each.optimizer
        if not isinstance(each, Optimizer):
            raise InputError(f"optimizer must be a torch optimizer, not {type(each).__name__}")
        optimizers.append(each)
    return tuple(optimizers)


@torch.no_grad()
def suspend_(tensors: FilterTensors, filters: Collection[int], earlier: Snapshot) -> Snapshot:
    """Eq. 4: silence filters; the snapshot says what they, and those suspended earlier, were: nothing is lost.

    The silencers become zero, so the contribution is exactly zero in training and in evaluation; the live
    optimiser state of the filters becomes zero.
    """
    if not filters:
        return earlier
    index = tensors.index(filters)
    saved = {}
    for name, rows in tensors.everything.items():
        saved[name] = rows.take(index)
        if earlier.filters:  # state that did not exist yet counts as zero
            zeros = saved[name].new_zeros(len(earlier.filters), *saved[name].shape[1:])
            saved[name] = torch.cat([earlier.rows.get(name, zeros), saved[name]])
    silence_(tensors, filters)
    return Snapshot((*earlier.filters, *filters), saved)


@torch.no_grad()
def restore_(tensors: FilterTensors, snapshot: Snapshot) -> None:
    """Eq. 6: give the snapshot's filters back exactly, optimiser state included."""
    index = tensors.index(snapshot.filters)
    for name, rows in tensors.everything.items():
        if name in snapshot.rows:
            rows.put_(index, snapshot.rows[name])
        else:
            rows.zero_(index)


@torch.no_grad()
def silence_(tensors: FilterTensors, filters: Collection[int]) -> None:
    """Zero the silencers of filters and their optimiser state; the rest of them stays."""
    index = tensors.index(filters)
    for rows in (
        *(tensors.parameters[name] for name in tensors.silencers),
        *tensors.state.values(),
    ):
        rows.zero_(index)


@torch.no_grad()
def freeze_(tensors: FilterTensors, filters: Collection[int]) -> None:
    """Eq. 7: zero filters for good: parameters and optimiser state."""
    index = tensors.index(filters)
    for rows in (*tensors.parameters.values(), *tensors.state.values()):
        rows.zero_(index)


def apply_(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: PrunePlan,
    optimizers: Optimizer | Sequence[Optimizer] = (),
) -> None:
    """Zero the plan's filters for good, whoever made the plan.

    Raises:
        InputError: the plan is of another network.
    """
    for group, part in plan.match(groups):
        freeze_(filter_tensors(model, group, optimizers), part.pruned)


class FilterMask:
    """Keeps the silencers of pruned filters at zero while the network trains; none is pruned before `set_`.

    Constants that silence filters are no part of the model's state: `set_` gives those of all other filters back.
    Its masks are changed in place only, so a training step that a CUDA graph has captured stays valid.
    """

    def __init__(self, tensors: Mapping[str, FilterTensors]) -> None:
        self._rows = {
            name: {silencer: group.parameters[silencer] for silencer in group.silencers}
            for name, group in tensors.items()
        }
        self._silencers = {
            name: rows.tensor for group in self._rows.values() for name, rows in group.items()
        }
        self._masks = {}
        for group in self._rows.values():
            for name, rows in group.items():
                shape = [1] * rows.tensor.ndim
                shape[rows.dim] = -1
                ones = torch.ones_like(rows.tensor.select(0, 0).flatten()[:1]).detach()
                self._masks[name] = ones.repeat(rows.tensor.shape[rows.dim]).view(shape)
        self._constants = {
            name: constant.clone()
            for group in tensors.values()
            for name, constant in group.constants.items()
        }

    @torch.no_grad()
    def set_(self, pruned: Mapping[str, Collection[int]]) -> None:
        """From now on these are pruned: the name of every group to indices."""
        for mask in self._masks.values():
            mask.fill_(1.0)
        for group, filters in pruned.items():
            if not filters:
                continue
            rows_by_name = self._rows[group]
            device = next(iter(rows_by_name.values())).index.device
            index = torch.tensor([*filters], dtype=torch.long, device=device)
            for name, rows in rows_by_name.items():
                self._masks[name].view(-1).index_fill_(0, rows.places(index), 0.0)
        for name, constant in self._constants.items():
            self._silencers[name].copy_(constant * self._masks[name])

    @torch.no_grad()
    def hold_(self, *_: object) -> None:
        """To be called after every optimiser step, with whatever its hooks are given."""
        torch._foreach_mul_([*self._silencers.values()], [*self._masks.values()])

    def fits(self, tensors: Mapping[str, FilterTensors]) -> bool:
        """Are its silencers still the network's own tensors, on the device of its masks?"""
        for group in tensors.values():
            for name in group.silencers:
                tensor = group.parameters[name].tensor
                if tensor is not self._silencers[name]:
                    return False
                if tensor.device != self._masks[name].device:
                    return False
        return True

    @torch.no_grad()
    def holds(self) -> bool:
        """Are the trained silencers of pruned filters zero?"""
        live = []
        for name, silencer in self._silencers.items():
            if isinstance(silencer, nn.Parameter):
                pruned = silencer.masked_fill(self._masks[name] != 0, 0.0)
                # Zero times a diverged value is no number, and no revival.
                live.append(pruned.nan_to_num().any())
        return not torch.stack(live).any()
