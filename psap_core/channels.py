"""What is known of a network's channels while it runs: ids, labels, and who owns, silences and reads them.

Beside a tensor stand its channels: one id for each, and a label that says which parameters silence it, if they are
zero. Operations pass ids on, join those that must live and die together, or fix those that cannot be pruned.
`tracer.py` follows the run, `operations.py` says what each torch operation does, `layouts.py` which numbers of the code
count channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from psap_core.sizes import Size

Role = Literal["writes", "passes", "reads"]
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


class Ledger:
    """What the calls of a run have said of its channels so far; the rules write it.

    Args:
        model: the network that runs.
        couple_sums: whether a sum joins the channels of its operands; otherwise it ends them.

    Attributes:
        slots: which channels own the entries of which tensor.
        reads: where channels are used up, in the order of the calls.
        silencers: what a label stands for.
        sums: the sums of two tensors.
        nodes: the calls.
        sizes: all sizes that were given to the network.
        computed: names of the modules that convolve or multiply with a weight that is no tensor of the network.
        used: tensors whose entries the present call has given to channels.
    """

    def __init__(self, model: nn.Module, *, couple_sums: bool) -> None:
        self.couple_sums = couple_sums
        self.slots: dict[SlotKey, Slot] = {}
        self.reads: list[Read] = []
        self.silencers: list[frozenset[SlotKey]] = [frozenset()]
        self.sums: list[Sum] = []
        self.nodes: list[Node] = []
        self.sizes: list[Size] = []
        self.computed: set[str] = set()
        self.used: set[str] = set()
        # The tensors are kept, because a network may replace them, and an id would be another's.
        self.tensors = dict(chain(model.named_parameters(), model.named_buffers()))
        self._names = {id(tensor): name for name, tensor in self.tensors.items()}
        self._channels = WeakTensorKeyDictionary()
        self._node_of = WeakTensorKeyDictionary()
        self._joined: list[tuple[Tensor, Tensor]] = []
        self._ids = 1

    # ------------------------------------------------------------------------ calls

    def add_node(
        self,
        results: Iterable[Tensor],
        parents: tuple[int, ...] = (),
        is_convolution: bool = False,
        keeps_channels: bool = False,
    ) -> int:
        """The call that made these tensors."""
        number = len(self.nodes)
        self.nodes.append(Node(parents, is_convolution, keeps_channels))
        for tensor in results:
            self._node_of[tensor] = number
        return number

    def node_of(self, tensor: Tensor) -> int | None:
        """The call that made a tensor, if it depends on the input."""
        node: int | None = self._node_of.get(tensor)
        return node

    # ------------------------------------------------------------------------ what is known of tensors

    def said_of(self, tensor: Tensor) -> Channels | Grid | Fixed | None:
        """What an operation has said of a tensor; of a parameter nothing, before it is used."""
        channels: Channels | Grid | Fixed | None = self._channels.get(tensor)
        return channels

    def known(self, tensor: Any) -> Channels | Grid | Fixed | None:
        """What lies along a tensor or parameter; a `Grid` where nothing has asked yet which of its axes shrinks."""
        if not isinstance(tensor, Tensor):
            return None
        channels = self.said_of(tensor)
        if channels is None and id(tensor) in self._names:
            channels = self._of_parameter(tensor)
        return channels

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
        self.used.add(name)
        ids = self.slots[key].ids
        own = self.label(frozenset({key})) if isinstance(tensor, nn.Parameter) else NO_LABEL
        return Channels(ids, torch.full_like(ids, own), dim)

    def keep_tensor(self, name: str) -> None:
        """Nothing goes from this parameter or buffer."""
        for dim, size in enumerate(self.tensors[name].shape):
            if size > 1:
                self.slot((name, dim), torch.full((size,), NO_ID), "reads")

    # ------------------------------------------------------------------------ what rules say

    def new_ids(self, count: int) -> Tensor:
        first = self._ids
        self._ids += count
        return torch.arange(first, first + count)

    def label(self, silencers: frozenset[SlotKey]) -> int:
        """The label of a set of slots: all of a channel's entries in them silence it."""
        if silencers not in self.silencers:
            self.silencers.append(silencers)
        return self.silencers.index(silencers)

    def union(self, labels: Sequence[Tensor]) -> Tensor:
        """Silent where all are: by everything that silences one of them; by nothing if one is never silent."""
        unions = labels[0]
        for others in labels[1:]:
            unions = self._pairwise(unions, others)
        return unions

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

    def slot(self, key: SlotKey, ids: Tensor, role: Role) -> None:
        """These channels own the entries of a tensor; called again, they are joined with the first call's."""
        self.used.add(key[0])
        slot = self.slots.get(key)
        if slot is None:
            self.slots[key] = Slot(ids, role, len(self.nodes))
        else:
            # What goes with a channel cannot stay whole where the channel's own norm is scattered.
            order = None if slot.role == "reads" else -1
            reason = f"{key[0]} is also used where channels are fixed"
            self.join(slot.ids, ids, reason, order)

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

    def components(self) -> Tensor:
        """int64 [ids]: ids that were joined so far have the same. The joins are then one for each id."""
        none = torch.zeros(0, dtype=torch.long)
        first = torch.cat([none, *(one for one, _ in self._joined)])
        second = torch.cat([none, *(other for _, other in self._joined)])
        component = connected_components(self._ids, first, second)
        joined = (component != torch.arange(self._ids)).nonzero().flatten()
        self._joined = [(joined, component[joined])]
        return component


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
