"""Eq. 1: the weight sparsity ratio of every layer."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Fan = Literal["in", "out"]
Reference = Literal["network", "layer"]


def weight_sparsity_ratio(
    weights: Mapping[str, Tensor],
    *,
    kappa: float = 0.5,
    fan: Fan = "in",
    reference: Reference = "network",
) -> dict[str, float]:
    """Share of each layer's weights that training has left small, in units of their He initialisation.

    s_l = share of the weights w of layer l with |w| sqrt(fan_l / 2) < kappa R, where R is the root mean
    square of |w| sqrt(fan / 2) over all given weights.

    Args:
        weights: layer name to weight [O, I, kH, kW].
        kappa: threshold in units of R.
        fan: `in` (I kH kW) or `out` (O kH kW), whichever the network's initialisation used.
        reference: `network` for R as above; `layer`, the ablation's control, for the layer's own R.

    Returns:
        Layer name to s_l, in [0, 1], counted in float32: exact up to 2^24 weights a layer. It is unchanged when all
        weights are multiplied by one number.
    """
    norms = torch.stack([torch.linalg.vector_norm(w.detach()) for w in weights.values()]).double()
    scale = norms.new_tensor(
        [math.sqrt((w[0] if fan == "in" else w[:, 0]).numel() / 2) for w in weights.values()]
    )
    size = norms.new_tensor([w.numel() for w in weights.values()])
    square = (norms * scale) ** 2
    mean_square = square.sum() / size.sum() if reference == "network" else square / size
    thresholds = kappa * mean_square.sqrt() / scale
    small = [
        w.detach().abs().lt_(t).sum(dtype=torch.float)
        for w, t in zip(weights.values(), thresholds, strict=True)
    ]
    return dict(zip(weights, (torch.stack(small) / size).tolist(), strict=True))  # one transfer
