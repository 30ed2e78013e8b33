"""Eq. 4, 6, 7: suspend, restore and freeze filters. The only code that mutates weights or optimiser state."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from psap_core.layers import PrunableLayer
from psap_core.plan import PrunePlan


@dataclass(frozen=True)
class Snapshot:
    """What suspended filters were: tensor name to rows [n, ...], one per filter of `filters`, in their order."""

    filters: tuple[int, ...] = ()
    rows: dict[str, Tensor] = field(default_factory=dict)

    def select(self, filters: Collection[int]) -> "Snapshot":
        """The snapshot of some of its filters."""
        position = {f: i for i, f in enumerate(self.filters)}
        index = torch.tensor([position[f] for f in filters], dtype=torch.long)
        return Snapshot(
            tuple(filters), {n: t.index_select(0, index.to(t.device)) for n, t in self.rows.items()}
        )


@dataclass(frozen=True)
class FilterTensors:
    """The live tensors of one layer in which dimension 0 is the filter, by name; nothing here is a copy.

    Attributes:
        parameters: convolution weights [O, ...] (and biases), gamma and beta of every member's BatchNorm.
        buffers: BatchNorm statistics.
        state: optimiser state of those parameters, where it has the parameter's shape and exists yet.
        affine: names of gamma and beta, among the parameters.
        gamma, beta: the layer's affine, [O] each.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    state: dict[str, Tensor]
    affine: tuple[str, str]
    gamma: Tensor
    beta: Tensor

    def index(self, filters: Collection[int]) -> Tensor:
        """Filter numbers as int64 [n] on the layer's device."""
        return torch.tensor([*filters], dtype=torch.long, device=self.gamma.device)


def filter_tensors(
    model: nn.Module, layer: PrunableLayer, optimizer: Optimizer | None = None
) -> FilterTensors:
    """Everything that goes when a filter of `layer` is exported, and its optimiser state."""
    parameters, buffers, state = (dict[str, Tensor]() for _ in range(3))
    for member in layer.members:
        module = attrgetter(member)(model)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                parameters[f"{member}.{key}"] = parameter
                for kind, value in (
                    optimizer.state.get(parameter, {}) if optimizer else {}
                ).items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        state[f"{member}.{key}:{kind}"] = value
        buffers |= {
            f"{member}.{key}": b for key, b in module._buffers.items() if b is not None and b.ndim
        }
    affine = f"{layer.affine}.weight", f"{layer.affine}.bias"
    return FilterTensors(parameters, buffers, state, affine, *(parameters[name] for name in affine))


@torch.no_grad()
def suspend_(tensors: FilterTensors, filters: Collection[int], earlier: Snapshot) -> Snapshot:
    """Eq. 4: silence filters; the snapshot says what they, and those suspended earlier, were: nothing is lost.

    The affine becomes (0, 0), so the contribution is exactly zero in training and in evaluation; the live
    optimiser state of the filters becomes zero.
    """
    if not filters:
        return earlier
    index, rows = tensors.index(filters), {}
    for name, tensor in (tensors.parameters | tensors.buffers | tensors.state).items():
        rows[name] = tensor.index_select(0, index)
        if earlier.filters:  # state that did not exist yet counts as zero
            zeros = tensor.new_zeros(len(earlier.filters), *tensor.shape[1:])
            rows[name] = torch.cat([earlier.rows.get(name, zeros), rows[name]])
    _silence_(tensors, index)
    return Snapshot((*earlier.filters, *filters), rows)


@torch.no_grad()
def restore_(tensors: FilterTensors, snapshot: Snapshot) -> None:
    """Eq. 6: give the snapshot's filters back exactly, optimiser state included."""
    index = tensors.index(snapshot.filters)
    for name, tensor in (tensors.parameters | tensors.buffers | tensors.state).items():
        if name in snapshot.rows:
            tensor.index_copy_(0, index, snapshot.rows[name])
        else:
            tensor.index_fill_(0, index, 0.0)


def refresh_(tensors: FilterTensors, snapshot: Snapshot) -> None:
    """Undo what weight decay and running statistics did to the live rows of the snapshot's filters.

    They stay suspended, so this changes neither the network nor its training.
    """
    restore_(tensors, snapshot)
    _silence_(tensors, tensors.index(snapshot.filters))


@torch.no_grad()
def freeze_(tensors: FilterTensors, filters: Collection[int]) -> None:
    """Eq. 7: zero filters for good: weights, affine and optimiser state."""
    for tensor in (*tensors.parameters.values(), *tensors.state.values()):
        tensor.index_fill_(0, tensors.index(filters), 0.0)


def apply_(
    model: nn.Module,
    layers: Sequence[PrunableLayer],
    plan: PrunePlan,
    optimizer: Optimizer | None = None,
) -> None:
    """Zero the plan's filters for good, whoever made the plan.

    Raises:
        InputError: the plan is of another network.
    """
    for layer, part in plan.match(layers):
        freeze_(filter_tensors(model, layer, optimizer), part.pruned)


class Silence:
    """Keeps the affine of pruned filters at zero while the network trains; none is pruned before `set_`.

    Its masks are changed in place only, so a training step that a CUDA graph has captured stays valid.
    """

    def __init__(self, tensors: Mapping[str, FilterTensors]) -> None:
        self._masks = {
            name: torch.ones_like(layer.gamma, requires_grad=False)
            for name, layer in tensors.items()
        }
        self._affines = [
            affine for layer in tensors.values() for affine in (layer.gamma, layer.beta)
        ]
        self._multipliers = [mask for mask in self._masks.values() for _ in range(2)]

    def set_(self, pruned: Mapping[str, Collection[int]]) -> None:
        """From now on these are pruned: the name of every layer to indices."""
        for name, mask in self._masks.items():
            mask.fill_(1.0)[[*pruned[name]]] = 0.0

    @torch.no_grad()
    def hold_(self, *_: object) -> None:
        """To be called after every optimiser step, with whatever its hooks are given."""
        torch._foreach_mul_(self._affines, self._multipliers)

    def holds(self) -> bool:
        """Are the affines of pruned filters zero?"""
        pruned = torch.cat(self._affines).masked_fill(torch.cat(self._multipliers) != 0, 0.0)
        return (
            not pruned.nan_to_num().any()
        )  # zero times a diverged value is no number, and no revival


@torch.no_grad()
def _silence_(tensors: FilterTensors, index: Tensor) -> None:
    for tensor in (tensors.gamma, tensors.beta, *tensors.state.values()):
        tensor.index_fill_(0, index, 0.0)
