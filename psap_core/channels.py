"""The dataflow analysis: every channel carries an id through one real run of the network.

The network runs once on its example input while a `TorchFunctionMode` sees every torch call with its real arguments.
Beside a tensor stand its channels: one id for each, and a label that says which parameters silence it, if they are
zero. Operations pass ids on, join those that must live and die together, or fix those that cannot be pruned. Control
flow, containers of inputs and outputs, in-place operations and shared modules need no special care, because the network
simply runs. `operations.py` says what each torch operation does to ids.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from psap_core.errors import InputError
from psap_core.inputs import Example, call, copy_network, map_tensors, tensors_in
from psap_core.sizes import COUNTS, Size, counted, sizes_in, track_attributes_

Role = Literal["writes", "passes", "reads"]
# Calls whose rules ask which channels a size counts; in any other one a size must stay what it is.
WITHOUT_RESULT = ("array", "numpy", "setitem", "tolist")  # that a rule follows all the same
SHAPED_BY_SIZES = ("view", "reshape", "unflatten", "expand", "split", "split_with_sizes", "narrow")
NO_ID = 0  # of entries that are no channel of the network: its input, padding, constants
NO_LABEL = 0  # of entries that nothing silences
UNREAD = -1  # in place of a label where channels are fixed without being read
SlotKey = tuple[str, int]  # name of a parameter, buffer or number, and a dimension of it


@dataclass(frozen=True)
class Channels:
    """The channels that lie along one dimension of a tensor.

    Attributes:
        ids: int64 [C], on the CPU; NO_ID where an entry is no channel.
        labels: int64 [C], which parameters make an entry exactly zero if they are zero; NO_LABEL: none do.
        dim: the dimension of the tensor, counted from the front.
    """

    ids: Tensor
    labels: Tensor
    dim: int


@dataclass(eq=False)
class Split:
    """What one view does that lays channels along several dimensions: one of these axes can shrink, the others cannot.

    Attributes:
        ids: int64 [sizes of the axes].
        source: int64 [n], the channels that were laid out.
        sizes: what the view says of every axis; None: what is left.
        can_shrink: for every axis whether its size follows when channels go, or can be made to.
        where: the operation and its module, for people.
        axis: the one that shrinks, once that is settled.
    """

    ids: Tensor
    source: Tensor
    sizes: tuple[int | None, ...]
    can_shrink: tuple[bool, ...]
    where: str
    axis: int | None = None


@dataclass(frozen=True, eq=False)
class Grid:
    """The channels of a tensor behind a `Split`, as long as nothing has asked which axis shrinks.

    Attributes:
        labels: int64 [sizes of the axes]; 1 where a single entry of an axis was taken.
        dims: the dimension of the tensor along which each axis lies; None where a single entry was taken.
    """

    split: Split
    labels: Tensor
    dims: tuple[int | None, ...]


@dataclass(frozen=True)
class Fixed:
    """The content of a tensor that no id describes: whatever meets it elementwise cannot be pruned."""

    reason: str


@dataclass
class Slot:
    """One dimension of a parameter or buffer, whose entries belong to channels.

    Attributes:
        ids: int64 [size of that dimension].
        role: `writes`: rows of a convolution or linear layer; `passes`: goes with the channel; `reads`: columns.
        order: place in the order of the calls.
    """

    ids: Tensor
    role: Role
    order: int


@dataclass(frozen=True)
class Read:
    """A place where channels are used up: by a reader, or by something that fixes them.

    Attributes:
        ids, labels: int64 [n].
        where: the operation and its module, for people.
        reason: why these channels cannot be pruned; None for a convolution or linear layer that reads them.
        order: place in the order of the calls; -1: what they are needed for is nowhere in it.
    """

    ids: Tensor
    labels: Tensor
    where: str
    reason: str | None
    order: int


@dataclass(frozen=True)
class Sum:
    """A sum of two tensors, for the question which convolution is a projection shortcut."""

    operands: tuple[tuple[Channels | Fixed | None, int | None], ...]  # with the node that made each


@dataclass
class ChannelTrace:
    """What one run said about a network's channels.

    Attributes:
        tensors: names of the network's parameters and buffers.
        slots: by tensor name and dimension.
        reads: in the order of the calls.
        silencers: what a label stands for: slots of parameters.
        component: int64 [ids]; ids that live and die together have the same.
        convolutions: name of the weight to (node of the input, node of the output), for plain convolutions.
        sums: the sums of two tensors.
        nodes: for every call the nodes it reads, and what it is.
    """

    tensors: frozenset[str]
    slots: dict[SlotKey, Slot]
    reads: list[Read]
    silencers: list[frozenset[SlotKey]]
    component: Tensor
    convolutions: dict[str, tuple[int, int]]
    sums: list[Sum]
    nodes: list[Node]


@dataclass(frozen=True)
class Node:
    """One call: the nodes it reads, whether it is a convolution, and whether it keeps its one input's channels."""

    parents: tuple[int, ...]
    is_convolution: bool
    keeps_channels: bool


@dataclass
class Call:
    """One torch call, as the rules in operations.py see it.

    Attributes:
        name: of the operation, without underscores: `add` for torch.add, Tensor.__iadd__ and Tensor.add_.
        method: the tensor's method or property that does the same.
        where: the operation and the module that calls it, for people.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    where: str
    order: int
    owner: nn.Module
    owner_name: str
    method: str
    keeps_channels: bool = field(default=False)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by its position or its name."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def first(self) -> Any:
        """The first argument, however it is given."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))


Rule = Callable[["Tracer", Call], None]


class Tracer(TorchFunctionMode):
    """Carries channels through the calls of a run; see the module's description.

    Args:
        model: the network that runs.
        couple_sums: whether a sum joins the channels of its operands; otherwise it ends them.
        zero_preserving: operations and module classes of the user's that keep channels and map 0 to 0.
        track_sizes: whether the sizes of tensors say which channels they count.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        couple_sums: bool,
        zero_preserving: Collection[Any] = (),
        track_sizes: bool = True,
    ) -> None:
        super().__init__()
        from psap_core.operations import RULES  # which imports this module

        self.rules: dict[str, Rule] = RULES
        self.couple_sums = couple_sums
        self.track_sizes = track_sizes
        self.sizes: list[Size] = []  # all that were given to the network
        self.zero_preserving = [*zero_preserving]
        self.slots: dict[SlotKey, Slot] = {}
        self.reads: list[Read] = []
        self.silencers: list[frozenset[SlotKey]] = [frozenset()]
        self.sums: list[Sum] = []
        self.convolutions: dict[str, tuple[int, int]] = {}
        self.nodes: list[Node] = []
        self._joined: list[tuple[Tensor, Tensor]] = []
        self._ids = 1
        # Kept, because a network may replace them, and an id would be another's.
        self._alive = dict(_tensors_of(model))
        self._names = {id(t): name for name, t in self._alive.items()}
        self._shapes = {name: t.shape for name, t in self._alive.items()}
        self._channels = WeakTensorKeyDictionary()
        self._node_of = WeakTensorKeyDictionary()
        self._modules: list[tuple[str, nn.Module]] = [("", model)]
        self._paused = 0
        self._used: set[str] = set()  # tensors whose entries the present call gave to channels

    # ------------------------------------------------------------------------ the run

    def run(self, model: nn.Module, example: Example) -> None:
        """Follow one forward pass; what the model returns is fixed."""
        for tensor in tensors_in(example):
            self._node_of[tensor] = self._node((), False, False)
        with torch.no_grad(), self._watching(model), self:
            output = call(model, example)
        returned = [*tensors_in(output)]
        if not returned:
            kind = type(output).__name__
            raise InputError(
                f"the model returns a {kind} in which no tensor is found: return tensors, containers of them or "
                "a dataclass"
            )
        for tensor in returned:
            self.fix(self.of(tensor), "the model returns them")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._paused:
            self._see_sizes(operation_name(func), args, kwargs)
            self._follow(func, args, kwargs, result)
        if self.track_sizes and isinstance(result, (torch.Size, int)):
            return self._tracked(operation_name(func), args, kwargs, result)
        return result

    def _see_sizes(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A size that is a factor, a width, a stride or a number in a tensor cannot follow channels."""
        if name in SHAPED_BY_SIZES:
            return
        if name.startswith("conv"):
            args, kwargs = args[:6], {k: v for k, v in kwargs.items() if k != "groups"}
        if name == "group_norm":
            args, kwargs = args[:1], {k: v for k, v in kwargs.items() if k != "num_groups"}
        for size in sizes_in((args, kwargs)):
            size.becomes_value()

    def _tracked(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Any:
        """A tensor's shape that says which channels it counts."""
        if name not in ("shape", "size") or args[0] not in self._channels:
            return result
        sizes = self.sizes_of(args[0])
        if isinstance(result, torch.Size):
            return torch.Size(sizes)
        dim = args[1] if len(args) > 1 else kwargs["dim"]
        return sizes[dim]

    def sizes_of(self, tensor: Tensor) -> list[int]:
        sizes: list[int] = [*tensor.shape]
        known = self._channels.get(tensor)
        if isinstance(known, Channels):
            sizes[known.dim] = self._seen(Size(sizes[known.dim], ids=known.ids))
        elif isinstance(known, Grid):
            for axis, dim in enumerate(known.dims):
                if dim is not None:
                    sizes[dim] = self._seen(Size(sizes[dim], axis=(known.split, axis)))
        return sizes

    def _seen(self, size: Size) -> Size:
        self.sizes.append(size)
        return size

    def _follow(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        name = operation_name(func)
        results = [*tensors_in(result)]
        if not results and name not in WITHOUT_RESULT:
            return
        operands = [*tensors_in((args, kwargs))]
        parents = tuple(self._node_of[t] for t in operands if t in self._node_of)
        if not parents and not any(self._is_known(tensor) for tensor in operands):
            return
        owner_name, owner = self._modules[-1]
        place = f"{name} in {owner_name}" if owner_name else name
        order = len(self.nodes)
        this = Call(name, args, kwargs, result, place, order, owner, owner_name, method_name(func))
        self._used = set()
        self._apply_rule(func, this)
        if any(result is not operands[0] for result in results):
            self._keep_other_parameters(operands)
        if not parents:
            return
        node = self._node(parents, name.startswith("conv"), this.keeps_channels)
        for tensor in results:
            self._node_of[tensor] = node
        if name.startswith("conv"):
            self._remember_convolution(this, parents[0], node)

    def _keep_other_parameters(self, operands: Sequence[Tensor]) -> None:
        """A weight that is used in a way that no rule knows, such as a tied one's transpose, stays what it is."""
        for operand in operands:
            name = self.name_of(operand)
            if name is not None and name not in self._used and operand not in self._channels:
                self.keep_tensor(name)

    def keep_tensor(self, name: str) -> None:
        """Nothing goes from this parameter or buffer."""
        for dim, size in enumerate(self._shapes[name]):
            if size > 1:
                self.slot((name, dim), torch.full((size,), NO_ID), "reads")

    def _is_known(self, tensor: Tensor) -> bool:
        return tensor in self._channels or id(tensor) in self._names

    def _apply_rule(self, func: Any, this: Call) -> None:
        from psap_core.elementwise import keep, unknown

        if func in self.zero_preserving:
            keep(self, this)
        else:
            self.rules.get(this.name, unknown)(self, this)

    def _remember_convolution(self, this: Call, source: int, node: int) -> None:
        weight = this.argument(1, "weight")
        name = self.name_of(weight)
        if name is not None and (name, 0) in self.slots:
            self.convolutions[name] = (source, node)

    def _node(self, parents: tuple[int, ...], is_convolution: bool, keeps_channels: bool) -> int:
        self.nodes.append(Node(parents, is_convolution, keeps_channels))
        return len(self.nodes) - 1

    def node_of(self, tensor: Tensor) -> int | None:
        """The call that made a tensor, if it depends on the input."""
        node: int | None = self._node_of.get(tensor)
        return node

    @contextmanager
    def _watching(self, model: nn.Module) -> Iterator[None]:
        """Know which module is running, and leave the inside of the user's zero-preserving classes alone."""
        kinds = tuple(kind for kind in self.zero_preserving if isinstance(kind, type))
        handles = []
        for name, module in model.named_modules():
            enter, leave = self._hooks(name, isinstance(module, kinds))
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._modules = self._modules[:1]
            self._paused = 0

    def _hooks(self, name: str, is_unit: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._modules.append((name, module))
            self._paused += is_unit

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._modules.pop()
            self._paused -= is_unit
            if is_unit and not self._paused:
                for tensor in tensors_in(output):
                    self.set(tensor, self.of(args[0]))

        return enter, leave

    # ------------------------------------------------------------------------ what is known of tensors

    def of(self, tensor: Any) -> Channels | Fixed | None:
        """What lies along a tensor's channels; None: nothing of the network's."""
        if not isinstance(tensor, Tensor):
            return None
        found = self.known(tensor)
        if isinstance(found, Grid):
            return self.settle(tensor, found, ())
        return found

    def known(self, tensor: Any) -> Channels | Grid | Fixed | None:
        """The same, as long as nothing has asked along which dimension the channels of a `Grid` lie."""
        if not isinstance(tensor, Tensor):
            return None
        found: Channels | Grid | Fixed | None = self._channels.get(tensor)
        if found is None and id(tensor) in self._names:
            found = self._of_parameter(tensor)
        return found

    def of_avoiding(self, tensor: Any, dims: Collection[int]) -> Channels | Fixed | None:
        """What lies along a tensor's channels, not along these dimensions if that can still be chosen."""
        found = self.known(tensor)
        return self.settle(tensor, found, dims) if isinstance(found, Grid) else self.of(tensor)

    def settle(self, tensor: Tensor, grid: Grid, avoiding: Collection[int]) -> Channels | Fixed:
        """Say which axis of a grid shrinks: the last that can and does not lie along dimensions to avoid."""
        split = grid.split
        if split.axis is None:
            possible = [axis for axis, can in enumerate(split.can_shrink) if can]
            wanted = [axis for axis in possible if grid.dims[axis] not in (None, *avoiding)]
            self._settle_axis(split, wanted or possible)
        assert split.axis is not None
        dim = grid.dims[split.axis]
        settled: Channels | Fixed
        if dim is None:
            reason = f"a part of them is taken by number behind {split.where}"
            self.fix_ids(split.ids.flatten(), grid.labels.expand_as(split.ids).flatten(), reason)
            settled = Fixed(reason)
        else:
            rows = grid.labels.movedim(split.axis, -1).flatten(0, -2).unique(dim=0)
            ids = split.ids.movedim(split.axis, -1).flatten(0, -2)[0]
            settled = Channels(ids, self.union(rows.unbind(0)), dim)
        self.set(tensor, settled)
        return settled

    def _settle_axis(self, split: Split, possible: Sequence[int]) -> None:
        """The last possible axis shrinks; where there is none, nothing does."""
        axis = possible[-1] if possible else len(split.sizes) - 1
        split.axis = axis
        rows = split.ids.movedim(axis, -1).flatten(0, -2)
        self.join(rows[:1].expand_as(rows), rows, f"they meet fixed channels in {split.where}")
        for other, size in enumerate(split.sizes):
            if other == axis:
                self.count(size, rows[0], split.source, split.where)
            else:
                self.hold(size, split.where, split.source)
        if not split.can_shrink[axis]:
            self.fix_ids(rows[0], None, f"their number is written in the code of {split.where}")

    def count(self, size: int | None, ids: Tensor, source: Tensor, where: str) -> None:
        """A size in a call that is to follow when channels go, and the channels that it counts.

        Args:
            size: None: it is what is left, and follows.
            ids: int64 [size].
            source: int64 [n], all channels of the call's operand.
        """
        if size is None or size == 1:
            return
        if not isinstance(size, Size):
            self.fix_ids(ids, None, f"their number is written in the code of {where}")
        elif size.attribute is not None:
            self.slot((size.attribute, 0), ids, "reads")
        elif size.ids is not None and not self._are_the_same(size.ids, ids):
            self.join(size.ids, ids, f"they are as many as fixed channels in {where}")
        elif size.axis is not None:
            self._count_axis(*size.axis, ids, where)
        elif size.ids is None and not self._follows(size, source, where):
            self.fix_ids(ids, None, f"their number is computed from something else in {where}")
            self.hold(size, where)

    def _are_the_same(self, ids: Tensor, others: Tensor) -> bool:
        """Are these the same channels in another order, such as behind a shuffle?"""
        component = self._components()
        return torch.equal(component[ids].sort().values, component[others].sort().values)

    def _components(self) -> Tensor:
        """int64 [ids]: ids that were joined so far have the same. The joins are then one for each id."""
        none = torch.zeros(0, dtype=torch.long)
        first = torch.cat([none, *(one for one, _ in self._joined)])
        second = torch.cat([none, *(other for _, other in self._joined)])
        component = connected_components(self._ids, first, second)
        joined = (component != torch.arange(self._ids)).nonzero().flatten()
        self._joined = [(joined, component[joined])]
        return component

    def hold(self, size: int | None, where: str, source: Tensor | None = None) -> None:
        """A size in a call that is to stay what it is when channels go; one that is computed from `source` does not."""
        if not isinstance(size, Size) or size == 1:
            return
        if source is not None and self._follows(size, source, where):
            return
        for part in size.sources or (size,):
            self._keep_size(part, f"their number shapes something else in {where}")

    def _keep_size(self, size: Size, reason: str) -> None:
        if size.attribute is not None:
            self.slot((size.attribute, 0), torch.full((int(size),), NO_ID), "reads")
        elif size.ids is not None:
            self.fix_ids(size.ids, None, reason, order=-1)
        elif size.axis is not None:
            split, axis = size.axis
            split.can_shrink = tuple(
                can and other != axis for other, can in enumerate(split.can_shrink)
            )
            if split.axis == axis:
                self.fix_ids(split.ids.flatten(), None, reason, order=-1)

    def _keep_counted(self, size: Size, reason: str) -> None:
        """An attribute that surgery would make fit: the tensors of its module keep as many entries."""
        owner, _, key = (size.attribute or "").rpartition(".")
        if key not in COUNTS:
            return
        for (name, _), slot in self.slots.items():
            if name.rpartition(".")[0] == owner and len(slot.ids) == size:
                self.fix_ids(slot.ids, None, reason, order=-1)

    def _count_axis(self, split: Split, axis: int, ids: Tensor, where: str) -> None:
        """As many entries as an axis of a split has: they go with it, if it is the one that shrinks."""
        if split.axis is None:
            self._settle_axis(split, [axis for axis, can in enumerate(split.can_shrink) if can])
        along = split.ids.movedim(axis, -1).flatten(0, -2)[0]
        if split.axis == axis:
            self.join(along, ids, f"they are as many as fixed channels in {where}")
        else:
            self.fix_ids(ids, None, f"their number is that of something else in {where}")

    def _follows(self, size: Size, source: Tensor, where: str) -> bool:
        """Does a size that was computed from the number of channels follow when some of `source` go?"""
        found = counted(size, len(source))
        for ids in found:
            self.join(ids, source, f"they are as many as fixed channels in {where}")
        return bool(found)

    def union(self, labels: Sequence[Tensor]) -> Tensor:
        """Silent where all are: by everything that silences one of them; by nothing if one is never silent."""
        together = labels[0]
        for others in labels[1:]:
            together = self._pairwise(together, others)
        return together

    def _pairwise(self, labels: Tensor, others: Tensor) -> Tensor:
        if torch.equal(labels, others):
            return labels
        pairs, place = torch.stack([labels, others]).unique(dim=1, return_inverse=True)
        unions = []
        for label, other in pairs.T.tolist():
            if NO_LABEL in (label, other):
                unions.append(NO_LABEL)
            else:
                unions.append(self.label(self.silencers[label] | self.silencers[other]))
        return torch.tensor(unions, dtype=torch.long)[place]

    def set(self, tensor: Tensor, channels: Channels | Grid | Fixed | None) -> None:
        if channels is None:
            self._channels.pop(tensor, None)
        else:
            self._channels[tensor] = channels

    def name_of(self, tensor: Any) -> str | None:
        """The name of a parameter or buffer of the network; None for any other tensor."""
        return self._names.get(id(tensor))

    def _of_parameter(self, tensor: Tensor) -> Channels | None:
        """A parameter with one dimension of several entries has a channel for each: layer scale, PReLU."""
        long = [d for d, size in enumerate(tensor.shape) if size > 1]
        if len(long) != 1:
            return None
        channels = self.entries_of(tensor, self._names[id(tensor)], long[0])
        self._channels[tensor] = channels
        return channels

    def entries_of(self, tensor: Tensor, name: str, dim: int) -> Channels:
        """The entries of a parameter or buffer along one dimension, a channel each, which a parameter silences."""
        key = (name, dim)
        if key not in self.slots:
            self.slot(key, self.new_ids(tensor.shape[dim]), "passes")
        self._used.add(name)
        ids = self.slots[key].ids
        own = self.label(frozenset({key})) if isinstance(tensor, nn.Parameter) else NO_LABEL
        return Channels(ids, torch.full_like(ids, own), dim)

    # ------------------------------------------------------------------------ what rules may do

    def new_ids(self, count: int) -> Tensor:
        first = self._ids
        self._ids += count
        return torch.arange(first, first + count)

    def label(self, silencers: frozenset[SlotKey]) -> int:
        """The label of a set of slots: all of a channel's entries in them silence it."""
        if silencers not in self.silencers:
            self.silencers.append(silencers)
        return self.silencers.index(silencers)

    def slot(self, key: SlotKey, ids: Tensor, role: Role) -> None:
        """These channels own the entries of a tensor; called again, they are joined with the first call's."""
        self._used.add(key[0])
        known = self.slots.get(key)
        if known is None:
            self.slots[key] = Slot(ids, role, len(self.nodes))
        else:
            # What goes with a channel cannot stay whole where the channel's own norm is scattered.
            order = None if known.role == "reads" else -1
            reason = f"{key[0]} is also used where channels are fixed"
            self.join(known.ids, ids, reason, order)

    def join(self, ids: Tensor, others: Tensor, reason: str, order: int | None = None) -> None:
        """Channels that live and die together, place by place; where one side is none, the other is fixed."""
        alone = torch.cat([ids[others == NO_ID], others[ids == NO_ID]])
        self.fix_ids(alone, None, reason, order)
        different = (ids != others) & (ids != NO_ID) & (others != NO_ID)
        if different.any():
            self._joined.append((ids[different], others[different]))

    def read(self, channels: Channels, where: str) -> None:
        """A convolution or linear layer reads these channels."""
        self.reads.append(Read(channels.ids, channels.labels, where, None, len(self.nodes)))

    def fix(self, channels: Channels | Fixed | None, reason: str) -> None:
        """These channels reach something that does not let them be pruned."""
        if isinstance(channels, Channels):
            self.fix_ids(channels.ids, channels.labels, reason)

    def fix_ids(
        self, ids: Tensor, labels: Tensor | None, reason: str, order: int | None = None
    ) -> None:
        """The same, by ids; labels None: nothing reads them here, but they cannot go."""
        order = len(self.nodes) if order is None else order
        if labels is None:
            labels = torch.full_like(ids, UNREAD)
        real = ids != NO_ID
        if real.any():
            self.reads.append(Read(ids[real], labels[real], reason, reason, order))

    def finish(self) -> ChannelTrace:
        """What all runs said together."""
        for size in self.sizes:
            if size.is_value:
                reason = "something is calculated with their number"
                self._keep_size(size, reason)
                self._keep_counted(size, reason)
        component = self._components()
        return ChannelTrace(
            frozenset(self._names.values()),
            self.slots,
            self.reads,
            self.silencers,
            component,
            self.convolutions,
            self.sums,
            self.nodes,
        )


def trace_channels(
    model: nn.Module, example: Example, *, couple_sums: bool, zero_preserving: Collection[Any] = ()
) -> ChannelTrace:
    """Run a copy of the network, in evaluation mode and, where it accepts that, in training mode.

    Args:
        model: any network that runs; it is left as it is.
        example: an input batch: a tensor, or a tuple or dictionary of what forward takes.
        couple_sums: whether a sum joins the channels of its operands (scope `coupled`) or ends them.
        zero_preserving: torch operations and module classes that keep channels and map 0 to 0.

    Raises:
        InputError: the network cannot be copied or does not run on the example.
    """
    _check_zero_preserving(zero_preserving)
    _check_modules(model)
    for track_sizes in (True, False):
        network = copy_network(model).eval()
        attributes: list[Size] = []
        if track_sizes:
            attributes = track_attributes_(network)
        tracer = Tracer(
            network,
            couple_sums=couple_sums,
            zero_preserving=zero_preserving,
            track_sizes=track_sizes,
        )
        tracer.sizes += attributes
        try:
            tracer.run(network, example)
        except InputError:
            raise
        except Exception as error:
            if track_sizes:  # compiled code may refuse a number that is more than a number
                continue
            raise InputError(
                f"{type(model).__name__} does not run on example_input ({_shapes(example)}): {_reason(error)}"
            ) from error
        break
    _run_in_training_mode(tracer, network, example)
    return tracer.finish()


def _run_in_training_mode(tracer: Tracer, network: nn.Module, example: Example) -> None:
    """Heads that exist in training only; BatchNorm needs more than one value, so two inputs are tried first."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # it waits for the other processes
    with torch.random.fork_rng(devices=[]):
        for batch in (map_tensors(example, _twice), example):
            known = dict(tracer.convolutions)
            try:
                tracer.run(network, batch)
            except Exception:  # what runs in evaluation only is analysed in evaluation only
                tracer.convolutions = known
                continue
            return


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.ndim else tensor


def method_name(func: Any) -> str:
    """The tensor's method or property that does the same, not in place."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":
        name = str(func.__self__.__name__)
    return name if name.endswith("__") else name.rstrip("_")


def operation_name(func: Any) -> str:
    """`add` for torch.add, Tensor.add_, Tensor.__iadd__ and Tensor.__radd__; of a property its own name."""
    name = method_name(func)
    in_place = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    name = name.strip("_").lower()
    return name[1:] if in_place else name


def connected_components(nodes: int, first: Tensor, second: Tensor) -> Tensor:
    """For each of `nodes` nodes the smallest node it is connected with: int64 [nodes].

    Args:
        first, second: int64 [edges], the two ends of every edge.
    """
    smallest = torch.arange(nodes)
    while True:
        lower = torch.minimum(smallest[first], smallest[second])
        hooked = smallest.scatter_reduce(0, smallest[first], lower, "amin")
        hooked = hooked.scatter_reduce(0, smallest[second], lower, "amin")
        hooked = hooked[hooked]
        if torch.equal(hooked, smallest):
            return smallest
        smallest = hooked


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def _check_zero_preserving(operations: Collection[Any]) -> None:
    if isinstance(operations, str) or not isinstance(operations, Collection):
        raise InputError(f"zero_preserving must be a list of operations, not {operations!r}")
    for operation in operations:
        if isinstance(operation, nn.Module) or not callable(operation):
            raise InputError(
                f"zero_preserving takes torch operations and module classes, not {operation!r}"
            )
        module = str(getattr(operation, "__module__", ""))
        plain = type(operation).__name__ == "function" and not hasattr(operation, "__wrapped__")
        if plain and not module.startswith("torch"):
            raise InputError(
                f"zero_preserving: calls of {operation.__name__} cannot be seen: "
                "decorate it with torch.overrides.wrap_torch_function, or give a module class"
            )


def _check_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{name or 'the model'} is a ScriptModule, whose inside cannot be seen: give the module it was made of"
            )
        own = [*module._parameters.values(), *module._buffers.values()]
        if any(is_lazy(tensor) for tensor in own):
            raise InputError(f"{name or 'the model'} has no weights yet: run the model once first")


def _shapes(example: Example) -> str:
    return ", ".join(str([*tensor.shape]) for tensor in tensors_in(example)) or "no tensor"


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


__all__: Sequence[str] = ("ChannelTrace", "Channels", "Fixed", "Read", "Slot", "trace_channels")
