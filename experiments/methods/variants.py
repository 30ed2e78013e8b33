"""PSAP with one rule changed: controls and alternatives of the study. None of them is part of the method.

stage_width     s_l of eq. 1 becomes the mean over the layers of as many filters: what a layer's stage alone says.
permuted        Every layer gets the s_l of the next one in a ring, whose order is drawn once, from the run's seed.
return_exact    Eq. 6 restores the filters of highest utility whenever they were suspended: those of earlier steps,
                after an epoch of recovery, and those proposed anew compete for the same places, where a count grows.
return_graded   The same, but a filter of an earlier step returns with GRADE times its silencers and their momentum.
lowest_utility  Eq. 6 the wrong way round: the filters of the lowest utility are restored. What this costs bounds what a
                better choice can gain.
streams_only    Eq. 6 protects groups of several writers (residual streams) only; elsewhere the norm decides.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from experiments.methods.psap import PSAPCallback, callback
from experiments.methods.registry import MethodContext, register
from experiments.schema import PSAPVariantConfig, Rule
from psap_core import PSAP, InputError, PruneStep
from psap_core.pruner import Filters
from psap_core.sparsity import FilterRows
from psap_core.supervision import LossOfBatch, Supervision, choose_restored
from psap_core.suspension import FilterTensors

GRADE = 0.1
RETURNS = (Rule.return_exact, Rule.return_graded)
BY_PULSE = (*RETURNS, Rule.lowest_utility, Rule.streams_only)


class PSAPVariant(PSAP):
    """See the module's description; `seed` draws the permutation, all else is as in PSAP."""

    def __init__(self, *args: Any, rule: Rule, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if rule in BY_PULSE and not self.settings.protection:
            raise InputError(
                f"method.rule={rule.value} chooses by the pulse: it needs method.protection=true"
            )
        streams = [group for group in self.groups if len(group.writers) > 1]
        if rule is Rule.streams_only and not streams:
            raise InputError(
                "method.rule=streams_only needs groups of several writers: take method.scope=coupled"
            )
        self.rule = rule
        self.order = torch.randperm(
            len(self.groups), generator=torch.Generator().manual_seed(seed)
        ).tolist()

    def _sparsity(self, writers: Mapping[str, Sequence[FilterRows]]) -> dict[str, float]:
        ratios = super()._sparsity(writers)
        if self.rule is Rule.stage_width:
            of_width = defaultdict(list)
            for group in self.groups:
                of_width[group.filters].append(ratios[group.name])
            return {group.name: fmean(of_width[group.filters]) for group in self.groups}
        if self.rule is Rule.permuted:
            ring = [self.groups[l].name for l in self.order]
            shifted = dict(zip(ring, [*ring[1:], ring[0]], strict=True))
            return {name: ratios[shifted[name]] for name in ratios}
        return ratios

    def _protect(
        self,
        supervision: Supervision,
        norms: Mapping[str, Tensor],
        proposals: Filters,
        kept: Sequence[int],
    ) -> Filters:
        if self.rule not in RETURNS:
            return super()._protect(self._seen(supervision), norms, proposals, kept)
        restored = {}
        for part, k in zip(self.plan.layers, kept, strict=True):
            utility = supervision.utility.get(part.name, {})
            means = {f: mean for f, (mean, _) in utility.items()}
            restored[part.name] = choose_restored(means, (), tuple(means), part.filters - k)
        return restored

    def _seen(self, supervision: Supervision) -> Supervision:
        """What eq. 6 takes for the utilities."""
        utility = supervision.utility
        if self.rule is Rule.lowest_utility:
            utility = {
                name: {f: (-mean, error) for f, (mean, error) in of_filters.items()}
                for name, of_filters in utility.items()
            }
        if self.rule is Rule.streams_only:
            streams = {group.name for group in self.groups if len(group.writers) > 1}
            utility = {name: of_filters for name, of_filters in utility.items() if name in streams}
        return replace(supervision, utility=utility)

    def _step(
        self,
        tensors: dict[str, FilterTensors],
        epochs_done: int,
        batches: Iterable[Any],
        loss_of_batch: LossOfBatch,
    ) -> PruneStep:
        earlier = self.plan.pruned
        step = super()._step(tensors, epochs_done, batches, loss_of_batch)
        if self.rule is Rule.return_graded:
            for name, group in tensors.items():
                returned = {*earlier[name]} & {*step.restored[name]}
                _grade_(group, group.index(returned))
        return step

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"rule": [self.rule.value, *self.order]}


@torch.no_grad()
def _grade_(tensors: FilterTensors, filters: Tensor) -> None:
    """Multiply what silences these filters, and its optimiser state, by GRADE; untrained constants stay."""
    silencers = [name for name in tensors.silencers if name not in tensors.constants]
    graded = [tensors.parameters[name] for name in silencers]
    for name, rows in tensors.state.items():
        if name.rpartition(":")[0] in silencers:
            graded.append(rows)
    for rows in graded:
        rows.put_(filters, rows.take(filters) * GRADE)


@register(PSAPVariantConfig, "psap_variant")
def make(context: MethodContext) -> PSAPCallback:
    method = context.cfg.method
    assert isinstance(method, PSAPVariantConfig)
    return callback(context, partial(PSAPVariant, rule=method.rule, seed=context.cfg.seed))
