"""PSAP: the glue. Every equation is a function elsewhere; this class decides when, and keeps the snapshots."""

import time
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from psap_core.allocation import filter_counts, filter_floors
from psap_core.cost import filters_cost_model, macs_cost_model
from psap_core.errors import InputError
from psap_core.exported import rehearse
from psap_core.groups import Scope, search_groups
from psap_core.inputs import Example, describe, shapes_of
from psap_core.plan import PrunePlan, make_plan
from psap_core.reporting import Report, make_report
from psap_core.scoring import filter_norms, joint_scores, propose, pulse_margin
from psap_core.settings import make_settings
from psap_core.sparsity import FilterRows, weight_sparsity_ratio
from psap_core.supervision import LossOfBatch, Supervision, choose_restored, pulse
from psap_core.surgery import cut_
from psap_core.suspension import (
    PRUNERS,
    SERVING,
    FilterMask,
    FilterTensors,
    Snapshot,
    freeze_,
    optimizers_in,
    restore_,
    silence_,
    suspend_,
    tensors_by_group,
)

Filters = dict[str, tuple[int, ...]]
Optimizers = Optimizer | Sequence[Optimizer]


@dataclass(frozen=True)
class PruneStep:
    """What one pruning step saw and did; dictionaries go by group name.

    Attributes:
        epochs_done: completed epochs at the step.
        plan: the plan that stands now; its budget is met.
        weight_sparsity_ratio: s_l of eq. 1.
        proposed: filters that stood suspended during the pulse, earlier ones included.
        restored: filters given back, exactly.
        utility: proposed filter to (mean, standard error) of eq. 5; empty without a pulse.
        grad_norm_live: mean norm of the live silencers' gradient in the pulse; empty without one.
        grad_norm_suspended: the same of the suspended ones.
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

    def __str__(self) -> str:
        pruned = sum(map(len, self.plan.pruned.values()))
        restored = sum(map(len, self.restored.values()))
        return (
            f"epoch {self.epochs_done}: {100 * self.plan.macs_cut:.1f} % of the MACs cut, {pruned} filters pruned, "
            f"{restored} given back"
        )


class PSAP:
    """Protective Self-Adaptive Pruning of a network while it trains.

    Call `end_epoch` when an epoch is complete, before any switch to evaluation mode. Between steps the only
    cost is an optimiser step hook that keeps what silences suspended filters at zero.

    Args:
        model: the bare network; not wrapped in DistributedDataParallel or torch.compile.
        optimizer: the optimiser that trains it, or a list of them; a wrapper that holds one as `.optimizer` will do.
        example_input: one input batch on the network's device: a tensor, or a tuple or dictionary of what forward
            takes.
        zero_preserving: torch operations and module classes that keep channels and map 0 to 0, beside the known ones.
        settings: the fields of `Settings`: target_macs_cut or target_filters_cut, total_epochs, scope, ...

    Attributes:
        groups: the channel groups that can be pruned.
        plan: which filters are suspended or pruned now.
        report: what can be pruned, what is left alone and why.

    Raises:
        InputError: a setting is out of its range, the target cannot be reached, the model is wrapped, has no prunable
            filter or does not survive a trial export, a pruned parameter is in half precision, or an optimiser serves
            another PSAP.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        example_input: Example,
        *,
        zero_preserving: Collection[Any] = (),
        **settings: Any,
    ) -> None:
        self.settings = make_settings(settings)
        self.schedule = self.settings.schedule
        _check_bare(model)
        self.model = model
        self.optimizers = _bare_optimizers(optimizer)
        search = search_groups(
            model,
            example_input,
            scope=self.settings.scope,
            exclude=self.settings.exclude,
            zero_preserving=zero_preserving,
            trained=_trained_names(model, self.optimizers),
        )
        self.groups = search.groups
        self.macs_cost = macs_cost_model(model, self.groups, example_input)
        self._cost = self.macs_cost
        if self.settings.unit == "filters":
            self._cost = filters_cost_model(self.groups)
        self._floors = filter_floors(
            self._cost.filters,
            self.settings.min_filters,
            self.settings.min_filter_share,
            self.settings.round_to,
        )
        self.report = make_report(model, search, self.macs_cost, self._floors, example_input)
        self._check_reachable()
        tensors = tensors_by_group(model, self.groups, self.optimizers)
        _check_precision(tensors)
        inputs = describe(example_input)
        rehearse(model, self.groups, self.settings.scope, inputs, self._floors)

        self.plan = make_plan(
            self.groups,
            {},
            self.macs_cost,
            inputs,
            self.settings.scope,
            unit=self.settings.unit,
        )
        self.epochs_done = 0
        self.is_compact = False
        self._snapshots = {group.name: Snapshot() for group in self.groups}
        self._mask = FilterMask(tensors)
        self._hooks: list[Any] = []
        self._hook()
        PRUNERS[model] = ref(self)

    @property
    def plan_is_final(self) -> bool:
        """The last pruning step is done: what is pruned now stays pruned, and `compact_` may be called."""
        return self.epochs_done >= self.schedule.freeze

    def use(self, optimizer: Optimizers) -> None:
        """Go on with another optimiser, or several; the former ones are free for something else.

        Raises:
            InputError: an optimiser serves another PSAP, or does not train every filter that can be pruned, or the
                network's parameters are other objects now.
        """
        successors = _bare_optimizers(optimizer, mine=self.optimizers)
        everything = {name for name, _ in self.model.named_parameters()}
        untrained = everything - _trained_names(self.model, successors)
        for group in self.groups:
            for member in group.members:
                if member.tensor in untrained:
                    raise InputError(
                        f"the new optimizer does not train {member.tensor!r}, which is pruned"
                    )
        if not self.is_compact:
            _ = self._tensors()  # which refuses other parameters than at the start
        self._unhook()
        self.optimizers = successors
        if not self.is_compact:
            self._hook()

    def end_epoch(self, batches: Iterable[Any], loss_of_batch: LossOfBatch) -> PruneStep | None:
        """Count one completed epoch; if a pruning step is due, do it and say what it did.

        Args:
            batches: training batches for the pulse, as the loader of the training makes them: at least 2, and up to
                `pulse_batches` are used. They are iterated at a pulse only, inside a fork of torch's default
                generators.
            loss_of_batch: makes a batch's scalar loss, one forward pass; called without autocast. It may use a
                DistributedDataParallel or compiled wrapper of the model. What else the loss passes through (a head, a
                learned temperature) gets no gradient from the pulse if the optimiser trains it; other optimisers'
                gradients, and statistics, are the caller's to clear.

        Raises:
            InputError: loss_of_batch is no function, too few batches came, a gradient is missing, it or a weight is
                not finite, a pulse is due in evaluation mode, something else than the optimiser wrote what silences a
                pruned filter, or the ranks of a distributed run disagree; the network is then as before the call.

        Warns:
            UserWarning: at the first call beyond `total_epochs`.
        """
        if self.epochs_done == self.schedule.total_epochs:
            warnings.warn(
                f"end_epoch is called more than total_epochs={self.schedule.total_epochs} times: it belongs after an "
                "epoch, not after a batch",
                stacklevel=2,
            )
        tensors = {} if self.is_compact else self._silent_tensors()
        if self.settings.protection and not isinstance(batches, Iterable | Sequence):
            raise InputError(f"batches must be an iterable of them, not {type(batches).__name__}")
        if not callable(loss_of_batch):
            raise InputError(
                "loss_of_batch must be a function of a batch: losses made beforehand were computed before the pulse"
            )
        due = self.schedule.is_step(self.epochs_done + 1)
        if due and self.settings.protection and not self.model.training:
            raise InputError(
                "call end_epoch before model.eval(): the pulse sees the network as it trains"
            )
        step = None
        if due:
            step = self._step(tensors, self.epochs_done + 1, batches, loss_of_batch)
        self.epochs_done += 1
        return step

    def compact_(self) -> None:
        """Make the live network and its optimisers' state small, once the plan is final (eq. 7).

        Model, parameters, optimisers and schedulers stay the same objects. Whatever wraps the network
        (DistributedDataParallel, torch.compile, a captured graph) is to be made anew.

        Raises:
            InputError: the freeze is not over yet, a pruned filter is live, or an optimiser keeps state that cannot be
                cut; the network is then as before the call.
        """
        if self.is_compact:
            return
        if not self.plan_is_final:
            raise InputError(
                f"compact_ comes after the freeze: {self.epochs_done} of {self.schedule.freeze} epochs are complete"
            )
        self._silent_tensors()
        self._cut_()

    def _cut_(self) -> None:
        cut_(self.model, self.groups, self.plan, self.optimizers)
        self._unhook()
        self.is_compact = True

    # ------------------------------------------------------------------------ a step

    def _step(
        self,
        tensors: dict[str, FilterTensors],
        epochs_done: int,
        batches: Iterable[Any],
        loss_of_batch: LossOfBatch,
    ) -> PruneStep:
        began = time.perf_counter()
        target = self.settings.target_cut * self.schedule.ramp(epochs_done)
        earlier = self.plan.pruned
        sparsity, norms = self._measure(tensors)
        kept = self._kept(sparsity, target)
        proposals = self._propose(norms, kept)
        snapshots = {
            name: suspend_(tensors[name], filters, self._snapshots[name])
            for name, filters in proposals.items()
        }
        candidates = {name: tuple(sorted(saved.filters)) for name, saved in snapshots.items()}
        try:
            supervision = self._supervise(tensors, snapshots, batches, loss_of_batch)
            restored = self._protect(supervision, norms, proposals, kept)
            suspended = {n: {*filters}.difference(restored[n]) for n, filters in candidates.items()}
            plan = self._plan(suspended, target)
            _check_same_plan_on_all_ranks(plan)
        except BaseException:
            for name, filters in proposals.items():
                restore_(tensors[name], snapshots[name].select(filters))
            self._clear_gradients()
            raise
        self._adopt(plan, tensors, snapshots, restored, epochs_done)
        changes = sum(
            len({*earlier[n]}.symmetric_difference(filters)) for n, filters in plan.pruned.items()
        )
        return PruneStep(
            epochs_done,
            plan,
            sparsity,
            candidates,
            restored,
            supervision.utility,
            supervision.grad_norm_live,
            supervision.grad_norm_suspended,
            changes / sum(self._cost.filters),
            time.perf_counter() - began,
        )

    def _measure(
        self, tensors: Mapping[str, FilterTensors]
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Sparsity ratios and norms; a suspended filter counts with its snapshot, which undoes weight decay too."""
        snapshots = {name: saved for name, saved in self._snapshots.items() if saved.filters}
        for name, saved in snapshots.items():
            restore_(tensors[name], saved)
        try:
            writers = {name: group.filter_rows() for name, group in tensors.items()}
            return self._sparsity(writers), self._norms(writers)
        finally:
            for name, saved in snapshots.items():
                silence_(tensors[name], saved.filters)

    def _sparsity(self, writers: Mapping[str, Sequence[FilterRows]]) -> dict[str, float]:
        return weight_sparsity_ratio(
            writers,
            kappa=self.settings.kappa,
            fan=self.settings.fan,
            reference=self.settings.sparsity_reference,
        )

    def _norms(self, writers: Mapping[str, Sequence[FilterRows]]) -> dict[str, Tensor]:
        scores = [
            joint_scores([filter_norms(writer.rows) for writer in group])
            for group in writers.values()
        ]
        norms = torch.cat(scores).cpu()  # one transfer
        if not norms.isfinite().all():
            raise InputError("a weight is not finite: the training has diverged")
        return dict(zip(writers, torch.split(norms, list(self._cost.filters)), strict=True))

    def _kept(self, sparsity: Mapping[str, float], target: float) -> list[int]:
        return filter_counts(
            [*sparsity.values()],
            self._cost,
            self._cost.budget(target),
            self._floors,
            self.settings.alpha,
            self.settings.round_to,
        )

    def _propose(self, norms: Mapping[str, Tensor], kept: Sequence[int]) -> Filters:
        proposals = {}
        for part, k, floor in zip(self.plan.layers, kept, self._floors, strict=True):
            margin = 0
            if self.settings.protection:
                margin = pulse_margin(part.filters - k, k, floor, self.settings.margin)
            proposals[part.name] = propose(norms[part.name], part.pruned, part.filters - k, margin)
        return proposals

    def _supervise(
        self,
        tensors: Mapping[str, FilterTensors],
        snapshots: Mapping[str, Snapshot],
        batches: Iterable[Any],
        loss_of_batch: LossOfBatch,
    ) -> Supervision:
        if not self.settings.protection or not any(saved.filters for saved in snapshots.values()):
            return Supervision({}, {}, {})
        count = self.settings.pulse_batches
        supervision = pulse(self.model, tensors, snapshots, batches, loss_of_batch, count)
        self._clear_gradients()  # also of what the losses pass through outside the model
        return supervision

    def _protect(
        self,
        supervision: Supervision,
        norms: Mapping[str, Tensor],
        proposals: Filters,
        kept: Sequence[int],
    ) -> Filters:
        restored = {}
        for part, k, proposal in zip(self.plan.layers, kept, proposals.values(), strict=True):
            utility = supervision.utility.get(part.name)
            sizes = norms[part.name].tolist()
            scores = {}
            for f in (*part.pruned, *proposal):  # without a pulse, the largest norms come back
                scores[f] = utility[f][0] if utility else sizes[f]
            restored[part.name] = choose_restored(scores, part.pruned, proposal, part.filters - k)
        return restored

    def _plan(self, suspended: Mapping[str, Collection[int]], target: float) -> PrunePlan:
        return make_plan(
            self.groups,
            suspended,
            self.macs_cost,
            self.plan.inputs,
            self.settings.scope,
            target,
            self.settings.unit,
        )

    def _adopt(
        self,
        plan: PrunePlan,
        tensors: Mapping[str, FilterTensors],
        snapshots: dict[str, Snapshot],
        restored: Filters,
        epochs_done: int,
    ) -> None:
        self.plan = plan
        for name, pruned in plan.pruned.items():
            if restored[name]:
                restore_(tensors[name], snapshots[name].select(restored[name]))
                snapshots[name] = snapshots[name].select(pruned)
            if epochs_done == self.schedule.freeze:
                freeze_(tensors[name], pruned)
                snapshots[name] = Snapshot()
        self._snapshots = snapshots
        self._mask.set_(plan.pruned)

    # ------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides the model's and the optimiser's state; loads with weights_only."""
        rows = {
            name: saved.select(self.plan.pruned[name]).rows
            for name, saved in self._snapshots.items()
            if saved.rows
        }
        return {
            "settings": self._identity(),
            "epochs_done": self.epochs_done,
            "plan": self.plan.to_json(),
            "snapshots": rows,
            "is_compact": self.is_compact,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        The model's and the optimiser's states are loaded before it; of a compact network after it, because this makes
        a dense one compact.

        Raises:
            InputError: the state is of another network or another configuration, or the model's is not loaded yet.
        """
        if not isinstance(state, Mapping):
            raise InputError(f"the pruner's state must be a dictionary, not {type(state).__name__}")
        self._check_settings(state.get("settings", {}))
        _check_state(state, self.schedule.total_epochs)
        plan = PrunePlan.from_json(state["plan"])
        if self.is_compact and (not state["is_compact"] or plan.digest != self.plan.digest):
            raise InputError(
                "this network is compact already, and not by the state's plan: build network, optimizer and pruner anew"
            )
        if state["is_compact"]:
            self.plan, self.epochs_done = plan, state["epochs_done"]
            if not self.is_compact:
                self._mask.set_(plan.pruned)
                self._cut_()
            return
        self._check_snapshots(state, plan)
        self._mask.set_(plan.pruned)
        if not self._mask.holds():
            self._mask.set_(self.plan.pruned)
            raise InputError(
                "filters that the pruner's state suspends are live: load the model's state first"
            )
        self.epochs_done, self.plan = state["epochs_done"], plan
        device = next(self.model.parameters()).device
        for name, pruned in plan.pruned.items():
            saved = state["snapshots"].get(name, {})
            rows = {key: tensor.to(device, copy=True) for key, tensor in saved.items()}
            self._snapshots[name] = Snapshot(pruned if rows else (), rows)

    def _check_settings(self, was: Any) -> None:
        if not isinstance(was, dict):
            raise InputError("the pruner's state is damaged: its settings are no dictionary")
        now = self._identity()
        for name in now | was:
            if was.get(name) != now.get(name):
                raise InputError(
                    f"the pruner's state was saved with {name} {was.get(name)}, this run has {now.get(name)}"
                )

    def _check_snapshots(self, state: Mapping[str, Any], plan: PrunePlan) -> None:
        tensors = self._tensors()
        plan.match(self.groups)
        is_frozen = state["epochs_done"] >= self.schedule.freeze
        for name, pruned in plan.pruned.items():
            rows = state["snapshots"].get(name, {})
            if rows or (pruned and not is_frozen):
                _check_snapshot(name, rows, tensors[name], pruned)

    def _identity(self) -> dict[str, Any]:
        """What two runs must share so that one may continue the other, by name."""
        settings = asdict(self.settings)
        for name in ("total_epochs", "start", "ramp_end", "freeze", "interval"):
            del settings[name]
        settings["exclude"] = sorted(self.settings.exclude)
        return settings | {
            "schedule": [*astuple(self.schedule)],
            "groups": ", ".join(f"{group.name}[{group.filters}]" for group in self.groups),
            "inputs": shapes_of(self.plan.inputs),
        }

    # ------------------------------------------------------------------------ optimisers

    def _tensors(self) -> dict[str, FilterTensors]:
        """The groups' tensors; refused if they are not those that the mask holds."""
        tensors = tensors_by_group(self.model, self.groups, self.optimizers)
        if not self._mask.fits(tensors):
            raise InputError(
                "the network's parameters are other objects than at the start, or on another device (load_state_dict "
                "with assign=True, a replaced module, to()): build a new pruner and load this one's state"
            )
        return tensors

    def _silent_tensors(self) -> dict[str, FilterTensors]:
        """The same; refused if a pruned filter is live."""
        tensors = self._tensors()
        if not self._mask.holds():
            raise InputError(
                "a pruned filter came back to life: nothing but the optimizer's step may write parameters"
            )
        return tensors

    def _hook(self) -> None:
        for optimizer in self.optimizers:
            self._hooks.append(optimizer.register_step_post_hook(self._mask.hold_))
            SERVING.add(optimizer)

    def _unhook(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for optimizer in self.optimizers:
            SERVING.discard(optimizer)

    def _clear_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _check_reachable(self) -> None:
        if not self.groups:
            raise InputError(
                f"{type(self.model).__name__} has nothing to prune: {self.report.costliest()}"
            )
        most = 1 - self._cost.cost(self._floors) / self._cost.dense
        target = self.settings.target_cut
        if self._cost.cost(self._floors) > self._cost.budget(target):
            raise InputError(
                f"a cut of {target:.4f} is unreachable: at most {most:.4f} can go; {self.report.costliest()}"
            )


def report(
    model: nn.Module,
    example_input: Example,
    *,
    scope: Scope = "coupled",
    exclude: Collection[str] = (),
    zero_preserving: Collection[Any] = (),
) -> Report:
    """What can be pruned of a network, what is left alone and why, and the largest reachable cut.

    Args:
        model: any network that runs; it is left as it is.
        example_input: an input batch: a tensor, or a tuple or dictionary of what forward takes.
        scope: as for PSAP, and so are the following.
        exclude: names of modules to leave alone.
        zero_preserving: operations that map 0 to 0, channel by channel.
    """
    search = search_groups(
        model, example_input, scope=scope, exclude=exclude, zero_preserving=zero_preserving
    )
    cost = macs_cost_model(model, search.groups, example_input)
    return make_report(model, search, cost, filter_floors(cost.filters), example_input)


def _check_state(state: Mapping[str, Any], total_epochs: int) -> None:
    """Refuse a state that no run saved."""
    for name in ("plan", "epochs_done", "snapshots", "is_compact"):
        if name not in state:
            raise InputError(f"the pruner's state is damaged: it has no {name!r}")
    epochs_done = state["epochs_done"]
    if not isinstance(epochs_done, int) or not 0 <= epochs_done <= total_epochs:
        raise InputError(
            f"the pruner's state is damaged: it has {epochs_done!r} of {total_epochs} epochs done"
        )
    if not isinstance(state["is_compact"], bool):
        raise InputError("the pruner's state is damaged: is_compact is not True or False")
    snapshots = state["snapshots"]
    if not isinstance(snapshots, Mapping) or not all(map(_is_snapshot, snapshots.values())):
        raise InputError("the pruner's state is damaged: it holds no snapshots")


def _check_snapshot(
    group: str, rows: Mapping[str, Tensor], tensors: FilterTensors, filters: Sequence[int]
) -> None:
    """Refuse rows that are not those of a group's suspended filters. Optimiser state may exist yet, or not."""
    index = tensors.index(filters)
    expected = tensors.parameters | tensors.buffers
    if not expected.keys() <= rows.keys():
        raise InputError(f"the pruner's state is damaged: its snapshot of {group!r} lacks tensors")
    for name, own in tensors.everything.items():
        saved, own_rows = rows.get(name), own.take(index)
        if saved is not None and (saved.shape, saved.dtype) != (own_rows.shape, own_rows.dtype):
            raise InputError(
                f"the pruner's state is damaged: its snapshot of {name!r} is {saved.dtype} {[*saved.shape]}, not "
                f"{own_rows.dtype} {[*own_rows.shape]}"
            )


def _is_snapshot(saved: Any) -> bool:
    return isinstance(saved, Mapping) and all(isinstance(rows, Tensor) for rows in saved.values())


def _check_bare(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"model must be a torch module, not a {type(model).__name__}")
    wrappers = nn.parallel.DistributedDataParallel, nn.DataParallel, torch._dynamo.OptimizedModule
    if isinstance(model, wrappers):
        raise InputError(
            f"model must be bare, not {type(model).__name__}; loss_of_batch may use a wrapper"
        )


def _bare_optimizers(
    optimizer: Optimizers, mine: Sequence[Optimizer] = ()
) -> tuple[Optimizer, ...]:
    """The optimisers themselves, none of which may serve another PSAP."""
    optimizers = optimizers_in(optimizer)
    for each in optimizers:
        if each in SERVING and each not in mine:
            raise InputError("optimizer must be new: this one serves another PSAP")
    return optimizers


def _trained_names(model: nn.Module, optimizers: Sequence[Optimizer]) -> set[str]:
    """Names of the parameters that require gradients and are an optimiser's."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    optimised = {id(parameter) for group in groups for parameter in group["params"]}
    return {
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) in optimised
    }


def _check_precision(tensors: Mapping[str, FilterTensors]) -> None:
    for group in tensors.values():
        for name, rows in group.parameters.items():
            if rows.tensor.dtype.itemsize < 4:
                raise InputError(
                    f"{name!r} is {rows.tensor.dtype}: keep parameters in float32 and let autocast halve them"
                )


def _check_same_plan_on_all_ranks(plan: PrunePlan) -> None:
    if distributed.is_available() and distributed.is_initialized():
        digests = [""] * distributed.get_world_size()
        distributed.all_gather_object(digests, plan.digest)
        if len(set(digests)) > 1:
            raise InputError(
                "the ranks made different plans: loss_of_batch must use the wrapper that reduces gradients"
            )
