"""Checks of what a file holds: each takes a value and says whether it can be."""

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]


def of_type(*kinds: type) -> Check:
    """True and False are of no type that is a number's."""
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool)


def within(low: float, high: float, *kinds: type) -> Check:
    return lambda value: of_type(*kinds)(value) and low <= value <= high


def optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


def list_of(check: Check, least: int = 0) -> Check:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(check, value))


def mapping_with(checks: Mapping[str, Check]) -> Check:
    """Of a mapping whose values, None where it has no such key, pass."""
    return lambda value: (
        isinstance(value, dict) and all(check(value.get(name)) for name, check in checks.items())
    )


def plain_name(value: Any) -> bool:
    """Of a folder, say: words of letters, digits and _ % . + -, which begin with none of the latter."""
    return isinstance(value, str) and re.fullmatch(r"\w[\w%.+-]*( [\w%.+-]+)*", value) is not None


def truth(value: Any) -> bool:
    return isinstance(value, bool)


TEXT = of_type(str)
NUMBER = of_type(int, float)
WHOLE = within(0, sys.float_info.max, int)
AT_LEAST_1 = within(1, sys.float_info.max, int)
AMOUNT = within(0, sys.float_info.max, int, float)
SHARE = within(0, 1, int, float)
PERCENT = within(0, 100, int, float)
