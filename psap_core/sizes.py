"""Numbers that say where they come from: counts of channels, and the numbers that modules keep as attributes.

While the network is analysed, the sizes of its tensors along their channels and the whole numbers of its modules are
`Size`s. Handed to `view` or `split`, they say whether a size follows when channels go, and which number is to be
lowered.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

ARITHMETIC = ("add", "sub", "mul", "floordiv", "mod")


class Size(int):
    """A number that knows its source.

    Attributes:
        attribute: name of the module's number, `blocks.0.groups` or `conv.splits[1]`; None: it is no attribute.
        ids: int64 [n], the channels that it counts; None: it counts none.
        sources: what it was computed from; empty: it was not.
    """

    attribute: str | None
    ids: Tensor | None
    sources: tuple[Size, ...]

    def __new__(
        cls,
        value: int,
        attribute: str | None = None,
        ids: Tensor | None = None,
        sources: tuple[Size, ...] = (),
    ) -> Size:
        size = super().__new__(cls, value)
        size.attribute = attribute
        size.ids = ids
        size.sources = sources
        return size


def _tracked(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def operation(size: Size, other: Any) -> Any:
        value = plain(size, other)
        if type(value) is not int:
            return value
        parts = [part for part in (size, other) if isinstance(part, Size)]
        sources = [source for part in parts for source in part.sources or (part,)]
        return Size(value, sources=tuple(sources))

    return operation


def counted(size: Size, total: int) -> list[Tensor]:
    """The channels, int64 [total] each, from whose number a size was computed; empty if it follows others as well."""
    found = [source.ids for source in size.sources if source.ids is not None]
    return found if all(len(ids) == total for ids in found) else []


for _name in ARITHMETIC:
    setattr(Size, f"__{_name}__", _tracked(f"__{_name}__"))
    setattr(Size, f"__r{_name}__", _tracked(f"__r{_name}__"))


def track_attributes_(network: nn.Module) -> None:
    """Make the whole numbers above 1 of the network's own module classes, and those in their sequences, `Size`s."""
    for name, module in network.named_modules():
        if type(module).__module__.startswith("torch."):
            continue
        for key, value in vars(module).items():
            path = f"{name}.{key}".lstrip(".")
            if type(value) is int and value > 1:
                vars(module)[key] = Size(value, path)
            elif type(value) in (tuple, list):
                parts = [
                    Size(part, f"{path}[{place}]") if type(part) is int and part > 1 else part
                    for place, part in enumerate(value)
                ]
                vars(module)[key] = type(value)(parts)


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
