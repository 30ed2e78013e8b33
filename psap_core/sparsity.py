"""Eq. 1: the weight sparsity ratio of every channel group."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Fan = Literal["in", "out"]
Reference = Literal["network", "layer"]


@dataclass(frozen=True)
class FilterRows:
    """The rows with which one convolution or linear layer writes a group's channels.

    Attributes:
        rows: [filters, ...], of a plain convolution its weight [O, I, kH, kW].
        fan_in: inputs of a filter, as in the layer's initialisation.
        fan_out: the same of its outputs.
    """

    rows: Tensor
    fan_in: int
    fan_out: int

    @classmethod
    def of(cls, weight: Tensor) -> "FilterRows":
        """All rows of a convolution or linear weight [O, I, ...]."""
        return cls(weight, weight[0].numel(), weight[:, 0].numel())


def weight_sparsity_ratio(
    writers: Mapping[str, Sequence[FilterRows]],
    *,
    kappa: float = 0.5,
    fan: Fan = "in",
    reference: Reference = "network",
) -> dict[str, float]:
    """Share of each group's weights that training has left small, in units of their He initialisation.

    s_l = share of the weights w that write group l with |w| sqrt(fan / 2) < kappa R, where R is the root mean square of
    |w| sqrt(fan / 2) over all given weights.

    Args:
        writers: group name to the rows of every layer that writes it.
        kappa: threshold in units of R.
        fan: `in` (I kH kW) or `out` (O kH kW), whichever the network's initialisation used.
        reference: `network` for R as above; `layer`, the ablation's control, for the group's own R.

    Returns:
        Group name to s_l, in [0, 1], counted in float32: exact up to 2^24 weights a layer. It is unchanged when all
        weights are multiplied by one number.
    """
    weights = [writer for group in writers.values() for writer in group]
    group_of = [l for l, group in enumerate(writers.values()) for _ in group]
    norms = torch.stack([torch.linalg.vector_norm(w.rows.detach()) for w in weights]).double()
    fans = [w.fan_in if fan == "in" else w.fan_out for w in weights]
    scale = norms.new_tensor([math.sqrt(f / 2) for f in fans])
    size = norms.new_tensor([w.rows.numel() for w in weights])
    groups = torch.tensor(group_of, device=norms.device)
    square = (norms * scale) ** 2
    group_size = _sum_by_group(size, groups, len(writers))
    if reference == "network":
        mean_square = square.sum() / size.sum()
    else:
        mean_square = (_sum_by_group(square, groups, len(writers)) / group_size)[groups]
    thresholds = kappa * mean_square.sqrt() / scale
    small = []
    for writer, threshold in zip(weights, thresholds, strict=True):
        small.append(writer.rows.detach().abs().lt_(threshold).sum(dtype=torch.float))
    counts = _sum_by_group(torch.stack(small).double(), groups, len(writers))
    return dict(zip(writers, (counts / group_size).tolist(), strict=True))  # one transfer


def _sum_by_group(values: Tensor, groups: Tensor, count: int) -> Tensor:
    return values.new_zeros(count).index_add_(0, groups, values)
