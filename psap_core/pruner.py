"""PSAP: the glue. Every equation is a function elsewhere; this class decides when, and keeps the snapshots."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from psap_core.allocation import check_reachable, filter_counts, filter_floors
from psap_core.cost import filters_cost_model, macs_cost_model
from psap_core.errors import InputError
from psap_core.layers import Scope, find_layers
from psap_core.plan import PrunePlan, Unit, make_plan
from psap_core.schedule import make_schedule
from psap_core.scoring import filter_norms, propose, pulse_margin
from psap_core.sparsity import Fan, Reference, weight_sparsity_ratio
from psap_core.supervision import MakeLosses, Supervision, choose_restored, pulse
from psap_core.suspension import (
    FilterTensors,
    Silence,
    Snapshot,
    filter_tensors,
    freeze_,
    refresh_,
    restore_,
    suspend_,
)

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
        utility: proposed filter to (mean, standard error) of eq. 5; empty without a pulse.
        grad_norm_live, grad_norm_suspended: mean norm of the affine gradient in the pulse; empty without one.
        mask_churn: filters whose state this step changed, as a share of all filters.
        seconds: duration of the step, pulse included.
    """

    epochs_done: int
    plan: PrunePlan
    weight_sparsity_ratio: dict[str, float]
    proposed: Filters
    restored: Filters
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
        fan: what the network's initialisation used, `in` or `out`; torchvision's networks use `out`.
        alpha: how strongly layer ratios follow the sparsity, >= 0; 0 is one ratio for all layers.
        protection: whether the pulse chooses what comes back; without it the norms decide.
        pulse_batches: K of eq. 5, >= 2.
        margin: filters proposed beyond those needed, as a share of a layer's pruned filters, in [0, 1].
        min_filters, min_filter_share: a layer keeps at least max(min_filters, ceil(min_filter_share * O)).
        start, ramp_end, freeze: completed epochs (int) or shares of total_epochs (float).
        interval: epochs between steps.

    Raises:
        InputError: an argument is out of its range, the target cannot be reached, the model is wrapped or has no
            prunable layer, a pruned parameter is in half precision or not the optimiser's, or the optimiser has had
            another PSAP.
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
        targets: dict[Unit, float | None] = {"macs": target_macs_cut, "filters": target_filters_cut}
        given = [(unit, cut) for unit, cut in targets.items() if cut is not None]
        if len(given) != 1:
            raise InputError("give exactly one of target_macs_cut and target_filters_cut")
        self.unit, self.target_cut = given[0]
        hooked = {
            type(getattr(hook, "__self__", None))
            for hook in optimizer._optimizer_step_post_hooks.values()
        }
        wrappers = (
            nn.parallel.DistributedDataParallel,
            nn.DataParallel,
            torch._dynamo.OptimizedModule,
        )
        for name, value, in_range, wanted in (
            (
                f"target_{self.unit}_cut",
                self.target_cut,
                0 <= self.target_cut < 1,
                "a share in [0, 1)",
            ),
            (
                "model",
                type(model).__name__,
                not isinstance(model, wrappers),
                "bare; make_losses may use a wrapper",
            ),
            (
                "optimizer",
                "one after whose steps another PSAP zeroes filters",
                Silence not in hooked,
                "new",
            ),
            ("kappa", kappa, 0 < kappa < math.inf, "above 0"),
            ("alpha", alpha, 0 <= alpha < math.inf, "at least 0"),
            (
                "pulse_batches",
                pulse_batches,
                isinstance(pulse_batches, int) and pulse_batches > 1,
                "an integer from 2",
            ),
            ("margin", margin, 0 <= margin <= 1, "a share in [0, 1]"),
            (
                "min_filters",
                min_filters,
                isinstance(min_filters, int) and min_filters > 0,
                "an integer from 1",
            ),
            ("min_filter_share", min_filter_share, 0 <= min_filter_share <= 1, "a share in [0, 1]"),
            (
                "sparsity_reference",
                sparsity_reference,
                sparsity_reference in ("network", "layer"),
                "network or layer",
            ),
            ("fan", fan, fan in ("in", "out"), "in or out"),
            ("scope", scope, scope in ("all", "inner"), "all or inner"),
        ):
            if not in_range:
                raise InputError(f"{name} must be {wanted}, not {value}")
        self.model, self.optimizer = model, optimizer
        self.kappa, self.sparsity_reference, self.fan, self.alpha = (
            kappa,
            sparsity_reference,
            fan,
            alpha,
        )
        self.protection, self.pulse_batches, self.margin = protection, pulse_batches, margin
        self.schedule = make_schedule(total_epochs, start, ramp_end, freeze, interval)
        self.layers = find_layers(model, example_input, scope=scope, exclude=exclude)
        self._macs = macs_cost_model(model, self.layers, example_input)
        self._cost = self._macs if self.unit == "macs" else filters_cost_model(self.layers)
        self._floors = filter_floors(self._macs.filters, min_filters, min_filter_share)
        check_reachable(self._cost, self._cost.budget(self.target_cut), self._floors)
        _check_trained(model, optimizer, self._tensors())

        self.plan = make_plan(self.layers, {}, self._macs, example_input.shape[1:], unit=self.unit)
        self.epochs_done, self._snapshots = 0, {layer.name: Snapshot() for layer in self.layers}
        self._silence = Silence(self._tensors())
        optimizer.register_step_post_hook(self._silence.hold_)

    def end_epoch(self, make_losses: MakeLosses) -> PruneStep | None:
        """Count one completed epoch; if a pruning step is due, do it and say what it did.

        Args:
            make_losses: a function that yields the pulse's losses, one training batch each, at least 2 and up
                to `pulse_batches`; called only at a pulse, inside a fork of torch's default generators, without
                autocast. The losses may come from a DistributedDataParallel or compiled wrapper of the model.
                What else they pass through (a head, a learned temperature) gets no gradient from the pulse if
                `optimizer` trains it; other optimisers' gradients, and statistics, are the caller's to clear.

        Raises:
            InputError: make_losses is no function, too few losses came, a gradient is missing, it or a weight is
                not finite, a pulse is due in evaluation mode, something else than the optimiser wrote the affine of
                a pruned filter, all epochs are over, or the ranks of a distributed run disagree; the network is then
                as before the call.
        """
        if not self._silence.holds():
            raise InputError(
                "a pruned filter came back to life: nothing but the optimizer's step may write parameters"
            )
        if not callable(make_losses):
            raise InputError(
                "make_losses must be a function: losses made beforehand were computed before the pulse"
            )
        if self.epochs_done == self.schedule.total_epochs:
            raise InputError(f"all {self.schedule.total_epochs} epochs of the schedule are over")
        due = self.epochs_done + 1 in self.schedule.steps
        if due and self.protection and not self.model.training:
            raise InputError(
                "call end_epoch before model.eval(): the pulse sees the network as it trains"
            )
        step = self._step(self.epochs_done + 1, make_losses) if due else None
        self.epochs_done += 1
        return step

    def _step(self, epochs_done: int, make_losses: MakeLosses) -> PruneStep:
        began = time.perf_counter()
        target = self.target_cut * self.schedule.ramp(epochs_done)
        tensors, earlier = self._tensors(), self.plan.pruned
        for name in [name for name, filters in earlier.items() if filters]:
            refresh_(tensors[name], self._snapshots[name])

        weights = {name: t.parameters[f"{name}.weight"] for name, t in tensors.items()}
        sparsity = self._sparsity(weights)
        kept = filter_counts(
            [*sparsity.values()], self._cost, self._cost.budget(target), self._floors, self.alpha
        )
        norms = self._norms(weights)
        anew = self._propose(norms, kept)
        snapshots = {
            name: suspend_(tensors[name], filters, self._snapshots[name])
            for name, filters in anew.items()
        }
        proposed = {name: tuple(sorted(snapshot.filters)) for name, snapshot in snapshots.items()}
        try:
            seen = Supervision({}, {}, {})
            if self.protection and any(proposed.values()):
                seen = pulse(self.model, tensors, snapshots, make_losses, self.pulse_batches)
                self.optimizer.zero_grad()  # also of what the losses pass through outside the model
            restored = self._protect(seen, norms, anew, kept)
            suspended = {
                name: set(filters).difference(restored[name]) for name, filters in proposed.items()
            }
            plan = make_plan(
                self.layers, suspended, self._macs, self.plan.input_shape, target, self.unit
            )
            _check_same_plan_on_all_ranks(plan)
        except BaseException:
            for name, filters in anew.items():
                restore_(tensors[name], snapshots[name].select(filters))
            self.optimizer.zero_grad()
            raise
        self.plan = plan
        for name, pruned in plan.pruned.items():
            if restored[name]:
                restore_(tensors[name], snapshots[name].select(restored[name]))
                snapshots[name] = snapshots[name].select(pruned)
            if epochs_done == self.schedule.freeze:
                freeze_(tensors[name], pruned)
                snapshots[name] = Snapshot()
        self._snapshots = snapshots
        self._silence.set_(plan.pruned)
        changed = sum(
            len(set(earlier[name]).symmetric_difference(now)) for name, now in plan.pruned.items()
        )
        return PruneStep(
            epochs_done,
            plan,
            sparsity,
            proposed,
            restored,
            seen.utility,
            seen.grad_norm_live,
            seen.grad_norm_suspended,
            changed / sum(self._macs.filters),
            time.perf_counter() - began,
        )

    def _sparsity(self, weights: dict[str, Tensor]) -> dict[str, float]:
        return weight_sparsity_ratio(
            weights, kappa=self.kappa, fan=self.fan, reference=self.sparsity_reference
        )

    def _norms(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        norms = torch.cat(
            [filter_norms(weight) for weight in weights.values()]
        ).cpu()  # one transfer
        if not norms.isfinite().all():
            raise InputError("a weight is not finite: the training has diverged")
        return dict(zip(weights, torch.split(norms, list(self._macs.filters)), strict=True))

    def _propose(self, norms: dict[str, Tensor], kept: list[int]) -> Filters:
        anew = {}
        for part, k, floor in zip(self.plan.layers, kept, self._floors, strict=True):
            margin = pulse_margin(part.filters - k, k, floor, self.margin) if self.protection else 0
            anew[part.name] = propose(norms[part.name], part.pruned, part.filters - k, margin)
        return anew

    def _protect(
        self, seen: Supervision, norms: dict[str, Tensor], anew: Filters, kept: list[int]
    ) -> Filters:
        restored = {}
        for part, k, new in zip(self.plan.layers, kept, anew.values(), strict=True):
            utility = seen.utility.get(part.name)  # without a pulse, the largest norms come back
            scores = {
                f: utility[f][0] if utility else norms[part.name][f].item()
                for f in (*part.pruned, *new)
            }
            restored[part.name] = choose_restored(scores, part.pruned, new, part.filters - k)
        return restored

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the model's and the optimiser's state; loads with weights_only."""
        rows = {
            n: saved.select(self.plan.pruned[n]).rows
            for n, saved in self._snapshots.items()
            if saved.rows
        }
        standing = {"epochs_done": self.epochs_done, "plan": self.plan.to_json(), "snapshots": rows}
        return {"settings": self._settings()} | standing

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; load the model's and the optimiser's state first.

        Raises:
            InputError: the state is of another network or another configuration, or the model's is not loaded yet.
        """
        was, now = state.get("settings", {}), self._settings()
        for name in [name for name in now | was if was.get(name) != now.get(name)]:
            raise InputError(
                f"the pruner's state was saved with {name} {was.get(name)}, this run has {now.get(name)}"
            )
        plan, device = PrunePlan.from_json(state["plan"]), next(self.model.parameters()).device
        self._silence.set_(plan.pruned)
        if not self._silence.holds():
            self._silence.set_(self.plan.pruned)
            raise InputError(
                "filters that the pruner's state suspends are live: load the model's state first"
            )
        self.epochs_done, self.plan = state["epochs_done"], plan
        for n, pruned in plan.pruned.items():
            rows = {
                key: tensor.to(device, copy=True)
                for key, tensor in state["snapshots"].get(n, {}).items()
            }
            self._snapshots[n] = Snapshot(pruned if rows else (), rows)

    def _settings(self) -> dict[str, Any]:
        return {
            "layers": ", ".join(f"{layer.name}[{layer.filters}]" for layer in self.layers),
            "input": list(self.plan.input_shape),
            "target": [self.target_cut, self.unit],
            "schedule": list(astuple(self.schedule)),
            "ratios": [self.kappa, self.sparsity_reference, self.fan, self.alpha, *self._floors],
            "pulse": [self.protection, self.pulse_batches, self.margin],
        }

    def _tensors(self) -> dict[str, FilterTensors]:
        return {
            layer.name: filter_tensors(self.model, layer, self.optimizer) for layer in self.layers
        }


def _check_trained(
    model: nn.Module, optimizer: Optimizer, tensors: dict[str, FilterTensors]
) -> None:
    optimised = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    for name, parameter in (
        pair for layer in tensors.values() for pair in layer.parameters.items()
    ):
        if owners[id(parameter)] > 1:
            raise InputError(
                f"{name!r} of a layer to be pruned is shared with another module; exclude that layer"
            )
        if id(parameter) not in optimised or not parameter.requires_grad:
            raise InputError(
                f"the optimizer does not train {name!r} of a layer to be pruned; exclude that layer"
            )
        if parameter.dtype.itemsize < 4:
            raise InputError(
                f"{name!r} is {parameter.dtype}: keep parameters in float32 and let autocast halve them"
            )


def _check_same_plan_on_all_ranks(plan: PrunePlan) -> None:
    if distributed.is_available() and distributed.is_initialized():
        digests = [""] * distributed.get_world_size()
        distributed.all_gather_object(digests, plan.digest)
        if len(set(digests)) > 1:
            raise InputError(
                "the ranks made different plans: make_losses must use the wrapper that reduces gradients"
            )
