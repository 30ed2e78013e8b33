"""What a setting may be, refused in one sentence. Imports no torch."""

import numbers
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from psap_core.errors import InputError

LARGEST = 1e30  # no setting is near it, and float32 holds it


def require_number(
    name: str,
    value: Any,
    low: float,
    high: float,
    wanted: str,
    *,
    above: bool = False,
    below: bool = False,
) -> None:
    """Refuse what is no number in [low, high]; `above` and `below` leave an end out."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if is_number and high > LARGEST and abs(value) > LARGEST:
        raise InputError(f"{name} must be {wanted}, and at most {LARGEST:g}")
    if (
        not is_number
        or not low <= value <= high
        or (above and value == low)
        or (below and value == high)
    ):
        raise InputError(f"{name} must be {wanted}, not {value!r}")


def require_cut(name: str, value: Any) -> None:
    """Refuse what is no share that can be removed."""
    wanted = "a share in [0, 1)"
    if isinstance(value, int | float) and 1 < value < 100:
        wanted = f"{wanted} (did you mean {value / 100:g}?)"
    require_number(name, value, 0, 1, wanted, below=True)


def require_whole(name: str, value: Any, low: int) -> None:
    """Refuse what is no whole number from `low` on, or more than 64 bits hold."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < low:
        raise InputError(f"{name} must be an integer from {low}, not {value!r}")
    if int(value) >= 2**63:
        raise InputError(f"{name} must be an integer below 2^63")


def require_time(name: str, value: Any) -> None:
    """Refuse what is neither epochs nor a share of them; the schedule knows which of them are possible."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(
            f"{name} must be epochs (an integer) or a share of them (a float), not {value!r}"
        )


def require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise InputError(
            f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, not {value!r}"
        )


def require_packages(purpose: str, *names: str) -> None:
    """Refuse to go on where one of these packages is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise InputError(f"{purpose} needs {', '.join(missing)}: pip install {' '.join(missing)}")
