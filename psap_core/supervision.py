"""Eq. 5 and 6: the pulse supervises the gradients of suspended filters, the highest utility protects."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice

import torch
from torch import Tensor, nn

from psap_core.errors import InputError
from psap_core.suspension import FilterTensors, Snapshot

PULSE_EPSILON = 1e-4
MakeLosses = Callable[[], Iterable[Tensor]]


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
    snapshots: Mapping[str, Snapshot],
    make_losses: MakeLosses,
    batches: int,
) -> Supervision:
    """Measure the utility of suspended filters on a standing network: no optimiser step, nothing is changed.

    While it lasts, suspended filters stand at PULSE_EPSILON times their saved affine: at exactly zero a
    following ReLU would hide their gradient. They must hold their saved weights (`suspension.refresh_`).
    Statistics and generators come out as they were, gradients cleared; no module mode is changed.

    Args:
        model: the network whose gradients are read, in the modes in which it is trained.
        tensors: layer name to its live tensors, every prunable layer.
        snapshots: layer name to its suspended filters and what they were, the same layers.
        make_losses: makes up to `batches` scalar losses, one forward pass each, lazily.
        batches: K, how many losses are used at most.

    Raises:
        InputError: fewer than two losses came, or one has no gradient or one that is not finite.
    """
    saved = {name: _saved_affine(layer, snapshots[name]) for name, layer in tensors.items()}
    saved_gamma, saved_beta = (torch.cat(parts) for parts in zip(*saved.values(), strict=True))
    utilities, norms = [], []
    with _standing(model, tensors, saved), torch.autocast(saved_gamma.device.type, enabled=False):
        for loss in islice(make_losses(), batches):
            loss.backward()
            if lacking := [
                name for name, t in tensors.items() if t.gamma.grad is None or t.beta.grad is None
            ]:
                raise InputError(
                    f"{lacking[0]!r} got no gradient: it is frozen, or make_losses uses another network"
                )
            gamma_grad = torch.cat([layer.gamma.grad for layer in tensors.values()])  # type: ignore[misc]
            beta_grad = torch.cat([layer.beta.grad for layer in tensors.values()])  # type: ignore[misc]
            utilities.append(-(gamma_grad * saved_gamma + beta_grad * saved_beta))
            norms.append(torch.hypot(gamma_grad, beta_grad))
            model.zero_grad()
    if len(utilities) < 2:
        raise InputError(
            f"the pulse needs at least 2 losses for a standard error, make_losses made {len(utilities)}"
        )
    seen = torch.stack([torch.stack(utilities), torch.stack(norms)]).double().cpu()  # one transfer
    if not seen.isfinite().all():
        raise InputError(
            "a loss of the pulse has a gradient that is not finite: the training has diverged"
        )
    (mean, norm), error = seen.mean(1), seen[0].std(0) / len(utilities) ** 0.5
    widths, result = [len(layer.gamma) for layer in tensors.values()], Supervision({}, {}, {})
    for name, u, e, g in zip(
        tensors, *(torch.split(x, widths) for x in (mean, error, norm)), strict=True
    ):
        filters = sorted(snapshots[name].filters)
        result.utility[name] = {f: (u[f].item(), e[f].item()) for f in filters}
        result.grad_norm_live[name] = g[sorted({*range(len(g))}.difference(filters))].mean().item()
        if filters:
            result.grad_norm_suspended[name] = g[filters].mean().item()
    return result


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
    model: nn.Module,
    tensors: Mapping[str, FilterTensors],
    saved: Mapping[str, tuple[Tensor, Tensor]],
) -> Iterator[None]:
    """Suspended affines at PULSE_EPSILON times what they were, generators forked; undone whatever happens."""
    affines = [live.detach() for t in tensors.values() for live in (t.gamma, t.beta)]
    kept = [(tensor, tensor.clone()) for tensor in (*affines, *model.buffers())]
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            model.zero_grad()
            for live, part in zip(affines, chain.from_iterable(saved.values()), strict=True):
                live.add_(
                    part, alpha=PULSE_EPSILON
                )  # suspended entries are zero, and so is what is saved of live ones
            with torch.enable_grad():
                yield
        finally:
            model.zero_grad()
            for tensor, before in kept:
                tensor.copy_(before)


def _saved_affine(layer: FilterTensors, snapshot: Snapshot) -> tuple[Tensor, Tensor]:
    """Saved (gamma, beta), each [O], zero for live filters."""
    gamma, beta = (
        torch.zeros_like(layer.parameters[name], requires_grad=False) for name in layer.affine
    )
    for name, saved in zip(layer.affine, (gamma, beta), strict=True):
        if snapshot.filters:
            saved.index_copy_(0, layer.index(snapshot.filters), snapshot.rows[name])
    return gamma, beta
