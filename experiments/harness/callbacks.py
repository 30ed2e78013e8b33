"""The bridge from the loop to psap_core: methods as callbacks that end with a plan."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from experiments.harness.loop import Callback, Metrics
from psap_core import PSAP, PrunePlan, PruneStep
from psap_core.cost import macs_cost_model
from psap_core.groups import ChannelGroup, find_groups
from psap_core.inputs import describe
from psap_core.plan import make_plan
from psap_core.supervision import LossOfBatch

BatchesOf = Callable[[int], Iterable[Any]]  # training batches for a pulse, by completed epochs
SaveStep = Callable[[str, int, str], None]  # kind (plans, pulses), completed epochs, JSON


class Method(Callback):
    """A callback that has, at any time, the plan of what an export would leave out."""

    groups: Sequence[ChannelGroup]
    plan: PrunePlan

    def finish(self) -> None:
        """Leave the network as `psap_core.export` takes it, when training is over."""


class Unpruned(Method):
    """Prunes nothing: dense and thin networks."""

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        self.groups = find_groups(model, example_input)
        cost = macs_cost_model(model, self.groups, example_input)
        self.plan = make_plan(self.groups, {}, cost, describe(example_input), "all")


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
