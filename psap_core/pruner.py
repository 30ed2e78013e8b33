"""PSAP: the glue. Every equation is a function elsewhere; this class decides when, and keeps the snapshots."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from psap_core.allocation import check_reachable, filter_counts, filter_floors
from psap_core.cost import filters_cost_model, macs_cost_model
from psap_core.errors import InputError
from psap_core.layers import Scope, find_layers
from psap_core.plan import PrunePlan, Unit, make_plan
from psap_core.schedule import make_schedule
from psap_core.scoring import filter_norms, propose, pulse_margin, relative_norms
from psap_core.sparsity import Fan, Reference, weight_sparsity_ratio
from psap_core.supervision import Supervision, choose_restored, pulse
from psap_core.suspension import (
    NOTHING_SUSPENDED,
    FilterTensors,
    Snapshot,
    filter_tensors,
    freeze_,
    refresh_,
    restore_,
    suspend_,
)

MakeLosses = Callable[[], Iterable[Tensor]]
Filters = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PruneStep:
    """What one pruning step saw and did; dictionaries go by layer name.

    Attributes:
        epochs_done: completed epochs at the step.
        plan: the plan that stands now; its budget is met.
        weight_sparsity_ratio: s_l of eq. 1.
        proposed: filters that stood suspended during the pulse, earlier ones included.
        restored: filters given back, exactly.
        suspended: filters that stay away until the next step.
        utility: proposed filter to (mean, standard error) of eq. 5; empty without protection.
        grad_norm_live, grad_norm_suspended: mean norm of the affine gradient in the pulse; empty without protection.
        mask_churn: filters whose state this step changed, as a share of all filters.
        seconds: duration of the step, pulse included.
    """

    epochs_done: int
    plan: PrunePlan
    weight_sparsity_ratio: dict[str, float]
    proposed: Filters
    restored: Filters
    suspended: Filters
    utility: dict[str, dict[int, tuple[float, float]]]
    grad_norm_live: dict[str, float]
    grad_norm_suspended: dict[str, float]
    mask_churn: float
    seconds: float


class PSAP:
    """Protective Self-Adaptive Pruning of a network while it trains.

    Call `end_epoch` when an epoch is complete, before any switch to evaluation mode. Between steps the only
    cost is an optimiser step hook that keeps the suspended affine entries at zero.

    Args:
        model: the bare network; not wrapped in DistributedDataParallel or torch.compile.
        optimizer: the optimiser that trains it.
        example_input: one input batch [N, C, H, W] on the network's device.
        target_macs_cut: share of multiply-accumulates to remove, in [0, 1).
        target_filters_cut: share of filters to remove, instead of target_macs_cut.
        total_epochs: length of the training.
        scope: `all`, or `inner` for the layers whose channels never reach a sum.
        exclude: names of convolutions to leave alone.
        kappa: threshold of eq. 1, > 0.
        sparsity_reference: `network` (eq. 1) or `layer` (the ablation's control).
        fan: what the network's initialisation used, `in` or `out`.
        alpha: how strongly layer ratios follow the sparsity, >= 0; 0 is one ratio for all layers.
        protection: whether the pulse chooses what comes back; without it the norms decide.
        pulse_batches: K of eq. 5, >= 2.
        margin: filters proposed beyond those needed, as a share of a layer's pruned filters, in [0, 1].
        min_filters, min_filter_share: a layer keeps at least max(min_filters, ceil(min_filter_share * O)).
        start, ramp_end, freeze: completed epochs (int) or shares of total_epochs (float).
        interval: epochs between steps.

    Raises:
        InputError: an argument is out of its range, the target cannot be reached, the model is wrapped or
            has no prunable layer, or the optimiser lacks a pruned parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_input: Tensor,
        *,
        target_macs_cut: float | None = None,
        target_filters_cut: float | None = None,
        total_epochs: int,
        scope: Scope = "all",
        exclude: Sequence[str] = (),
        kappa: float = 0.5,
        sparsity_reference: Reference = "network",
        fan: Fan = "in",
        alpha: float = 1.0,
        protection: bool = True,
        pulse_batches: int = 10,
        margin: float = 0.3,
        min_filters: int = 2,
        min_filter_share: float = 0.05,
        start: int | float = 0.05,
        ramp_end: int | float = 0.40,
        freeze: int | float = 0.50,
        interval: int = 1,
    ) -> None:
        _check_unwrapped(model)
        self.unit: Unit
        if target_macs_cut is not None and target_filters_cut is None:
            self.target_cut, self.unit = target_macs_cut, "macs"
        elif target_filters_cut is not None and target_macs_cut is None:
            self.target_cut, self.unit = target_filters_cut, "filters"
        else:
            raise InputError("give exactly one of target_macs_cut and target_filters_cut")
        for name, value, allowed in (
            (f"target_{self.unit}_cut", self.target_cut, 0 <= self.target_cut < 1),
            ("kappa", kappa, kappa > 0),
            ("alpha", alpha, alpha >= 0),
            ("pulse_batches", pulse_batches, pulse_batches >= 2),
            ("margin", margin, 0 <= margin <= 1),
            ("min_filters", min_filters, min_filters >= 1),
            ("min_filter_share", min_filter_share, 0 <= min_filter_share <= 1),
        ):
            if not allowed:
                raise InputError(f"{name}={value} is out of range: {_RANGES[name]}")
        self.model = model
        self.optimizer = optimizer
        self.kappa, self.sparsity_reference, self.fan, self.alpha = kappa, sparsity_reference, fan, alpha
        self.protection, self.pulse_batches, self.margin = protection, pulse_batches, margin
        self.schedule = make_schedule(total_epochs, start, ramp_end, freeze, interval)
        self.layers = find_layers(model, example_input, scope=scope, exclude=exclude)
        self._macs = macs_cost_model(model, self.layers, example_input)
        self._cost = self._macs if self.unit == "macs" else filters_cost_model(self.layers)
        self._floors = filter_floors(self._macs.filters, min_filters, min_filter_share)
        check_reachable(self._cost, self._budget(self.target_cut), self._floors)
        _check_trained(model, optimizer, self._tensors())

        self.epochs_done = 0
        self.plan = make_plan(self.layers, {}, self._macs, example_input.shape[1:], unit=self.unit)
        self._suspended = {layer.name: NOTHING_SUSPENDED for layer in self.layers}
        self._hold_suspended()
        optimizer.register_step_post_hook(self._zero_suspended_affine)

    @property
    def frozen(self) -> bool:
        """Is the plan final?"""
        return self.epochs_done >= self.schedule.freeze

    def end_epoch(self, make_losses: MakeLosses) -> PruneStep | None:
        """Count one completed epoch; if a pruning step is due, do it and say what it did.

        Args:
            make_losses: a function that yields the pulse's losses, one training batch each, at least 2 and up
                to `pulse_batches`; called only at a pulse, inside a fork of torch's default generators. The
                losses may come from a DistributedDataParallel or compiled wrapper of the model.

        Raises:
            InputError: make_losses is no function, too few losses came, a gradient is not finite (the network
                is then as before the call), all epochs are over, or the ranks of a distributed run disagree.
        """
        if not callable(make_losses):
            raise InputError(
                f"end_epoch takes a function that makes the losses, not {type(make_losses).__name__}: losses made "
                "beforehand were computed before the pulse and say nothing about suspended filters"
            )
        if self.epochs_done == self.schedule.total_epochs:
            raise InputError(f"all {self.schedule.total_epochs} epochs of the schedule are over")
        epochs_done = self.epochs_done + 1
        step = self._step(epochs_done, make_losses) if self.schedule.is_step(epochs_done) else None
        self.epochs_done = epochs_done
        return step

    def _step(self, epochs_done: int, make_losses: MakeLosses) -> PruneStep:
        began = time.perf_counter()
        tensors = self._tensors()
        for name, snapshot in self._suspended.items():
            refresh_(tensors[name], snapshot)
        target = self.target_cut * self.schedule.ramp(epochs_done)

        weights = {name: t.parameters[f"{name}.weight"] for name, t in tensors.items()}
        sparsity = weight_sparsity_ratio(
            weights, kappa=self.kappa, fan=self.fan, reference=self.sparsity_reference
        )
        kept = filter_counts(
            list(sparsity.values()), self._cost, self._budget(target), self._floors, self.alpha
        )
        pruned = {layer.name: layer.filters - k for layer, k in zip(self.layers, kept, strict=True)}
        norms = self._relative_norms(weights)
        anew = self._propose(norms, pruned)
        taken = {name: suspend_(tensors[name], filters) for name, filters in anew.items()}
        standing = {name: earlier.join(taken[name]) for name, earlier in self._suspended.items()}
        try:
            seen = self._supervise(tensors, standing, make_losses)
            restored = self._protect(seen, norms, anew, pruned)
            left = {
                name: set(snapshot.filters).difference(restored[name]) for name, snapshot in standing.items()
            }
            plan = make_plan(self.layers, left, self._macs, self.plan.input_shape, target, self.unit)
            _check_same_plan_on_all_ranks(plan)
        except BaseException:
            for name, snapshot in taken.items():
                restore_(tensors[name], snapshot)
            raise

        changed = sum(
            len(left[name].symmetric_difference(before)) for name, before in self.plan.pruned.items()
        )
        self.plan = plan
        for name, snapshot in standing.items():
            restore_(tensors[name], snapshot.take(restored[name]))
            self._suspended[name] = snapshot.take(plan.pruned[name])
        if epochs_done == self.schedule.freeze:
            for name, snapshot in self._suspended.items():
                freeze_(tensors[name], snapshot.filters)
                self._suspended[name] = NOTHING_SUSPENDED
        self._hold_suspended()
        return PruneStep(
            epochs_done=epochs_done,
            plan=plan,
            weight_sparsity_ratio=sparsity,
            proposed={name: snapshot.filters for name, snapshot in standing.items()},
            restored=restored,
            suspended=plan.pruned,
            utility=seen.utility,
            grad_norm_live=seen.grad_norm_live,
            grad_norm_suspended=seen.grad_norm_suspended,
            mask_churn=changed / sum(self._macs.filters),
            seconds=time.perf_counter() - began,
        )

    def _relative_norms(self, weights: dict[str, Tensor]) -> dict[str, list[float]]:
        norms = torch.cat([filter_norms(weight) for weight in weights.values()]).cpu()  # one transfer
        by_layer = {}
        per_layer = torch.split(norms, list(self._macs.filters))
        for (name, snapshot), norm in zip(self._suspended.items(), per_layer, strict=True):
            live = torch.ones(len(norm), dtype=torch.bool)
            live[list(snapshot.filters)] = False
            by_layer[name] = relative_norms(norm, live).tolist()
        return by_layer

    def _propose(self, norms: dict[str, list[float]], pruned: dict[str, int]) -> Filters:
        proposed = {}
        for layer, floor in zip(self.layers, self._floors, strict=True):
            n, scores = pruned[layer.name], norms[layer.name]
            margin = pulse_margin(n, layer.filters - n, floor, self.margin) if self.protection else 0
            proposed[layer.name] = propose(scores, self._suspended[layer.name].filters, n, margin)
        return proposed

    def _supervise(
        self, tensors: dict[str, FilterTensors], standing: dict[str, Snapshot], make_losses: MakeLosses
    ) -> Supervision:
        if self.protection and any(snapshot.filters for snapshot in standing.values()):
            return pulse(self.model, tensors, standing, make_losses, self.pulse_batches)
        return Supervision({}, {}, {})

    def _protect(
        self, seen: Supervision, norms: dict[str, list[float]], anew: Filters, pruned: dict[str, int]
    ) -> Filters:
        restored = {}
        for name, earlier in self._suspended.items():
            scores = dict(enumerate(norms[name]))  # without a pulse, the largest norms come back
            scores |= {f: mean for f, (mean, _) in seen.utility.get(name, {}).items()}
            restored[name] = choose_restored(scores, earlier.filters, anew[name], pruned[name])
        return restored

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs besides the model's and the optimiser's own state; loads with weights_only."""
        return {
            "settings": self._settings(),
            "epochs_done": self.epochs_done,
            "plan": self.plan.to_json(),
            "suspended": {name: (list(s.filters), s.rows) for name, s in self._suspended.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; load the model's and the optimiser's state first.

        Raises:
            InputError: the state is of another network or another configuration.
        """
        ours = self._settings()
        if ours["layers"] != state["settings"]["layers"]:
            raise InputError(
                "the pruner's state is of another network: its prunable layers are not this network's"
            )
        for name, theirs in state["settings"].items():
            if ours[name] != theirs:
                raise InputError(
                    f"the pruner's state was saved with {name}={theirs!r}, this run has {ours[name]!r}"
                )
        self.epochs_done = state["epochs_done"]
        self.plan = PrunePlan.from_json(state["plan"])
        device = next(self.model.parameters()).device
        for name, (filters, rows) in state["suspended"].items():
            self._suspended[name] = Snapshot(
                tuple(filters), {key: row.to(device) for key, row in rows.items()}
            )
        self._hold_suspended()

    def _settings(self) -> dict[str, Any]:
        return {
            "layers": [[layer.name, layer.filters] for layer in self.layers],
            "target": [self.unit, self.target_cut],
            "schedule": list(vars(self.schedule).values()),
            "kappa": self.kappa,
            "sparsity_reference": self.sparsity_reference,
            "fan": self.fan,
            "alpha": self.alpha,
            "protection": self.protection,
            "pulse_batches": self.pulse_batches,
            "margin": self.margin,
            "floors": self._floors,
        }

    def _tensors(self) -> dict[str, FilterTensors]:
        return {layer.name: filter_tensors(self.model, layer, self.optimizer) for layer in self.layers}

    def _budget(self, target_cut: float) -> float:
        return (1 - target_cut) * self._cost.dense

    def _hold_suspended(self) -> None:
        """Prepare the hook: affines that have suspended entries, and masks that are zero there."""
        self._affines: list[Tensor] = []
        self._masks: list[Tensor] = []
        for layer in self.layers:
            if pruned := list(self.plan.pruned[layer.name]):
                norm = self.model.get_submodule(layer.affine)
                for affine in (norm.weight, norm.bias):
                    assert isinstance(affine, Tensor)
                    mask = torch.ones_like(affine, requires_grad=False)
                    mask[pruned] = 0.0
                    self._affines.append(affine)
                    self._masks.append(mask)

    @torch.no_grad()
    def _zero_suspended_affine(self, *_: object) -> None:
        if self._affines:
            torch._foreach_mul_(self._affines, self._masks)


_RANGES = {
    "target_macs_cut": "a share in [0, 1)",
    "target_filters_cut": "a share in [0, 1)",
    "kappa": "a number above 0",
    "alpha": "a number of at least 0",
    "pulse_batches": "at least 2, for a standard error",
    "margin": "a share in [0, 1]",
    "min_filters": "at least 1, a layer cannot vanish",
    "min_filter_share": "a share in [0, 1]",
}


def _check_unwrapped(model: nn.Module) -> None:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise InputError(
            f"the model is wrapped in {type(model).__name__}: pass model.module, and let make_losses use the wrapper"
        )
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise InputError(
            "the model is wrapped by torch.compile: pass the module that you gave to torch.compile"
        )


def _check_trained(model: nn.Module, optimizer: Optimizer, tensors: dict[str, FilterTensors]) -> None:
    optimised = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in tensors.values():
        for name, parameter in layer.parameters.items():
            if id(parameter) not in optimised or not parameter.requires_grad:
                raise InputError(
                    f"the optimizer does not train {name!r}, whose filters are to be pruned; exclude its layer"
                )


def _check_same_plan_on_all_ranks(plan: PrunePlan) -> None:
    if dist.is_available() and dist.is_initialized():
        digests: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(digests, plan.digest)
        if len(set(digests)) > 1:
            raise InputError(
                f"the ranks made different plans ({', '.join(d[:8] for d in digests)}): let make_losses use the "
                "DistributedDataParallel wrapper, so that decisions rest on reduced gradients"
            )
