"""When a pruning step happens and how much it may cut. Time is counted in completed epochs, never in iterations."""

import math
from dataclasses import dataclass

from psap_core.errors import InputError


@dataclass(frozen=True)
class Schedule:
    """Steps at start, start + interval, ... below freeze, and always at freeze.

    Attributes:
        total_epochs: length of the training.
        start: completed epochs at the first step.
        ramp_end: completed epochs from which on the whole cut is asked for.
        freeze: completed epochs at the last step.
        interval: epochs from step to step.

    Raises:
        InputError: unless 1 <= start <= ramp_end <= freeze <= total_epochs and interval >= 1.
    """

    total_epochs: int
    start: int
    ramp_end: int
    freeze: int
    interval: int = 1

    def __post_init__(self) -> None:
        if not (
            isinstance(self.total_epochs, int)
            and isinstance(self.interval, int)
            and self.interval >= 1
        ):
            raise InputError(
                f"total_epochs and interval must be whole numbers, interval at least 1, not as in {self}"
            )
        if not 1 <= self.start <= self.ramp_end <= self.freeze <= self.total_epochs:
            raise InputError(
                f"1 <= start <= ramp_end <= freeze <= total_epochs must hold (in epochs), not in {self}"
            )

    def is_step(self, epochs_done: int) -> bool:
        """Does a pruning step happen when so many epochs are complete?"""
        return epochs_done == self.freeze or epochs_done in range(
            self.start, self.freeze, self.interval
        )

    def ramp(self, epochs_done: int) -> float:
        """Share of the target cut that is asked for at a step: 1 - (1 - x)^3, in (0, 1].

        The field's cubic sparsity schedule (Zhu and Gupta, "To prune, or not to prune", 2017).
        """
        x = min(
            1.0,
            (epochs_done - self.start + self.interval)
            / (self.ramp_end - self.start + self.interval),
        )
        return 1 - (1 - x) ** 3


def make_schedule(
    total_epochs: int,
    start: int | float,
    ramp_end: int | float,
    freeze: int | float,
    interval: int = 1,
) -> Schedule:
    """A schedule from epochs (int) or from shares of all epochs (float).

    A share becomes floor(share * total_epochs + 0.5) epochs, start at least 1, ramp_end at least start,
    freeze at least ramp_end; epochs are taken as they are.
    """
    first = _epochs(start, total_epochs, at_least=1)
    full = _epochs(ramp_end, total_epochs, at_least=first)
    return Schedule(
        total_epochs, first, full, _epochs(freeze, total_epochs, at_least=full), interval
    )


def _epochs(when: int | float, total_epochs: int, at_least: int) -> int:
    if isinstance(when, int):
        return when
    if not 0 <= when <= 1:
        raise InputError(
            f"a share of the epochs must be in [0, 1], not {when}; whole epochs are given as an int"
        )
    return max(at_least, math.floor(when * total_epochs + 0.5))
