"""Eq. 5 and 6: the pulse supervises the gradients of suspended filters, the highest utility protects."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from psap_core.errors import InputError
from psap_core.suspension import FilterTensors, Snapshot

PULSE_EPSILON = 1e-4


@dataclass(frozen=True)
class Supervision:
    """What the pulse saw.

    Attributes:
        utility: layer to suspended filter to (mean, standard error) over the batches of
            u_f = -<dL/d(gamma, beta)_f, (gamma, beta)_saved>, the first-order loss reduction of giving it back.
        grad_norm_live: layer to the mean over batches and live filters of ||dL/d(gamma, beta)_f||.
        grad_norm_suspended: the same over suspended filters; layers without any are absent.
    """

    utility: dict[str, dict[int, tuple[float, float]]]
    grad_norm_live: dict[str, float]
    grad_norm_suspended: dict[str, float]


def pulse(
    model: nn.Module,
    tensors: Mapping[str, FilterTensors],
    suspended: Mapping[str, Snapshot],
    make_losses: Callable[[], Iterable[Tensor]],
    batches: int,
) -> Supervision:
    """Measure the utility of suspended filters on a standing network: no optimiser step, nothing is changed.

    While it lasts, suspended filters stand at PULSE_EPSILON times their saved affine: at exactly zero a
    following ReLU would hide their gradient. They must hold their saved weights (`suspension.refresh_`).
    Statistics, generators and module modes come out as they were; gradients come out cleared.

    Args:
        model: the network whose gradients are read, in the modes in which it is trained.
        tensors: layer name to its live tensors, every prunable layer.
        suspended: layer name to the snapshot of its suspended filters, every prunable layer.
        make_losses: makes up to `batches` scalar losses, one forward pass each, lazily.
        batches: K, how many losses are used at most.

    Raises:
        InputError: fewer than two losses came, or one has a gradient that is not finite.
    """
    layers = tensors.values()
    saved_gamma = torch.cat(
        [_saved(layer, suspended[name], layer.affine[0]) for name, layer in tensors.items()]
    )
    saved_beta = torch.cat(
        [_saved(layer, suspended[name], layer.affine[1]) for name, layer in tensors.items()]
    )
    utilities, norms = [], []
    with (
        _standing(model, tensors, suspended),
        torch.enable_grad(),
        torch.autocast(saved_gamma.device.type, enabled=False),
    ):
        for loss in islice(_with_cleared_gradients(model, make_losses), batches):
            loss.backward()  # type: ignore[no-untyped-call]
            gamma_grad = torch.cat([_gradient(layer.gamma) for layer in layers])
            beta_grad = torch.cat([_gradient(layer.beta) for layer in layers])
            utilities.append(-(gamma_grad * saved_gamma + beta_grad * saved_beta))
            norms.append(torch.hypot(gamma_grad, beta_grad))
    if len(utilities) < 2:
        raise InputError(
            f"the pulse needs at least 2 losses for a standard error, make_losses made {len(utilities)}"
        )
    utility, norm = torch.stack([torch.stack(utilities), torch.stack(norms)]).double().cpu()
    if not (utility.isfinite().all() and norm.isfinite().all()):
        raise InputError("a loss of the pulse has a gradient that is not finite: the training has diverged")
    return _by_layer(
        tensors, suspended, utility.mean(0), utility.std(0) / len(utilities) ** 0.5, norm.mean(0)
    )


def choose_restored(
    scores: Mapping[int, float], earlier: Collection[int], anew: Collection[int], pruned: int
) -> tuple[int, ...]:
    """Eq. 6: which suspended filters come back so that `pruned` are left: the highest scores, ties by index.

    Of the filters proposed anew as many as the margin allows; where none were (the layer's count did not
    rise), of the earlier ones as many as the count fell.
    """
    surplus = len(earlier) + len(anew) - pruned
    return tuple(sorted(sorted(anew or earlier, key=lambda f: (-scores[f], f))[:surplus]))


@contextmanager
def _standing(
    model: nn.Module, tensors: Mapping[str, FilterTensors], suspended: Mapping[str, Snapshot]
) -> Iterator[None]:
    """Suspended affines at PULSE_EPSILON times what they were, generators forked; undone whatever happens."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            _scale_affine_(tensors, suspended, PULSE_EPSILON)
            yield
        finally:
            _scale_affine_(tensors, suspended, 0.0)
            model.zero_grad()
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


@torch.no_grad()
def _scale_affine_(
    tensors: Mapping[str, FilterTensors], suspended: Mapping[str, Snapshot], factor: float
) -> None:
    """Set suspended affines to `factor` times what was saved."""
    for name, snapshot in suspended.items():
        for key in tensors[name].affine if snapshot.filters else ():
            tensors[name].parameters[key].index_copy_(0, snapshot.index, snapshot.rows[key] * factor)


def _saved(layer: FilterTensors, snapshot: Snapshot, key: str) -> Tensor:
    """Saved entries of gamma or beta, 0 for live filters: [O]."""
    saved = torch.zeros_like(layer.parameters[key], requires_grad=False)
    return saved.index_copy_(0, snapshot.index, snapshot.rows[key]) if snapshot.filters else saved


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _with_cleared_gradients(
    model: nn.Module, make_losses: Callable[[], Iterable[Tensor]]
) -> Iterator[Tensor]:
    losses = iter(make_losses())
    while True:
        model.zero_grad()
        try:
            yield next(losses)
        except StopIteration:
            return


def _by_layer(
    tensors: Mapping[str, FilterTensors],
    suspended: Mapping[str, Snapshot],
    mean: Tensor,
    error: Tensor,
    norm: Tensor,
) -> Supervision:
    utility, live_norm, suspended_norm = {}, {}, {}
    start = 0
    for name, layer in tensors.items():
        rows = slice(start, start := start + len(layer.gamma))
        filters = list(suspended[name].filters)
        u, e, norms = mean[rows].tolist(), error[rows].tolist(), norm[rows]
        utility[name] = {f: (u[f], e[f]) for f in filters}
        is_live = torch.ones(len(norms), dtype=torch.bool)
        is_live[filters] = False
        live_norm[name] = norms[is_live].mean().item()
        if filters:
            suspended_norm[name] = norms[~is_live].mean().item()
    return Supervision(utility, live_norm, suspended_norm)
