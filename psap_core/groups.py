"""Channel groups: the filters that can be pruned, all that goes with a filter, and why the rest is left alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from psap_core.channels import (
    NO_ID,
    NO_LABEL,
    UNREAD,
    Channels,
    Read,
    SlotKey,
)
from psap_core.errors import InputError
from psap_core.inputs import Example
from psap_core.tracer import ChannelTrace, trace_channels

Scope = Literal["coupled", "all", "inner"]
SCOPES: tuple[Scope, ...] = ("coupled", "all", "inner")


@dataclass(frozen=True, eq=False)
class Entries:
    """The entries of filters in one tensor of the network.

    Attributes:
        tensor: name of a parameter or buffer; or of a number, such as an InstanceNorm's num_features.
        dim: the dimension along which they lie.
        index: int64 [filters, n], on the CPU: the n entries of every filter.
    """

    tensor: str
    dim: int
    index: Tensor

    @property
    def module(self) -> str:
        return self.tensor.rpartition(".")[0]

    @cached_property
    def are_in_order(self) -> bool:
        """Has filter f one entry, the one at f?"""
        if self.index.shape[1] != 1:
            return False
        return torch.equal(self.index[:, 0], torch.arange(len(self.index)))


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Filters that touch the same modules in the same way, with all that lives and dies with a filter.

    Attributes:
        name: module path of the first convolution or linear layer that writes the channels.
        filters: number of filters O.
        writers: rows of every convolution or linear layer that writes the channels: what eq. 1 and 3 measure.
        members: all that goes with a filter: the writers' rows and biases, its entries in normalisations, depthwise
            and grouped convolutions and per-channel parameters, and its rows in constant weights (buffers).
        silencers: the members that make a filter contribute exactly nothing where they are zero.
        readers: columns of the convolutions and linear layers that read the channels; numbers that count them.
        scattered: the BatchNorm whose output keeps its full width when filters go, in scope `all`; None elsewhere.
    """

    name: str
    filters: int
    writers: tuple[Entries, ...]
    members: tuple[Entries, ...]
    silencers: tuple[Entries, ...]
    readers: tuple[Entries, ...]
    scattered: str | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that lose entries with a filter, readers left out."""
        return tuple(dict.fromkeys(entries.module for entries in self.members))


@dataclass(frozen=True)
class GroupSearch:
    """What the analysis found.

    Attributes:
        groups: in network order.
        left_alone: every convolution and linear layer of which some filters cannot be pruned, with the reason.
    """

    groups: tuple[ChannelGroup, ...]
    left_alone: dict[str, str]


def find_groups(
    model: nn.Module,
    example_input: Example,
    *,
    scope: Scope = "coupled",
    exclude: Collection[str] = (),
    zero_preserving: Collection[Any] = (),
    trained: Collection[str] | None = None,
) -> tuple[ChannelGroup, ...]:
    """The channel groups of a network, in network order; see `search_groups`."""
    return search_groups(
        model,
        example_input,
        scope=scope,
        exclude=exclude,
        zero_preserving=zero_preserving,
        trained=trained,
    ).groups


def search_groups(
    model: nn.Module,
    example_input: Example,
    *,
    scope: Scope = "coupled",
    exclude: Collection[str] = (),
    zero_preserving: Collection[Any] = (),
    trained: Collection[str] | None = None,
) -> GroupSearch:
    """The channel groups of a network, and why everything else is left alone.

    Args:
        model: any network that runs; it is left as it is.
        example_input: an input batch: a tensor, or a tuple or dictionary of what forward takes.
        scope: `coupled`: sums join channels; `all`: a sum ends them, what feeds one is scattered into its full width,
            projection shortcuts and hidden linear layers are left alone; `inner`: the same without what reaches a sum.
        exclude: names of modules, or of modules that hold them, whose filters are left alone.
        zero_preserving: torch operations and module classes that keep channels and map 0 to 0.
        trained: names of the parameters that are trained; None: those that require gradients.

    Raises:
        InputError: the scope is unknown, an excluded name is no module, or the network does not run on the example.
    """
    if scope not in SCOPES:
        raise InputError(f"scope must be coupled, all or inner, not {scope!r}")
    _check_exclusions(model, exclude)
    couples = scope == "coupled"
    trace = trace_channels(
        model, example_input, couple_sums=couples, zero_preserving=zero_preserving
    )
    facts = _Facts(trace)
    if not couples:
        for name in _projection_shortcuts(trace):
            facts.fix(trace.slots[name, 0].ids, "it is a projection shortcut")
    candidates = _form_groups(facts, facts.free(), facts.slots)
    if scope == "all":
        candidates += _scattered_groups(facts, model)
    parameters = dict(model.named_parameters())
    if trained is None:
        trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    untrained = {*parameters}.difference(trained)
    groups = []
    for components, group in candidates:
        why = _reason_against(group, exclude, untrained)
        if why is None and not couples and _is_linear(group, parameters):
            why = f"scope {scope} prunes filters of convolutions only"
        if why is None:
            groups.append(group)
        else:
            facts.leave_alone(components, why)
    ordered = sorted(groups, key=lambda group: facts.order_of(group))
    return GroupSearch(_with_unique_names(ordered), _left_alone(facts, ordered, model))


class _Facts:
    """What the trace says of every component of joined ids: a filter, if it can be pruned.

    Attributes:
        slots: the entries of tensors in the order of the calls, with the component of each entry.
        why: component to the reason why it is left alone.
    """

    def __init__(self, trace: ChannelTrace) -> None:
        self.trace = trace
        self.slots = {key: trace.component[slot.ids] for key, slot in trace.slots.items()}
        self.why: dict[int, str] = {}
        self._count = len(trace.component)
        self._reason = torch.full((self._count,), -1)  # number of the first read that fixes it
        self._unsilenced = torch.full((self._count,), -1)
        self._is_read = torch.zeros(self._count, dtype=torch.bool)
        self._is_hard = torch.zeros(self._count, dtype=torch.bool)
        for number, read in enumerate(trace.reads):
            self._see(number, read)

    def _see(self, number: int, read: Read) -> None:
        components = self.trace.component[read.ids]
        self._is_read[components[read.labels != UNREAD]] = True
        fresh = components[self._unsilenced[components] < 0]
        silent = read.labels[self._unsilenced[components] < 0] != NO_LABEL
        self._unsilenced[fresh[~silent]] = number
        if read.reason is not None:
            self._reason[components[self._reason[components] < 0]] = number

    def fix(self, ids: Tensor, why: str) -> None:
        """Leave these ids alone, whatever the scope."""
        self.leave_alone(self.trace.component[ids].unique(), why)

    def leave_alone(self, components: Tensor, why: str) -> None:
        self._is_hard[components] = True
        for component in components.tolist():
            self.why.setdefault(component, why)

    def free(self) -> Tensor:
        """Components that can be pruned whole: silent wherever they are read, and nothing fixes them."""
        return self._silent() & (self._reason < 0)

    def ended(self) -> Tensor:
        """Components that something fixes, but that are silent there: their output can be scattered."""
        return self._silent() & (self._reason >= 0)

    def _silent(self) -> Tensor:
        possible = self._is_read & (self._unsilenced < 0) & ~self._is_hard
        possible[NO_ID] = False
        return possible

    def fixed_until(self, order: int) -> Tensor:
        """Components that cannot go for a reason that lies before a call: bool [components]."""
        fixed = torch.zeros(self._count, dtype=torch.bool)
        for read in self.trace.reads:
            if read.reason is not None and read.order <= order:
                fixed[self.trace.component[read.ids]] = True
        return fixed

    def labels(self) -> Tensor:
        """Component to the one label that it has wherever it is read; NO_LABEL where there are several."""
        low = torch.full((self._count,), 2**62)
        high = torch.full((self._count,), -1)
        for read in self.trace.reads:
            is_read = read.labels != UNREAD
            components = self.trace.component[read.ids[is_read]]
            low.scatter_reduce_(0, components, read.labels[is_read], "amin")
            high.scatter_reduce_(0, components, read.labels[is_read], "amax")
        return torch.where(low == high, low, NO_LABEL)

    def reason(self, component: int) -> str:
        """Why a component is left alone."""
        if component in self.why:
            return self.why[component]
        if component == NO_ID:
            return "its channels are those of the input, or it has one filter"
        if self._reason[component] >= 0:
            return f"its channels cannot go: {self.trace.reads[self._reason[component]].reason}"
        if self._unsilenced[component] >= 0:
            where = self.trace.reads[self._unsilenced[component]].where
            return f"nothing silences its channels where {where} reads them"
        if not self._is_read[component]:
            return "nothing reads its channels"
        return "all its channels live and die together"

    def order_of(self, group: ChannelGroup) -> tuple[int, int]:
        writer = group.writers[0]
        slot = self.trace.slots[writer.tensor, writer.dim]
        return slot.order, int(writer.index[0, 0])


Candidate = tuple[Tensor, ChannelGroup]  # the components that are the filters, and the group


def _form_groups(
    facts: _Facts, possible: Tensor, slots: Mapping[SlotKey, Tensor], scattered: str | None = None
) -> list[Candidate]:
    """Groups of the possible components [components] that have entries in the same slots.

    A group has at least two filters and a writer.
    """
    reads = facts.trace.reads if scattered is None else ()  # behind a scatter nothing changes
    group_of, filter_of, sizes = _sort_components(facts.trace, possible, slots, reads)
    entries: list[dict[SlotKey, Entries]] = [{} for _ in sizes]
    for key, components in slots.items():
        for number, index in _indices(components, group_of, filter_of, sizes):
            entries[number][key] = Entries(*key, index)
    silencers = _silencers(facts.trace, group_of, len(sizes))
    groups = []
    for number, parts in enumerate(entries):
        components = (group_of == number).nonzero().flatten()
        group = _make_group(facts.trace, parts, silencers[number], scattered)
        groups.append((components, group))
    return groups


def _sort_components(
    trace: ChannelTrace,
    possible: Tensor,
    slots: Mapping[SlotKey, Tensor],
    reads: Sequence[Read],
) -> tuple[Tensor, Tensor, list[int]]:
    """Number of the group (-1: none) and of the filter in it for every component, and the groups' sizes.

    Components are of one group if they have equally many entries in the same slots and are read with the same labels.
    Filters are in the order of the rows of the group's first writer.
    """
    signature = torch.zeros(len(possible), dtype=torch.long)  # 64-bit hashes
    for number, components in enumerate(slots.values(), start=1):
        present, counts = components.unique(return_counts=True)
        signature[present] = _mix(signature[present], torch.tensor(number), counts)
    for number, read in enumerate(reads, start=1):
        labels = read.labels - UNREAD
        pairs = (trace.component[read.ids] * (len(trace.silencers) + 1) + labels).unique()
        present = pairs // (len(trace.silencers) + 1)
        hashes = _mix(torch.tensor(0), torch.tensor(number), pairs % (len(trace.silencers) + 1) + 1)
        signature.index_add_(0, present, hashes)
    row = torch.full((len(possible),), -1)
    for key, components in slots.items():
        if trace.slots[key].role == "writes":
            backwards = torch.arange(len(components)).flip(0)
            fresh = row[components.flip(0)] < 0  # the first of a component's rows is set last
            row[components.flip(0)[fresh]] = backwards[fresh]
    chosen = (possible & (row >= 0)).nonzero().flatten()
    chosen = chosen[row[chosen].argsort(stable=True)]
    _, group, sizes = signature[chosen].unique(return_inverse=True, return_counts=True)
    sizable = sizes[group] > 1
    _, group, sizes = group[sizable].unique(return_inverse=True, return_counts=True)
    by_group = group.argsort(stable=True)
    starts = sizes.cumsum(0) - sizes
    group_of = torch.full((len(possible),), -1)
    filter_of = torch.full((len(possible),), -1)
    ordered = chosen[sizable][by_group]
    group_of[ordered] = group[by_group]
    filter_of[ordered] = torch.arange(len(ordered)) - starts[group[by_group]]
    return group_of, filter_of, sizes.tolist()


def _mix(signature: Tensor, number: Tensor, value: Tensor) -> Tensor:
    """A 64-bit hash of what was hashed before, a number and a value; overflow wraps."""
    mixed = signature * 6364136223846793005 + number * 1442695040888963407
    return (mixed ^ (mixed >> 29)) * 7046029254386353131 + value * 2862933555777941757


def _indices(
    components: Tensor, group_of: Tensor, filter_of: Tensor, sizes: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    """Number of a group and int64 [filters, n], the entries of its filters, for every group with entries here."""
    places = (group_of[components] >= 0).nonzero().flatten()
    group = group_of[components[places]]
    filters = filter_of[components[places]]
    order = (group * (len(group_of) + 1) + filters).argsort(stable=True)
    numbers, counts = group[order].unique_consecutive(return_counts=True)
    for number, part in zip(numbers.tolist(), places[order].split(counts.tolist()), strict=True):
        yield number, part.view(sizes[number], -1)


def _silencers(trace: ChannelTrace, group_of: Tensor, groups: int) -> list[set[SlotKey]]:
    """For every group the slots that silence its filters wherever they are read."""
    labels = len(trace.silencers)
    silencers: list[set[SlotKey]] = [set() for _ in range(groups)]
    for read in trace.reads:
        group = group_of[trace.component[read.ids]]
        is_inside = (group >= 0) & (read.labels != UNREAD)
        pairs = (group * labels + read.labels)[is_inside].unique()
        for pair in pairs.tolist():
            silencers[pair // labels] |= trace.silencers[pair % labels]
    return silencers


def _make_group(
    trace: ChannelTrace,
    parts: Mapping[SlotKey, Entries],
    silencers: Collection[SlotKey],
    scattered: str | None,
) -> ChannelGroup:
    roles = {key: trace.slots[key].role for key in parts}
    writers = tuple(part for key, part in parts.items() if roles[key] == "writes")
    is_number = {key: key[0] not in trace.tensors for key in parts}
    members = [key for key in parts if roles[key] != "reads" and not is_number[key]]
    readers = tuple(part for key, part in parts.items() if key not in members)
    return ChannelGroup(
        name=writers[0].module,
        filters=len(writers[0].index),
        writers=writers,
        members=tuple(parts[key] for key in members),
        silencers=tuple(parts[key] for key in members if key in silencers),
        readers=readers,
        scattered=scattered,
    )


def _scattered_groups(facts: _Facts, model: nn.Module) -> list[Candidate]:
    """Scope `all`: convolution and BatchNorm shrink although their channels end in something that needs them all.

    Possible where one plain BatchNorm silences the channels of one convolution: its output is scattered into the full
    width, and nothing behind it changes.
    """
    trace = facts.trace
    labels = facts.labels()
    labels[~facts.ended()] = NO_LABEL
    writers = torch.zeros(len(labels), dtype=torch.long)
    for key, components in facts.slots.items():
        if trace.slots[key].role == "writes":
            writers[components.unique()] += 1
    labels[writers != 1] = NO_LABEL
    by_label: dict[int, dict[SlotKey, Tensor]] = {}
    for key, components in facts.slots.items():
        for label in labels[components].unique().tolist():
            by_label.setdefault(label, {})[key] = components
    groups = []
    for label, slots in by_label.items():
        norm = _plain_batch_norm(trace.silencers[label], model)
        if norm is not None:
            last = trace.slots[f"{norm}.weight", 0].order
            possible = (labels == label) & ~facts.fixed_until(last)
            before = {key: c for key, c in slots.items() if trace.slots[key].order <= last}
            groups += _form_groups(facts, possible, before, scattered=norm)
    return groups


def _plain_batch_norm(silencers: Collection[SlotKey], model: nn.Module) -> str | None:
    """The BatchNorm whose gamma and beta these are, if its forward does nothing else."""
    modules = {name.rpartition(".")[0] for name, _ in silencers}
    if len(modules) != 1 or len(silencers) != 2:
        return None
    name = modules.pop()
    module = model.get_submodule(name)
    is_torchs = type(module).forward.__module__.startswith(("torch.", "psap_core."))
    return name if isinstance(module, _BatchNorm) and is_torchs else None


def _projection_shortcuts(trace: ChannelTrace) -> list[str]:
    """Weights of convolutions beside which a longer branch, from the same input, runs to the same sum."""
    shortcuts = []
    for name, (source, node) in trace.convolutions.items():
        ids = trace.slots[name, 0].ids
        while trace.nodes[source].keeps_channels and len(trace.nodes[source].parents) == 1:
            source = trace.nodes[source].parents[0]
        others = _other_operands(trace, ids)
        if others and max(_convolutions_from(trace, source, node, others)) >= 2:
            shortcuts.append(name)
    return shortcuts


def _other_operands(trace: ChannelTrace, ids: Tensor) -> list[int]:
    """Nodes that are added to these channels."""
    nodes = []
    for total in trace.sums:
        holds = [
            isinstance(c, Channels) and bool((c.ids == ids[0]).any()) for c, _ in total.operands
        ]
        for mine, (_, node) in zip(reversed(holds), total.operands, strict=True):
            if mine and node is not None:
                nodes.append(node)
    return nodes


def _convolutions_from(
    trace: ChannelTrace, source: int, avoiding: int, ends: Sequence[int]
) -> list[int]:
    """The most convolutions on a way from `source` to each end that does not pass `avoiding`; 0 where there is none."""
    depth = {source: 0}
    for number in range(source + 1, max(ends) + 1):
        node = trace.nodes[number]
        reached = [depth[parent] for parent in node.parents if parent in depth]
        if reached and number != avoiding:
            depth[number] = max(reached) + node.is_convolution
    return [depth.get(end, 0) for end in ends]


def _check_exclusions(model: nn.Module, exclude: Collection[str]) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for excluded in exclude:
        if not any(_is_inside(name, excluded) for name in names):
            raise InputError(f"excluded {excluded!r} is no module of {type(model).__name__}")


def _is_inside(name: str, module: str) -> bool:
    """Is a module the named one or a part of it? A trailing dot makes no difference."""
    module = module.rstrip(".")
    return name == module or name.startswith(f"{module}.")


def _reason_against(
    group: ChannelGroup, exclude: Collection[str], untrained: Collection[str]
) -> str | None:
    for excluded in exclude:
        if any(_is_inside(name, excluded) for name in group.modules):
            return f"excluded ({excluded})"
    for member in group.members:
        if member.tensor in untrained:
            return f"{member.tensor} is frozen, or the optimizer does not train it"
    return None


def _is_linear(group: ChannelGroup, parameters: Mapping[str, Tensor]) -> bool:
    return all(parameters[writer.tensor].ndim == 2 for writer in group.writers)


def _with_unique_names(groups: Sequence[ChannelGroup]) -> tuple[ChannelGroup, ...]:
    """A convolution whose filters are of several groups names the second `conv:2`, and so on."""
    counts: Counter[str] = Counter()
    named = []
    for group in groups:
        counts[group.name] += 1
        if counts[group.name] > 1:
            group = replace(group, name=f"{group.name}:{counts[group.name]}")
        named.append(group)
    return tuple(named)


def _left_alone(facts: _Facts, groups: Sequence[ChannelGroup], model: nn.Module) -> dict[str, str]:
    """Every convolution and linear layer with filters in no group, and the reason of the first of them."""
    free: dict[SlotKey, Tensor] = {}
    for group in groups:
        for entries in group.members:
            key = (entries.tensor, entries.dim)
            mask = free.setdefault(key, torch.ones_like(facts.slots[key], dtype=torch.bool))
            mask[entries.index.flatten()] = False
    reasons = {}
    for key, components in facts.slots.items():
        module = key[0].rpartition(".")[0]
        if not key[0].endswith("weight") or facts.trace.slots[key].role == "reads":
            continue
        is_layer = facts.trace.slots[key].role == "writes" or _is_grouped(
            model.get_submodule(module)
        )
        rest = components[free.get(key, torch.ones_like(components, dtype=torch.bool))]
        if is_layer and len(rest):
            reasons[module] = facts.reason(int(rest[0]))
    for module in facts.trace.computed:
        reasons[module] = "its weight is computed"
    return reasons


def _is_grouped(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1
