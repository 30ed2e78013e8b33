"""The bridge from the loop to psap_core: methods as callbacks that end with a plan."""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from experiments.harness.loop import Callback, Metrics
from psap_core import (
    PSAP,
    PrunableLayer,
    PrunePlan,
    PruneStep,
    find_layers,
    macs_cost_model,
    make_plan,
)

SaveStep = Callable[[str, int, str], None]  # kind (plans, pulses), completed epochs, JSON


class Method(Callback):
    """A callback that has, at any time, the plan of what an export would leave out."""

    layers: Sequence[PrunableLayer]
    plan: PrunePlan

    def finish(self) -> None:
        """Leave the network as `psap_core.export` takes it, when training is over."""


class Unpruned(Method):
    """Prunes nothing: dense and thin networks."""

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        self.layers = find_layers(model, example_input)
        cost = macs_cost_model(model, self.layers, example_input)
        self.plan = make_plan(self.layers, {}, cost, example_input.shape[1:])


class PSAPCallback(Method):
    """Calls PSAP at every epoch's end and reports its steps.

    Args:
        pruner: over the network in training.
        make_losses: the pulse's losses when so many epochs are done.
        save: takes every step's plan and pulse.
    """

    def __init__(
        self, pruner: PSAP, make_losses: Callable[[int], Iterable[Tensor]], save: SaveStep
    ) -> None:
        self.pruner = pruner
        self.layers = pruner.layers
        self.make_losses = make_losses
        self.save = save

    @property
    def plan(self) -> PrunePlan:  # type: ignore[override]
        return self.pruner.plan

    def end_epoch(self, epochs_done: int) -> Metrics:
        step = self.pruner.end_epoch(lambda: self.make_losses(epochs_done))
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
