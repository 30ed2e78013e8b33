"""What the suite costs, section by section; `python -m experiments.benchmark` runs them."""

import statistics
import time
from collections.abc import Callable
from typing import Any

Figures = dict[str, dict[str, Any]]


def seconds(function: Callable[[], object]) -> float:
    """Duration of one call."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def figure(values: list[float]) -> dict[str, Any]:
    """Median, smallest and largest value, and their number."""
    return {"median": statistics.median(values), "spread": [min(values), max(values)], "n": len(values)}
