"""What of a network can be pruned, what is left alone, and why."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from psap_core.cost import CostModel, layer_table
from psap_core.groups import GroupSearch
from psap_core.inputs import Example

SMALLEST_SHARE = 0.001  # of the MACs, that is worth a reason


@dataclass(frozen=True)
class GroupRow:
    """A channel group.

    Attributes:
        name: that of the first layer that writes its channels.
        members: modules that lose entries with a filter.
        filters: their number.
        macs_share: of the network's MACs, what would go with all filters; what two groups share counts for both.
    """

    name: str
    members: tuple[str, ...]
    filters: int
    macs_share: float


@dataclass(frozen=True)
class LeftAlone:
    """A convolution or linear layer of which some filters cannot be pruned.

    Attributes:
        name: path of the module in the network.
        reason: why, in one clause.
        macs_share: of the network's MACs.
    """

    name: str
    reason: str
    macs_share: float


@dataclass(frozen=True)
class Report:
    """What can be pruned of a network, and what cannot; `print(report)` gives a table.

    Attributes:
        network: name of its class.
        groups: its channel groups, in network order.
        left_alone: layers of which some filters cannot be pruned.
        largest_macs_cut: share of the MACs that can go at most; the minimum filters stay.
    """

    network: str
    groups: tuple[GroupRow, ...]
    left_alone: tuple[LeftAlone, ...]
    largest_macs_cut: float

    def costliest(self, count: int = 3) -> str:
        """Why the MACs that cannot be cut remain: the reasons that cost most, in one line."""
        shares = defaultdict[str, float](float)
        for layer in self.left_alone:
            shares[layer.reason] += layer.macs_share
        parts = []
        for reason, share in sorted(shares.items(), key=lambda item: -item[1])[:count]:
            if share >= SMALLEST_SHARE:
                parts.append(f"{share:.1%} of the MACs are left alone: {reason}")
        if self.groups:
            parts.append("min_filters and min_filter_share keep the rest")
        return "; ".join(parts)

    def __str__(self) -> str:
        rows = [["group", "filters", "MACs", "goes with a filter"]]
        for group in self.groups:
            members = ", ".join(group.members)
            rows.append([group.name, str(group.filters), f"{group.macs_share:.1%}", members])
        lines = _table(rows)
        if self.left_alone:
            alone = [["left alone", "MACs", "because"]]
            alone += [[x.name, f"{x.macs_share:.1%}", x.reason] for x in self.left_alone]
            lines += ["", *_table(alone)]
        head = f"{self.network}: up to {self.largest_macs_cut:.1%} of the MACs can be cut"
        return "\n".join([head, "", *lines])


def make_report(
    model: nn.Module,
    search: GroupSearch,
    cost: CostModel,
    floors: Sequence[int],
    example_input: Example,
) -> Report:
    """The report on a search; `cost` and `floors` are over its groups."""
    dense = max(1, cost.dense)
    share = {row.name: row.macs / dense for row in layer_table(model, example_input)}
    full = [*cost.filters]
    groups = []
    for l, group in enumerate(search.groups):
        without = cost.cost([*full[:l], 0, *full[l + 1 :]])
        groups.append(GroupRow(group.name, group.modules, group.filters, 1 - without / dense))
    alone = [LeftAlone(name, why, share.get(name, 0.0)) for name, why in search.left_alone.items()]
    return Report(type(model).__name__, tuple(groups), tuple(alone), 1 - cost.cost(floors) / dense)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]).rstrip())
    return lines
