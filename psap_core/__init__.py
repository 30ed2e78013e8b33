"""PSAP: Protective Self-Adaptive Pruning of filters while a network trains (Li and Zhao, arXiv 2303.11881).

What the package offers stands in psap_core.api. It needs torch, and is imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

from psap_core.errors import InputError as InputError

__version__ = "0.2.0"

if TYPE_CHECKING:
    from psap_core.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    import psap_core.api as api

    globals().update({offered: getattr(api, offered) for offered in api.__all__})
    return getattr(api, name)
