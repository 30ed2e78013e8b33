"""PSAP with one rule changed: controls and alternatives of the study. None of them is part of the method.

stage_width     s_l of eq. 1 becomes the mean over the layers of as many filters: what a layer's stage alone says.
permuted        Every layer gets the s_l of the next one in a ring, whose order is drawn once, from the run's seed.
return_exact    Eq. 6 restores the filters of highest utility whenever they were suspended: those of earlier steps,
                after an epoch of recovery, and those proposed anew compete for the same places, where a count grows.
return_graded   The same, but a filter of an earlier step returns with GRADE times its affine and the affine's momentum.
"""

from collections import defaultdict
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from experiments.schema import Rule
from psap_core import PSAP, InputError, PruneStep, Supervision, choose_restored, filter_tensors

GRADE = 0.1
RETURNS = (Rule.return_exact, Rule.return_graded)
Filters = dict[str, tuple[int, ...]]


class PSAPVariant(PSAP):
    """See the module's description; `seed` draws the permutation, all else is as in PSAP."""

    def __init__(self, *args: Any, rule: Rule, seed: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if rule in RETURNS and not self.protection:
            raise InputError(
                f"method.rule={rule.value} chooses by the pulse: it needs method.protection=true"
            )
        self.rule = rule
        self.order = torch.randperm(
            len(self.layers), generator=torch.Generator().manual_seed(seed)
        ).tolist()

    def _sparsity(self, weights: dict[str, Tensor]) -> dict[str, float]:
        ratios = super()._sparsity(weights)
        if self.rule is Rule.stage_width:
            of_width = defaultdict(list)
            for layer in self.layers:
                of_width[layer.filters].append(ratios[layer.name])
            return {layer.name: fmean(of_width[layer.filters]) for layer in self.layers}
        if self.rule is Rule.permuted:
            ring = [self.layers[l].name for l in self.order]
            shifted = dict(zip(ring, [*ring[1:], ring[0]], strict=True))
            return {name: ratios[shifted[name]] for name in ratios}
        return ratios

    def _protect(
        self, seen: Supervision, norms: dict[str, Tensor], anew: Filters, kept: list[int]
    ) -> Filters:
        if self.rule not in RETURNS:
            return super()._protect(seen, norms, anew, kept)
        counts = {
            part.name: part.filters - k for part, k in zip(self.plan.layers, kept, strict=True)
        }
        means = {
            name: {f: mean for f, (mean, _) in found.items()}
            for name, found in seen.utility.items()
        }
        return {
            name: choose_restored(means.get(name, {}), (), tuple(means.get(name, ())), count)
            for name, count in counts.items()
        }

    @torch.no_grad()
    def _step(self, epochs_done: int, make_losses: Callable[..., Any]) -> PruneStep:
        earlier = self.plan.pruned
        step = super()._step(epochs_done, make_losses)
        if self.rule is Rule.return_graded:
            for layer in self.layers:
                tensors = filter_tensors(self.model, layer, self.optimizer)
                returned = tensors.index(set(earlier[layer.name]) & set(step.restored[layer.name]))
                momenta = [
                    state
                    for name, state in tensors.state.items()
                    if name.startswith(tensors.affine)
                ]
                for affine in (tensors.gamma, tensors.beta, *momenta):
                    affine[returned] *= GRADE
        return step

    def _settings(self) -> dict[str, Any]:
        return super()._settings() | {"rule": [self.rule.value, *self.order]}
