"""Eq. 3: the norm proposes which filters to suspend."""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor


def filter_norms(rows: Tensor) -> Tensor:
    """L2 norm of every filter's row: [O, ...] -> [O]."""
    return torch.linalg.vector_norm(rows.detach(), dim=tuple(range(1, rows.ndim)))


def joint_scores(scores: Sequence[Tensor]) -> Tensor:
    """One score for each filter of a group from those of all its writers, each [O].

    Each writer's are first divided by their mean, so that no writer drowns another; then the root of the sum of
    squares.
    A single writer's stay as they are: they are compared within the group only.
    """
    if len(scores) == 1:
        return scores[0]
    relative = [score / score.mean().clamp(min=torch.finfo(score.dtype).tiny) for score in scores]
    return torch.stack(relative).square().sum(0).sqrt()


def pulse_margin(pruned: int, kept: int, floor: int, margin: float) -> int:
    """m_l: how many filters beyond the `pruned` ones are proposed for the pulse to choose from."""
    return min(max(1, math.floor(margin * pruned)), kept - floor)


def propose(
    scores: Tensor, suspended: Collection[int], pruned: int, margin: int
) -> tuple[int, ...]:
    """The live filters proposed anew: the lowest scores first, ties by index.

    Args:
        scores: of each filter, [O]; PSAP: its L2 norm, compared within the group only.
        suspended: filters that are suspended already; they stay proposed.
        pruned: n_l, how many filters must be suspended.
        margin: m_l, how many more to propose; none where no new filter is needed.
    """
    needed = pruned - len(suspended)
    if needed <= 0:
        return ()
    lowest = scores.sort(stable=True).indices[: pruned + margin].tolist()
    earlier = set(suspended)
    return tuple(sorted([f for f in lowest if f not in earlier][: needed + margin]))
