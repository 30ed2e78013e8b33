"""One pruning rate for all layers, within a filter: what SFP, FPGM and the one-shot methods share.

Their papers take int(O * rate) filters of every layer, which meets a budget only roughly: the smallest rate that
removes 54 % of ResNet-20's MACs removes 56.6 %. Here eq. 2 of psap_core sets the counts, with alpha 0, so that all
methods are given the same budget, to the filter.

SFP and FPGM prune in scope `all`, as published, the others in `coupled`. There several layers may write the channels
of a group: each one's filters are scored, and the scores joined as PSAP joins its norms
(`psap_core.scoring.joint_scores`).
"""

import time
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.methods.base import Metrics
from experiments.methods.budget import BudgetMethod
from psap_core.scoring import joint_scores


def lowest(scores: Tensor, count: int) -> list[int]:
    """The `count` filters of lowest score [O], ties by index."""
    filters: list[int] = scores.argsort(stable=True)[:count].tolist()
    return filters


class UniformMethod(BudgetMethod):
    """A method that prunes the same share of every channel group; the share follows from the target."""

    def choose(self, counts: Sequence[int]) -> dict[str, list[int]]:
        """The filters to prune, so many of every group, by the method's scores."""
        chosen = {}
        for (name, tensors), count in zip(self.tensors.items(), counts, strict=True):
            scores = [self.scores(writer.rows.detach()) for writer in tensors.filter_rows()]
            chosen[name] = lowest(joint_scores(scores), count)
        return chosen

    @abstractmethod
    def scores(self, rows: Tensor) -> Tensor:
        """Importance of every filter by the rows of one layer that writes it: [O, I, kH, kW] -> [O]."""

    @torch.no_grad()
    def zero_and_adopt(self, epochs_done: int, macs_cut: float) -> Metrics:
        """Choose anew among all filters, zero the weights that write the chosen ones, and make them the plan."""
        began = time.perf_counter()
        pruned = self.choose(self.counts(macs_cut))
        for name, filters in pruned.items():
            tensors = self.tensors[name]
            for writer in tensors.writers:
                tensors.parameters[writer].zero_(tensors.index(filters))
        return self.adopt(pruned, epochs_done, macs_cut, began)

    @torch.no_grad()
    def finish(self) -> None:
        """As in the official small networks: filters go whole; of scattered ones BatchNorm's constant stays."""
        if self.is_compact:
            return
        for group, part in self.plan.match(self.groups):
            tensors = self.tensors[group.name]
            spared = tensors.silencers if group.scattered is not None else ()
            for name, rows in tensors.parameters.items():
                if name not in spared:
                    rows.zero_(tensors.index(part.pruned))
