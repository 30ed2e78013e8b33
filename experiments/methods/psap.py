"""PSAP, called at every epoch's end."""

import json
from collections.abc import Callable
from typing import Any

from experiments.methods.base import BatchesOf, Method, Metrics, SaveStep, plan_metrics
from experiments.methods.registry import MethodContext, register
from experiments.schema import PSAPConfig
from psap_core import PSAP, InputError, PrunePlan, PruneStep
from psap_core.supervision import LossOfBatch


class PSAPCallback(Method):
    """Calls PSAP at every epoch's end and reports its steps.

    Args:
        pruner: over the network in context.
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

    @property
    def is_compact(self) -> bool:  # type: ignore[override]
        return self.pruner.is_compact

    def plan_is_final(self, epochs_done: int) -> bool:
        return epochs_done >= self.pruner.schedule.freeze

    def compact_(self) -> None:
        self.pruner.compact_()

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


PULSE_BATCHES = 2  # fewer have no standard error


@register(PSAPConfig, "psap")
def make(context: MethodContext) -> Method:
    return callback(context, PSAP)


def callback(context: MethodContext, kind: Callable[..., PSAP]) -> PSAPCallback:
    """The callback of PSAP, or of a variant of it.

    Raises:
        InputError: an epoch has too few batches for a pulse, or a setting is out of its range.
    """
    cfg, method = context.cfg, context.cfg.method
    assert isinstance(method, PSAPConfig)
    if method.protection and context.batches < PULSE_BATCHES:
        raise InputError(
            f"method=psap needs at least {PULSE_BATCHES} training batches per epoch for its pulse, "
            f"there is {context.batches}: lower optim.batch_size"
        )
    pruner = kind(
        context.model,
        context.optimizer,
        context.example_input,
        target_macs_cut=method.target_macs_cut,
        total_epochs=cfg.epochs,
        scope=method.scope.value,
        exclude=method.exclude,
        kappa=method.kappa,
        sparsity_reference=method.sparsity_reference.value,
        fan=cfg.model.fan.value,
        alpha=method.alpha,
        protection=method.protection,
        pulse_batches=method.pulse_batches,
        margin=method.margin,
        min_filters=method.min_filters,
        min_filter_share=method.min_filter_share,
        round_to=method.round_to,
        start=method.start,
        ramp_end=method.ramp_end,
        freeze=method.freeze,
        interval=method.interval,
    )
    return PSAPCallback(pruner, context.batches_of, context.loss_of_batch, context.save)
