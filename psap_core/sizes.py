"""Numbers that say where they come from: counts of channels, and the numbers that modules keep as attributes.

While the network is analysed, the sizes of its tensors along their channels and the whole numbers of its modules are
`Size`s. Handed to `view` or `split`, they say whether a size follows when channels go, and which number is to be
lowered. Where a size becomes a factor, such as the scale of an attention, it must stay what it is.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

ARITHMETIC = ("add", "sub", "mul", "floordiv", "mod")
PROPORTIONAL = ("mul", "rmul", "floordiv")
VALUES = (
    "abs",
    "and",
    "divmod",
    "float",
    "int",
    "lshift",
    "neg",
    "or",
    "pow",
    "rdivmod",
    "rlshift",
    "round",
    "rpow",
    "rrshift",
    "rshift",
    "rtruediv",
    "truediv",
    "trunc",
    "xor",
)
# Numbers with which a module of the user's may count its channels.
COUNTS = (
    "channels",
    "dim",
    "features",
    "in_channels",
    "in_features",
    "num_channels",
    "num_features",
    "out_channels",
    "out_features",
)


class Size(int):
    """A number that knows its source.

    Attributes:
        attribute: name of the module's number, `blocks.0.groups` or `conv.splits[1]`; None: it is no attribute.
        ids: int64 [n], the channels that it counts; None: it counts none.
        axis: a split of channels, and which axis of it this is the length of; None: of none.
        sources: what it was computed from; empty: it was not.
        is_proportional: whether products and quotients are all that it was computed by.
        is_value: whether something was calculated with it that is no whole number.
    """

    attribute: str | None
    ids: Tensor | None
    axis: tuple[Any, int] | None
    sources: tuple[Size, ...]
    is_proportional: bool
    is_value: bool

    def __new__(
        cls,
        value: int,
        attribute: str | None = None,
        ids: Tensor | None = None,
        axis: tuple[Any, int] | None = None,
        sources: tuple[Size, ...] = (),
        is_proportional: bool = True,
    ) -> Size:
        size = super().__new__(cls, operator.index(value))  # int() would make a value of it
        size.attribute = attribute
        size.ids = ids
        size.axis = axis
        size.sources = sources
        size.is_proportional = is_proportional
        size.is_value = False
        return size

    def __array_ufunc__(self, function: Any, kind: str, *inputs: Any, **options: Any) -> Any:
        """What numpy calculates."""
        for size in sizes_in(inputs):
            size.becomes_value()
        numbers = [operator.index(part) if isinstance(part, Size) else part for part in inputs]
        return getattr(function, kind)(*numbers, **options)

    def becomes_value(self) -> None:
        for source in self.sources or (self,):
            source.is_value = True


def sizes_in(value: Any) -> Iterator[Size]:
    """Every size in nested tuples, lists, dictionaries and slices."""
    if isinstance(value, Size):
        yield value
    elif isinstance(value, slice):
        yield from sizes_in((value.start, value.stop, value.step))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from sizes_in(part)
    elif isinstance(value, dict):
        yield from sizes_in([*value.values()])


def _tracked(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)
    keeps_proportion = name.strip("_") in PROPORTIONAL

    def operation(size: Size, other: Any) -> Any:
        value = plain(size, other)
        parts = [part for part in (size, other) if isinstance(part, Size)]
        if type(value) is not int:
            for part in parts if isinstance(other, float) else ():
                part.becomes_value()
            return value
        sources = [source for part in parts for source in part.sources or (part,)]
        is_proportional = keeps_proportion and all(part.is_proportional for part in parts)
        return Size(value, sources=tuple(sources), is_proportional=is_proportional)

    return operation


def _as_value(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def operation(size: Size, *others: Any) -> Any:
        for part in (size, *others):
            if isinstance(part, Size):
                part.becomes_value()
        return plain(size, *others)

    return operation


def counted(size: Size, total: int) -> list[Tensor]:
    """The channels, int64 [total] each, from whose number a size was computed; empty if it follows others as well."""
    source_ids = [source.ids for source in size.sources if source.ids is not None]
    if not size.is_proportional or any(source.axis is not None for source in size.sources):
        return []
    return source_ids if all(len(ids) == total for ids in source_ids) else []


for _name in ARITHMETIC:
    setattr(Size, f"__{_name}__", _tracked(f"__{_name}__"))
    setattr(Size, f"__r{_name}__", _tracked(f"__r{_name}__"))
for _name in VALUES:
    setattr(Size, f"__{_name}__", _as_value(f"__{_name}__"))


def track_attributes_(network: nn.Module) -> list[Size]:
    """Make the whole numbers above 1 of the network's own module classes, and those in their sequences, `Size`s."""
    sizes: list[Size] = []
    for name, module in network.named_modules():
        if type(module).__module__.startswith("torch."):
            continue
        for key, value in vars(module).items():
            path = f"{name}.{key}".lstrip(".")
            if type(value) is int and value > 1:
                vars(module)[key] = Size(value, path)
                sizes.append(vars(module)[key])
            elif type(value) in (tuple, list):
                parts = [
                    Size(part, f"{path}[{place}]") if type(part) is int and part > 1 else part
                    for place, part in enumerate(value)
                ]
                vars(module)[key] = type(value)(parts)
                sizes += [part for part in parts if isinstance(part, Size)]
    return sizes


def read_number(module: nn.Module, key: str) -> int:
    """A module's number by its name without the module's: `groups`, or `splits[1]`."""
    name, place = _parts(key)
    value = getattr(module, name)
    number: int = value if place is None else value[place]
    return number


def write_number_(module: nn.Module, key: str, number: int) -> None:
    name, place = _parts(key)
    if place is None:
        setattr(module, name, number)
        return
    values = [*getattr(module, name)]
    values[place] = number
    setattr(module, name, type(getattr(module, name))(values))


def _parts(key: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.*)\[(\d+)\]", key)
    return (match[1], int(match[2])) if match else (key, None)
