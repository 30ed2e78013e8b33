"""What a method is: a callback of the training loop that has, at any time, a plan."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from psap_core import PrunePlan
from psap_core.groups import ChannelGroup

Metrics = Mapping[str, float]
BatchesOf = Callable[[int], Iterable[Any]]  # training batches for a pulse, by completed epochs
SaveStep = Callable[[str, int, str], None]  # kind (plans, pulses), completed epochs, JSON


class Callback:
    """What a method may do during training; every hook does nothing here."""

    def before_train(self) -> None:
        """Called once, before the first epoch and after a resume."""

    def after_step(self) -> None:
        """Called after every optimiser step."""

    def end_epoch(self, epochs_done: int) -> Metrics:
        """Called when `epochs_done` epochs are complete, in training mode, before that epoch's evaluation."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; the network and the optimiser are loaded already."""


class Method(Callback, ABC):
    """A callback that has, at any time, the plan of what an export would leave out.

    Attributes:
        is_compact: the network in training is the small one already.
    """

    groups: Sequence[ChannelGroup]
    plan: PrunePlan
    is_compact = False

    def plan_is_final(self, epochs_done: int) -> bool:
        """Does the plan stand from here on, and do its filters stay silent?"""
        return False

    @abstractmethod
    def compact_(self) -> None:
        """Make the network in training, and its optimiser's state, as small as the plan, which is final."""

    def finish(self) -> None:
        """Leave the network as `psap_core.export` takes it, when training is over."""


def plan_metrics(plan: PrunePlan, mask_churn: float, seconds: float) -> dict[str, float]:
    """What every pruning method logs about a plan."""
    metrics = {
        "psap/macs_cut": plan.macs_cut,
        "psap/macs_cut_target": plan.target_cut,
        "psap/mask_churn": mask_churn,
        "psap/step_seconds": seconds,
    }
    for layer in plan.layers:
        metrics[f"layer/prune_ratio/{layer.name}"] = 1 - layer.kept / layer.filters
        metrics[f"layer/kept/{layer.name}"] = layer.kept
    return metrics
