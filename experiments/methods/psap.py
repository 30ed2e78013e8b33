"""PSAP, called at every epoch's end."""

import json
from typing import Any

from experiments.methods.base import BatchesOf, Method, Metrics, SaveStep, plan_metrics
from psap_core import PSAP, PrunePlan, PruneStep
from psap_core.supervision import LossOfBatch


class PSAPCallback(Method):
    """Calls PSAP at every epoch's end and reports its steps.

    Args:
        pruner: over the network in training.
        batches_of: the pulse's batches when so many epochs are done.
        loss_of_batch: the loss of one of them, a scalar.
        save: takes every step's plan and pulse.
    """

    def __init__(
        self, pruner: PSAP, batches_of: BatchesOf, loss_of_batch: LossOfBatch, save: SaveStep
    ) -> None:
        self.pruner = pruner
        self.groups = pruner.groups
        self.batches_of = batches_of
        self.loss_of_batch = loss_of_batch
        self.save = save

    @property
    def plan(self) -> PrunePlan:  # type: ignore[override]
        return self.pruner.plan

    def end_epoch(self, epochs_done: int) -> Metrics:
        step = self.pruner.end_epoch(self.batches_of(epochs_done), self.loss_of_batch)
        if step is None:
            return {}
        self.save("plans", epochs_done, step.plan.to_json())
        if step.utility:
            self.save("pulses", epochs_done, json.dumps(pulse_content(step)))
        return step_metrics(step)

    def state_dict(self) -> dict[str, Any]:
        return self.pruner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pruner.load_state_dict(state)


def pulse_content(step: PruneStep) -> dict[str, dict[str, list[float]]]:
    """What a pulse saw, by layer: the suspended filters, their utilities with standard errors, and who was restored."""
    return {
        name: {
            "filters": [*utilities],
            "utility": [mean for mean, _ in utilities.values()],
            "standard_error": [error for _, error in utilities.values()],
            "restored": [*step.restored[name]],
        }
        for name, utilities in step.utility.items()
    }


def step_metrics(step: PruneStep) -> dict[str, float]:
    """One pruning step as flat metrics; a layer's utility is the mean over its proposed filters."""
    metrics = plan_metrics(step.plan, step.mask_churn, step.seconds)
    for key, filters in (
        ("proposed", step.proposed),
        ("suspended", step.plan.pruned),
        ("restored", step.restored),
    ):
        metrics[f"psap/{key}"] = sum(map(len, filters.values()))
    for key in ("weight_sparsity_ratio", "grad_norm_live", "grad_norm_suspended"):
        metrics |= {f"layer/{key}/{name}": value for name, value in getattr(step, key).items()}
    for name, utilities in step.utility.items():
        if utilities:
            metrics[f"layer/utility/{name}"] = sum(mean for mean, _ in utilities.values()) / len(
                utilities
            )
    return metrics
