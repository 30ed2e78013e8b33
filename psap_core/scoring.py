"""Eq. 3: the norm proposes which filters to suspend."""

import math
from collections.abc import Collection

import torch
from torch import Tensor


def filter_norms(weight: Tensor) -> Tensor:
    """L2 norm of every filter: [O, I, kH, kW] -> [O]."""
    return torch.linalg.vector_norm(weight.detach(), dim=(1, 2, 3))


def pulse_margin(pruned: int, kept: int, floor: int, margin: float) -> int:
    """m_l: how many filters beyond the `pruned` ones are proposed for the pulse to choose from."""
    return min(max(1, math.floor(margin * pruned)), kept - floor)


def propose(
    scores: Tensor, suspended: Collection[int], pruned: int, margin: int
) -> tuple[int, ...]:
    """The live filters proposed anew: the lowest scores first, ties by index.

    Args:
        scores: of each filter, [O]; PSAP: its L2 norm, compared within the layer only.
        suspended: filters that are suspended already; they stay proposed.
        pruned: n_l, how many filters must be suspended.
        margin: m_l, how many more to propose; none where no new filter is needed.
    """
    needed = pruned - len(suspended)
    if needed <= 0:
        return ()
    lowest, earlier = scores.sort(stable=True).indices[: pruned + margin].tolist(), set(suspended)
    return tuple(sorted([f for f in lowest if f not in earlier][: needed + margin]))
