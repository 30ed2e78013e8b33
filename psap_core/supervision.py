"""Eq. 5 and 6: the pulse supervises the gradients of suspended filters, the highest utility protects.

The utility is what the field calls first-order Taylor importance of the BatchNorm affine (Molchanov et al., CVPR 2019),
taken at the pruned point and for whatever silences a filter.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, distributed, nn

from psap_core.errors import InputError
from psap_core.suspension import FilterTensors, Snapshot, silence_

PULSE_EPSILON = 1e-4
LossOfBatch = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Supervision:
    """What the pulse saw.

    Attributes:
        utility: group to suspended filter to (mean, standard error) over the batches of
            `u_f = -<dL/ds_f, (s_f)_saved>`, s_f all that silences the filter: of a convolution with its own BatchNorm
            (gamma, beta). It is the first-order loss reduction of giving the filter back.
        grad_norm_live: group to the mean over batches and live filters of ||dL/ds_f||.
        grad_norm_suspended: the same over suspended filters; groups without any are absent.
    """

    utility: dict[str, dict[int, tuple[float, float]]]
    grad_norm_live: dict[str, float]
    grad_norm_suspended: dict[str, float]


def pulse(
    model: nn.Module,
    tensors: Mapping[str, FilterTensors],
    snapshots: Mapping[str, Snapshot],
    batches: Iterable[Any],
    loss_of_batch: LossOfBatch,
    count: int,
) -> Supervision:
    """Measure the utility of suspended filters on a standing network: no optimiser step, nothing is changed.

    While it lasts, suspended filters stand at PULSE_EPSILON times their saved silencers: at exactly zero a
    following ReLU would hide their gradient. What else they own must be as saved (`PSAP` sees to that).
    Statistics and generators come out as they were, gradients cleared; no module mode is changed.

    Args:
        model: the network whose gradients are read, in the modes in which it is trained.
        tensors: group name to its live tensors, every group.
        snapshots: group name to its suspended filters and what they were, the same groups.
        batches: training batches, as the caller's loader makes them.
        loss_of_batch: one forward pass; the scalar loss of a batch.
        count: K, how many batches are used at most.

    Raises:
        InputError: fewer than two batches came, a loss is no scalar, or has no gradient or one that is not finite.
    """
    filters = {name: sorted(snapshot.filters) for name, snapshot in snapshots.items()}
    utilities, norms = [], []
    with _standing(model, tensors, snapshots), torch.autocast(_device_type(model), enabled=False):
        for batch in islice(batches, count):
            loss = loss_of_batch(batch)
            _check_scalar(loss)
            _backward(loss)
            _complete_gradients_(tensors)
            _average_over_ranks_(tensors)
            utilities.append(_utilities(tensors, snapshots, filters))
            norms.append(torch.cat([_gradient_norms(group) for group in tensors.values()]))
            _clear_gradients(model, tensors)
    if len(utilities) < 2:
        raise InputError(
            f"the pulse needs at least 2 batches for a standard error, it was given {len(utilities)}"
        )
    utility = torch.stack(utilities).double().cpu()
    norm = torch.stack(norms).double().cpu().mean(0)
    if not (utility.isfinite().all() and norm.isfinite().all()):
        raise InputError(
            "a loss of the pulse has a gradient that is not finite: the training has diverged"
        )
    mean = utility.mean(0)
    error = utility.std(0) / len(utilities) ** 0.5
    widths = [len(group.parameters[group.silencers[0]].index) for group in tensors.values()]
    return _by_group(filters, mean, error, norm, widths)


def choose_restored(
    scores: Mapping[int, float], earlier: Collection[int], anew: Collection[int], pruned: int
) -> tuple[int, ...]:
    """Eq. 6: which suspended filters come back so that `pruned` are left: the highest scores, ties by index.

    Of the filters proposed anew as many as the margin allows; where none were (the group's count did not
    rise), of the earlier ones as many as the count fell.
    """
    surplus = len(earlier) + len(anew) - pruned
    return tuple(sorted(sorted(anew or earlier, key=lambda f: (-scores[f], f))[:surplus]))


def _utilities(
    tensors: Mapping[str, FilterTensors],
    snapshots: Mapping[str, Snapshot],
    filters: Mapping[str, list[int]],
) -> Tensor:
    """u_f of all suspended filters, group by group."""
    parts = [
        _utility(group, snapshots[name].select(filters[name]))
        for name, group in tensors.items()
        if filters[name]
    ]
    return torch.cat(parts) if parts else torch.zeros(0)


def _utility(group: FilterTensors, snapshot: Snapshot) -> Tensor:
    """u_f of a group's suspended filters, [n]."""
    index = group.index(snapshot.filters)
    total = torch.zeros((), device=group.device)
    for name in group.silencers:
        rows = group.parameters[name]
        gradient = rows.take(index, rows.tensor.grad)
        total = total + (gradient * snapshot.rows[name]).flatten(1).sum(1)
    return -total


def _gradient_norms(group: FilterTensors) -> Tensor:
    """||dL/ds_f|| of every filter, [O]."""
    total = torch.zeros((), device=group.device)
    for name in group.silencers:
        rows = group.parameters[name]
        everyone = torch.arange(len(rows.index), device=rows.index.device)
        gradient = rows.take(everyone, rows.tensor.grad).flatten(1)
        total = torch.hypot(total, torch.linalg.vector_norm(gradient, dim=1))
    return total


def _by_group(
    filters: Mapping[str, list[int]], mean: Tensor, error: Tensor, norm: Tensor, widths: list[int]
) -> Supervision:
    result = Supervision({}, {}, {})
    counts = [len(suspended) for suspended in filters.values()]
    parts = zip(filters, mean.split(counts), error.split(counts), norm.split(widths), strict=True)
    for name, u, e, g in parts:
        suspended = filters[name]
        measured = zip(suspended, u.tolist(), e.tolist(), strict=True)
        result.utility[name] = {f: (value, spread) for f, value, spread in measured}
        live = sorted({*range(len(g))}.difference(suspended))
        result.grad_norm_live[name] = g[live].mean().item()
        if suspended:
            result.grad_norm_suspended[name] = g[suspended].mean().item()
    return result


@contextmanager
def _standing(
    model: nn.Module, tensors: Mapping[str, FilterTensors], snapshots: Mapping[str, Snapshot]
) -> Iterator[None]:
    """Suspended silencers at PULSE_EPSILON times what they were, generators forked; undone whatever happens."""
    buffers = _buffers_of(model)
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            _clear_gradients(model, tensors)
            for name, group in tensors.items():
                _put_scaled_(group, snapshots[name])
            for constant in _constants_of(tensors):
                constant.requires_grad_()
            with torch.enable_grad():
                yield
        finally:
            for constant in _constants_of(tensors):
                constant.requires_grad_(False)
            _clear_gradients(model, tensors)
            for name, group in tensors.items():
                silence_(group, snapshots[name].filters)
            with torch.no_grad():
                for module, name, buffer, content in buffers:
                    module._buffers[name] = buffer  # a forward pass may have made another
                    buffer.copy_(content)


def _buffers_of(model: nn.Module) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
    """Every buffer with its place, and a copy of what it holds."""
    buffers = []
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                buffers.append((module, name, buffer, buffer.clone()))
    return buffers


@torch.no_grad()
def _put_scaled_(group: FilterTensors, snapshot: Snapshot) -> None:
    index = group.index(snapshot.filters)
    for name in group.silencers:
        if snapshot.filters:
            group.parameters[name].put_(index, snapshot.rows[name] * PULSE_EPSILON)


def _constants_of(tensors: Mapping[str, FilterTensors]) -> list[Tensor]:
    return [constant for group in tensors.values() for constant in group.constants.values()]


def _clear_gradients(model: nn.Module, tensors: Mapping[str, FilterTensors]) -> None:
    model.zero_grad()
    for constant in _constants_of(tensors):
        constant.grad = None


def _average_over_ranks_(tensors: Mapping[str, FilterTensors]) -> None:
    """What DistributedDataParallel does for parameters, for the gradients of constants."""
    if distributed.is_available() and distributed.is_initialized():
        for constant in _constants_of(tensors):
            assert constant.grad is not None
            distributed.all_reduce(constant.grad)
            constant.grad.div_(distributed.get_world_size())


def _check_scalar(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise InputError(f"loss_of_batch must return a scalar tensor, not a {type(loss).__name__}")
    is_a_number = loss.numel() == 1 and loss.layout is torch.strided and loss.is_floating_point()
    if not is_a_number or not loss.requires_grad:
        raise InputError(
            "loss_of_batch must return one real number that has a gradient, "
            f"not a tensor of shape {[*loss.shape]} with requires_grad={loss.requires_grad}"
        )


def _backward(loss: Tensor) -> None:
    try:
        loss.backward()
    except RuntimeError as error:
        is_an_old_loss = "a second time" in str(error) or "modified by an inplace" in str(error)
        if not is_an_old_loss:
            raise
        raise InputError(
            "loss_of_batch must compute a loss anew of every batch: this one is of an earlier pass"
        ) from error


def _complete_gradients_(tensors: Mapping[str, FilterTensors]) -> None:
    """A silencer that this batch did not pass (a skipped block, a head that is not in the loss) has gradient zero."""
    reached = False
    for name, group in tensors.items():
        for silencer in group.silencers:
            tensor = group.parameters[silencer].tensor
            if not tensor.requires_grad:
                raise InputError(f"{name!r} got no gradient: {silencer} is frozen")
            reached |= tensor.grad is not None
    if not reached:
        raise InputError("no filter got a gradient: loss_of_batch uses another network")
    for group in tensors.values():
        for silencer in group.silencers:
            tensor = group.parameters[silencer].tensor
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type
