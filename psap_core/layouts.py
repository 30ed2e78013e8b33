"""Views that lay channels along several dimensions, and the numbers in the code that count channels.

A view such as `x.view(n, heads, -1, h, w)` leaves open which of its axes shrinks when channels go. It stands as a
`Grid` until an operation asks; the first that does settles it for all. `count` says of a number that it follows, `hold`
that it stays.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from psap_core.channels import NO_ID, Channels, Fixed, Grid, Ledger, Split
from psap_core.sizes import COUNTS, Size, counted


def of(ledger: Ledger, tensor: Any) -> Channels | Fixed | None:
    """What lies along a tensor's channels; None: nothing of the network's."""
    if not isinstance(tensor, Tensor):
        return None
    channels = ledger.known(tensor)
    if isinstance(channels, Grid):
        return settle(ledger, tensor, channels, ())
    return channels


def of_avoiding(ledger: Ledger, tensor: Tensor, dims: Collection[int]) -> Channels | Fixed | None:
    """What lies along a tensor's channels, not along these dimensions if that can still be chosen."""
    channels = ledger.known(tensor)
    if isinstance(channels, Grid):
        return settle(ledger, tensor, channels, dims)
    return channels


def settle(
    ledger: Ledger, tensor: Tensor, grid: Grid, avoiding: Collection[int]
) -> Channels | Fixed:
    """Say which axis of a grid shrinks: the last that can and does not lie along dimensions to avoid."""
    split = grid.split
    if split.axis is None:
        possible = [axis for axis, can in enumerate(split.can_shrink) if can]
        wanted = [axis for axis in possible if grid.dims[axis] not in (None, *avoiding)]
        _settle_axis(ledger, split, wanted or possible)
    assert split.axis is not None
    dim = grid.dims[split.axis]
    channels: Channels | Fixed
    if dim is None:
        reason = f"a part of them is taken by number behind {split.where}"
        ledger.fix_ids(split.ids.flatten(), grid.labels.expand_as(split.ids).flatten(), reason)
        channels = Fixed(reason)
    else:
        rows = grid.labels.movedim(split.axis, -1).flatten(0, -2).unique(dim=0)
        ids = split.ids.movedim(split.axis, -1).flatten(0, -2)[0]
        channels = Channels(ids, ledger.union(rows.unbind(0)), dim)
    ledger.set(tensor, channels)
    return channels


def _settle_axis(ledger: Ledger, split: Split, possible: Sequence[int]) -> None:
    """The last possible axis shrinks; where there is none, nothing does."""
    axis = possible[-1] if possible else len(split.sizes) - 1
    split.axis = axis
    rows = split.ids.movedim(axis, -1).flatten(0, -2)
    ledger.join(rows[:1].expand_as(rows), rows, f"they meet fixed channels in {split.where}")
    for other, size in enumerate(split.sizes):
        if other == axis:
            count(ledger, size, rows[0], split.source, split.where)
        else:
            hold(ledger, size, split.where, split.source)
    if not split.can_shrink[axis]:
        ledger.fix_ids(rows[0], None, f"their number is written in the code of {split.where}")


def sizes_of(ledger: Ledger, tensor: Tensor) -> list[int]:
    """A tensor's shape, in which the numbers of channels say what they count."""
    sizes: list[int] = [*tensor.shape]
    channels = ledger.said_of(tensor)
    if isinstance(channels, Channels):
        sizes[channels.dim] = Size(sizes[channels.dim], ids=channels.ids)
    elif isinstance(channels, Grid):
        for axis, dim in enumerate(channels.dims):
            if dim is not None:
                sizes[dim] = Size(sizes[dim], axis=(channels.split, axis))
    ledger.sizes += [size for size in sizes if isinstance(size, Size)]
    return sizes


def count(ledger: Ledger, size: int | None, ids: Tensor, source: Tensor, where: str) -> None:
    """A size in a call that is to follow when channels go, and the channels that it counts.

    Args:
        size: None: it is what is left, and follows.
        ids: int64 [size].
        source: int64 [n], all channels of the call's operand.
    """
    if size is None or size == 1:
        return
    if not isinstance(size, Size):
        ledger.fix_ids(ids, None, f"their number is written in the code of {where}")
    elif size.attribute is not None:
        ledger.slot((size.attribute, 0), ids, "reads")
    elif size.ids is not None and not _are_the_same(ledger, size.ids, ids):
        ledger.join(size.ids, ids, f"they are as many as fixed channels in {where}")
    elif size.axis is not None:
        _count_axis(ledger, *size.axis, ids, where)
    elif size.ids is None and not _follows(ledger, size, source, where):
        ledger.fix_ids(ids, None, f"their number is computed from something else in {where}")
        hold(ledger, size, where)


def _count_axis(ledger: Ledger, split: Split, axis: int, ids: Tensor, where: str) -> None:
    """As many entries as an axis of a split has: they go with it, if it is the one that shrinks."""
    if split.axis is None:
        _settle_axis(ledger, split, [axis for axis, can in enumerate(split.can_shrink) if can])
    along = split.ids.movedim(axis, -1).flatten(0, -2)[0]
    if split.axis == axis:
        ledger.join(along, ids, f"they are as many as fixed channels in {where}")
    else:
        ledger.fix_ids(ids, None, f"their number is that of something else in {where}")


def _are_the_same(ledger: Ledger, ids: Tensor, others: Tensor) -> bool:
    """Are these the same channels in another order, such as behind a shuffle?"""
    component = ledger.components()
    return torch.equal(component[ids].sort().values, component[others].sort().values)


def hold(ledger: Ledger, size: int | None, where: str, source: Tensor | None = None) -> None:
    """A size in a call that is to stay what it is when channels go; one that is computed from `source` does not."""
    if not isinstance(size, Size) or size == 1:
        return
    if source is not None and _follows(ledger, size, source, where):
        return
    for part in size.sources or (size,):
        _keep_size(ledger, part, f"their number shapes something else in {where}")


def _keep_size(ledger: Ledger, size: Size, reason: str) -> None:
    if size.attribute is not None:
        ledger.slot((size.attribute, 0), torch.full((operator.index(size),), NO_ID), "reads")
    elif size.ids is not None:
        ledger.fix_ids(size.ids, None, reason, order=-1)
    elif size.axis is not None:
        split, axis = size.axis
        split.can_shrink = tuple(
            can and other != axis for other, can in enumerate(split.can_shrink)
        )
        if split.axis == axis:
            ledger.fix_ids(split.ids.flatten(), None, reason, order=-1)


def _follows(ledger: Ledger, size: Size, source: Tensor, where: str) -> bool:
    """Does a size that was computed from the number of channels follow when some of `source` go?"""
    counterparts = counted(size, len(source))
    for ids in counterparts:
        ledger.join(ids, source, f"they are as many as fixed channels in {where}")
    return bool(counterparts)


def _keep_counted(ledger: Ledger, size: Size, reason: str) -> None:
    """An attribute that surgery would make fit: the tensors of its module keep as many entries."""
    owner, _, key = (size.attribute or "").rpartition(".")
    if key not in COUNTS:
        return
    for (name, _), slot in ledger.slots.items():
        if name.rpartition(".")[0] == owner and len(slot.ids) == size:
            ledger.fix_ids(slot.ids, None, reason, order=-1)


def keep_values(ledger: Ledger) -> None:
    """Sizes with which something was calculated stay what they are."""
    reason = "something is calculated with their number"
    for size in ledger.sizes:
        if size.is_value:
            _keep_size(ledger, size, reason)
            _keep_counted(ledger, size, reason)
