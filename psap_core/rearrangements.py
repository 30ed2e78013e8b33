"""What views, splits, concatenations and other rearrangements do to the channels that lie along their operands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from psap_core.channels import NO_ID, NO_LABEL, Call, Channels, Fixed, Grid, Ledger, Split
from psap_core.elementwise import (
    elementwise,
    first_known,
    keep,
    keep_ids,
    laid_out,
    same,
    union,
    unknown,
)
from psap_core.inputs import map_tensors, tensors_in
from psap_core.layouts import count, hold, of, sizes_of
from psap_core.sizes import Size, counted

BY_NUMBERS = ("repeat_interleave",)  # that may say of every channel how often it is there


def rearrange(ledger: Ledger, call: Call) -> None:
    """The same operation on the places of the channels; where they then vary along several dimensions, one shrinks."""
    source = call.first
    if any(isinstance(argument, Tensor) for argument in call.args[1:]) and call.name in BY_NUMBERS:
        unknown(ledger, call)
        return
    sizes = _sizes_asked(ledger, call)
    if not sizes and _moves_grid(ledger, call):
        return
    channels = of(ledger, source)
    if not isinstance(channels, Channels):
        same(ledger, call, silent=True)
        for size in sizes:
            hold(ledger, size, call.where)
        return
    call.keeps_channels = call.result.ndim == 2 or call.result.shape == source.shape
    places = _moved(source, channels, call)
    varying = [d for d in range(places.ndim) if _varies(places, d)]
    if not varying:
        unknown(ledger, call)  # a single channel, of which nobody knows where it lies
        return
    _set_along(ledger, call, channels, places, varying, sizes or [None] * places.ndim)


def _set_along(
    ledger: Ledger,
    call: Call,
    channels: Channels,
    places: Tensor,
    varying: Sequence[int],
    sizes: Sequence[int | None],
) -> None:
    """What lies along a view's result.

    Args:
        places: numbers of the operand's channels, in the result's shape.
        varying: the dimensions along which they vary.
        sizes: what the view says of every dimension.
    """
    for d, size in enumerate(sizes):
        if d not in varying:
            hold(ledger, size, call.where)
    if len(varying) == 1:
        vector = _vector(places, varying[0])
        ids, labels = channels.ids[vector], channels.labels[vector]
        count(ledger, sizes[varying[0]], ids, channels.ids, call.where)
        ledger.set(call.result, Channels(ids, labels, varying[0]))
        return
    for d in reversed(range(places.ndim)):
        if d not in varying:
            places = places.select(d, 0)
    axis_sizes = tuple(sizes[d] for d in varying)
    can_shrink = tuple(_can_shrink(size, channels) for size in axis_sizes)
    split = Split(channels.ids[places], channels.ids, axis_sizes, can_shrink, call.where)
    ledger.set(call.result, Grid(split, channels.labels[places], tuple(varying)))


def _sizes_asked(ledger: Ledger, call: Call) -> list[int | None]:
    """What a view says of every dimension of its result; None: what is left. Empty for other operations."""
    if call.name in ("view_as", "reshape_as", "expand_as"):
        return [*sizes_of(ledger, call.argument(1, "other"))]
    if call.name not in ("view", "reshape", "unflatten", "expand"):
        return []
    arguments = [*call.args[1:], *call.kwargs.values()]
    before, after = 0, 0
    if call.name == "unflatten":
        before = arguments.pop(0) % call.first.ndim
        after = call.first.ndim - 1 - before
    if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
        arguments = [*arguments[0]]
    if not all(isinstance(size, int) for size in arguments):
        return []
    sizes = [None if size == -1 else size for size in arguments]
    return [*[None] * before, *sizes, *[None] * after]


def _can_shrink(size: int | None, channels: Channels) -> bool:
    """Does this size follow when channels go, or can it be made to?"""
    if size is None:
        return True
    if not isinstance(size, Size):
        return False
    return not size.sources or bool(counted(size, len(channels.ids)))


def _moves_grid(ledger: Ledger, call: Call) -> bool:
    """Pass a grid on, where that can be left open."""
    grid = ledger.known(call.first)
    grids = _moved_grid(call.first, grid, call) if isinstance(grid, Grid) else None
    if grids is None:
        return False
    for result, part in zip(tensors_in(call.result), grids, strict=True):
        ledger.set(result, part)
    return True


def _moved_grid(source: Tensor, grid: Grid, call: Call) -> list[Grid] | None:
    """The grids of a call's results if every axis still lies along one dimension, or one entry of it was taken."""
    lies = [axis for axis, dim in enumerate(grid.dims) if dim is not None]
    results: list[Grid] | None = None
    for axis in lies:
        dim, size = grid.dims[axis], grid.split.ids.shape[axis]
        assert dim is not None
        whole = Channels(torch.arange(size), torch.zeros(size, dtype=torch.long), dim)
        places = _moved(source, whole, call)
        parts = [places] if isinstance(places, Tensor) else [*places]
        results = results or [grid] * len(parts)
        for number, part in enumerate(parts):
            result = _moved_axis(results[number], axis, part)
            if result is None:
                return None
            results[number] = result
    return results


def _moved_axis(grid: Grid, axis: int, places: Tensor) -> Grid | None:
    """The same grid with one axis where its places are now; None if they are not all there, in their order."""
    varying = [d for d in range(places.ndim) if _varies(places, d)]
    dims, labels = [*grid.dims], grid.labels
    if not varying:
        place = int(places.flatten()[0])
        dims[axis], labels = None, labels.narrow(axis, place, 1)
    elif len(varying) == 1 and places.shape[varying[0]] == labels.shape[axis]:
        if not torch.equal(_vector(places, varying[0]), torch.arange(labels.shape[axis])):
            return None
        dims[axis] = varying[0]
    else:
        return None
    return Grid(grid.split, labels, tuple(dims))


def pixel_shuffle(ledger: Ledger, call: Call) -> None:
    """[N, C r^2, H, W] -> [N, C, r H, r W]: the r^2 channels of a new one join."""
    channels = of(ledger, call.first)
    factor = call.argument(1, "upscale_factor")
    if not isinstance(channels, Channels) or channels.dim != call.first.ndim - 3:
        unknown(ledger, call)
        return
    members = channels.ids.view(-1, factor**2)
    labels = channels.labels.view(-1, factor**2)
    for member in range(1, factor**2):
        ledger.join(members[:, 0], members[:, member], f"they meet fixed channels in {call.where}")
    unions = ledger.union(labels.unbind(1))
    ledger.set(call.result, Channels(members[:, 0], unions, channels.dim))


def pixel_unshuffle(ledger: Ledger, call: Call) -> None:
    """[N, C, r H, r W] -> [N, C r^2, H, W]: each channel has r^2 places."""
    channels = of(ledger, call.first)
    factor = call.argument(1, "downscale_factor")
    if not isinstance(channels, Channels) or channels.dim != call.first.ndim - 3:
        unknown(ledger, call)
        return
    ids = channels.ids.repeat_interleave(factor**2)
    labels = channels.labels.repeat_interleave(factor**2)
    ledger.set(call.result, Channels(ids, labels, channels.dim))


def channel_shuffle(ledger: Ledger, call: Call) -> None:
    """The same place of every group joins."""
    channels = of(ledger, call.first)
    groups = call.argument(1, "groups")
    if not isinstance(channels, Channels) or channels.dim != 1:
        unknown(ledger, call)
        return
    members = channels.ids.view(groups, -1)
    for member in range(1, groups):
        ledger.join(members[0], members[member], f"they meet fixed channels in {call.where}")
    labels = channels.labels.view(groups, -1).T.flatten()
    ledger.set(call.result, Channels(members.T.flatten(), labels, 1))


def take(ledger: Ledger, call: Call) -> None:
    """Indexing: all channels in their order pass, a part of them is written in the code and fixes them."""
    if _moves_grid(ledger, call):
        return
    channels = of(ledger, call.first)
    if not isinstance(channels, Channels):
        same(ledger, call, silent=True)
        return
    places = _moved(call.first, channels, call)
    results = [call.result] if isinstance(call.result, Tensor) else [*call.result]
    parts = [places] if isinstance(places, Tensor) else [*places]
    everything = torch.arange(len(channels.ids))
    for result, part in zip(results, parts, strict=True):
        varying = [d for d in range(part.ndim) if _varies(part, d)]
        is_whole = len(varying) == 1 and torch.equal(_vector(part, varying[0]), everything)
        if is_whole and _takes_all(call, channels):
            ledger.set(result, Channels(channels.ids, channels.labels, varying[0]))
        else:
            reason = f"a part of them is taken by number in {call.where}"
            ledger.fix(channels, reason)
            ledger.set(result, Fixed(reason))


def _takes_all(call: Call, channels: Channels) -> bool:
    """Does it take all channels, however many there are? It is asked of one channel fewer."""
    length = call.argument(3, "length")
    if call.name == "narrow" and isinstance(length, Size) and length.ids is not None:
        return torch.equal(length.ids, channels.ids)
    fewer = len(channels.ids) - 1
    shape = [*call.first.shape]
    shape[channels.dim] = fewer
    less = Channels(channels.ids[:-1], channels.labels[:-1], channels.dim)
    try:
        places = _moved(call.first.new_empty(shape), less, call)
    except (IndexError, RuntimeError):
        return False
    parts = [places] if isinstance(places, Tensor) else [*places]
    return all(fewer in part.shape and int(part.max()) == fewer - 1 for part in parts)


def set_item(ledger: Ledger, call: Call) -> None:
    reason = f"{call.where} writes into a part of a tensor"
    for tensor in tensors_in(call.args):
        ledger.fix(of(ledger, tensor), reason)
    ledger.set(call.first, Fixed(reason))


def split(ledger: Ledger, call: Call) -> None:
    """Into equal parts by their number: the same place of every part joins. Sizes written in the code fix channels."""
    channels = of(ledger, call.first)
    dim = call.argument(2, "dim", 0) % call.first.ndim
    if not isinstance(channels, Channels) or channels.dim != dim:
        for part in call.result:
            ledger.set(part, channels)
        return
    sizes = [part.shape[dim] for part in call.result]
    by_number = call.name in ("chunk", "tensor_split") and isinstance(
        call.argument(1, "chunks"), int
    )
    equal = len({*sizes}) == 1
    pieces = channels.ids.split(sizes)
    labels = channels.labels.split(sizes)
    if by_number and equal:
        for ids in pieces:
            ledger.join(pieces[0], ids, f"they meet fixed channels in {call.where}")
    else:
        _count_pieces(ledger, call, channels, pieces)
    for part, ids, silent in zip(call.result, pieces, labels, strict=True):
        ledger.set(part, Channels(ids, silent, dim))


def _count_pieces(ledger: Ledger, call: Call, channels: Channels, pieces: Sequence[Tensor]) -> None:
    """The sizes of a split: a sequence of them, or one for all."""
    size_or_sizes = call.argument(1, "split_size_or_sections", call.kwargs.get("split_size"))
    if call.name not in ("split", "split_with_sizes") or size_or_sizes is None:
        ledger.fix(channels, f"they are split by sizes in {call.where}")
        return
    is_sequence = isinstance(size_or_sizes, (tuple, list))
    if len(pieces) == 1 and not is_sequence:  # a larger size than there are channels
        return
    sizes = [*size_or_sizes] if is_sequence else [size_or_sizes] * len(pieces)
    if any(isinstance(size, Size) and size.sources for size in sizes):
        if len({len(ids) for ids in pieces}) > 1:  # no part of them follows
            ledger.fix(channels, f"they are split by sizes in {call.where}")
            for size in sizes:
                hold(ledger, size, call.where)
            return
        for ids in pieces:
            ledger.join(pieces[0], ids, f"they meet fixed channels in {call.where}")
    for size, ids in zip(sizes, pieces, strict=True):
        if not isinstance(size, Size) and len(ids) > 1:
            ledger.fix(channels, f"they are split by sizes in {call.where}")
        count(ledger, size, ids, channels.ids, call.where)


def glu(ledger: Ledger, call: Call) -> None:
    """The first half times a gate of the second: both halves shrink alike."""
    channels = of(ledger, call.first)
    dim = call.argument(1, "dim", -1) % call.first.ndim
    if not isinstance(channels, Channels):
        same(ledger, call, silent=True)
        return
    if channels.dim != dim:
        keep(ledger, call)
        return
    half, gate = channels.ids.chunk(2)
    ledger.join(half, gate, f"they meet fixed channels in {call.where}")
    ledger.set(call.result, Channels(half, channels.labels.chunk(2)[0], dim))


def concatenate(ledger: Ledger, call: Call) -> None:
    """Along channels: side by side. Along positions: joined place by place."""
    tensors = [*call.argument(0, "tensors")]
    dim = call.argument(1, "dim", 0) % call.result.ndim
    tensors = [tensor for tensor in tensors if tensor.ndim == call.result.ndim]
    layouts = [of(ledger, tensor) for tensor in tensors]
    along = {channels.dim for channels in layouts if isinstance(channels, Channels)}
    if not along:
        ledger.set(call.result, first_known(ledger, tensors))
    elif along == {dim}:
        parts = [laid_out(ledger, tensor, dim) for tensor in tensors]
        ids = torch.cat([part.ids for part in parts])
        labels = torch.cat([part.labels for part in parts])
        ledger.set(call.result, Channels(ids, labels, dim))
    elif dim not in along and len(along) == 1:
        elementwise(ledger, call, tensors, union)
    else:
        unknown(ledger, call)


def stack(ledger: Ledger, call: Call) -> None:
    """Along a new dimension: joined place by place."""
    tensors = [*call.argument(0, "tensors")]
    dim = call.argument(1, "dim", 0) % call.result.ndim
    layouts = [of(ledger, tensor) for tensor in tensors]
    along = {channels.dim for channels in layouts if isinstance(channels, Channels)}
    if len(along) != 1 or not all(isinstance(channels, Channels) for channels in layouts):
        unknown(ledger, call)
        return
    old_dim = along.pop()
    vectors = [channels for channels in layouts if isinstance(channels, Channels)]
    for channels in vectors[1:]:
        ledger.join(vectors[0].ids, channels.ids, f"they meet fixed channels in {call.where}")
    labels = ledger.union([channels.labels for channels in vectors])
    ledger.set(call.result, Channels(vectors[0].ids, labels, old_dim + (dim <= old_dim)))


def pad(ledger: Ledger, call: Call) -> None:
    """Of positions: channel-wise. Of channels: entries that are no channel lie beside them."""
    widths = [*call.argument(1, "pad")]
    mode, value = call.argument(2, "mode", "constant"), call.argument(3, "value") or 0
    channels = of(ledger, call.first)
    if not isinstance(channels, Channels):
        same(ledger, call, silent=True)
        return
    place = 2 * (call.first.ndim - 1 - channels.dim)
    before, after = widths[place : place + 2] if place < len(widths) else (0, 0)
    silent = mode != "constant" or value == 0
    if (before, after) == (0, 0):
        (keep if silent else keep_ids)(ledger, call)
    elif mode != "constant" or min(before, after) < 0:
        unknown(ledger, call)
    else:
        ids = F.pad(channels.ids, (before, after), value=NO_ID)
        labels = F.pad(channels.labels, (before, after), value=NO_LABEL)
        ledger.set(call.result, Channels(ids, labels if silent else labels * 0, channels.dim))


def roll(ledger: Ledger, call: Call) -> None:
    dims = call.argument(2, "dims")
    channels = of(ledger, call.first)
    axes = {d % call.first.ndim for d in ([dims] if isinstance(dims, int) else dims or [])}
    moves_channels = isinstance(channels, Channels) and (not axes or channels.dim in axes)
    (unknown if moves_channels else keep)(ledger, call)


def _moved(source: Tensor, channels: Channels, call: Call) -> Any:
    """Where the channels are afterwards: the same operation on a tensor that holds each entry's channel number."""
    shape = [1] * source.ndim
    shape[channels.dim] = -1
    numbers = torch.arange(len(channels.ids), device=source.device).view(shape).expand(source.shape)
    if call.name in ("view", "view_as"):  # which an expanded tensor refuses
        return numbers.reshape(call.result.shape).cpu()
    operation = getattr(numbers, call.method)
    if isinstance(operation, Tensor):  # a property, such as mT
        return operation.cpu()
    kwargs = {key: value for key, value in call.kwargs.items() if key not in ("input", "self")}
    return map_tensors(operation(*call.args[1:], **kwargs), Tensor.cpu)


def _varies(places: Tensor, dim: int) -> bool:
    if places.shape[dim] == 1 or places.stride(dim) == 0:
        return False
    return not torch.equal(places, places.narrow(dim, 0, 1).expand_as(places))


def _vector(places: Tensor, dim: int) -> Tensor:
    """The entries along one dimension, at the first place of all others."""
    for other in reversed(range(places.ndim)):
        if other != dim:
            places = places.select(other, 0)
    return places
