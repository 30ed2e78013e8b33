"""Eq. 4, 6, 7: suspend, restore and freeze filters. The only code that mutates weights or optimiser state."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from psap_core.layers import PrunableLayer
from psap_core.plan import PrunePlan

Snapshot = dict[str, Tensor]
"""What suspended filters were: tensor name to a tensor of its shape, of which only suspended filters' rows count."""


@dataclass(frozen=True)
class FilterTensors:
    """The live tensors of one layer in which dimension 0 is the filter, by name; nothing here is a copy.

    Attributes:
        parameters: convolution weights [O, ...] (and biases), gamma and beta of every member's BatchNorm.
        buffers: BatchNorm statistics.
        state: optimiser state of those parameters, where it has the parameter's shape and exists yet.
        affine: names of gamma [O] and beta [O] of the layer's affine, among the parameters.
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    state: dict[str, Tensor]
    affine: tuple[str, str]

    @property
    def gamma(self) -> Tensor:
        return self.parameters[self.affine[0]]

    @property
    def beta(self) -> Tensor:
        return self.parameters[self.affine[1]]

    def index(self, filters: Collection[int]) -> Tensor:
        """Filter numbers as int64 [n] on the layer's device."""
        return torch.tensor(sorted(filters), dtype=torch.long, device=self.gamma.device)


def filter_tensors(model: nn.Module, layer: PrunableLayer, optimizer: Optimizer | None = None) -> FilterTensors:
    """Everything that goes when a filter of `layer` is exported, and its optimiser state."""
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    state: dict[str, Tensor] = {}
    for member in layer.members:
        module = model.get_submodule(member)
        for name, parameter in module.named_parameters(member, recurse=False):
            parameters[name] = parameter
            for key, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    state[f"{name}:{key}"] = value
        buffers |= {name: b for name, b in module.named_buffers(member, recurse=False) if b.ndim}
    return FilterTensors(parameters, buffers, state, (f"{layer.affine}.weight", f"{layer.affine}.bias"))


@torch.no_grad()
def suspend_(tensors: FilterTensors, filters: Collection[int], snapshot: Snapshot) -> None:
    """Eq. 4: silence filters and note in `snapshot` what they were; nothing is lost.

    The affine becomes (0, 0), so the contribution is exactly zero in training and in evaluation; the live
    optimiser state of the filters becomes zero.
    """
    if not filters:
        return
    index = tensors.index(filters)
    # State that did not exist yet when an earlier filter was suspended counts as zero.
    allocate = torch.zeros_like if snapshot else torch.empty_like
    for name, tensor in (tensors.parameters | tensors.buffers | tensors.state).items():
        if name not in snapshot:
            snapshot[name] = allocate(tensor, requires_grad=False)
        snapshot[name].index_copy_(0, index, tensor.index_select(0, index))
    for tensor in (tensors.gamma, tensors.beta, *tensors.state.values()):
        tensor.index_fill_(0, index, 0.0)


@torch.no_grad()
def restore_(tensors: FilterTensors, filters: Collection[int], snapshot: Snapshot) -> None:
    """Eq. 6: give suspended filters back exactly, optimiser state included."""
    _copy_(tensors.parameters | tensors.buffers | tensors.state, tensors.index(filters), snapshot)


@torch.no_grad()
def refresh_(tensors: FilterTensors, filters: Collection[int], snapshot: Snapshot) -> None:
    """Undo what weight decay and running statistics did to the live rows of suspended filters.

    They stay suspended, so this changes neither the network nor its training.
    """
    rows = {name: t for name, t in (tensors.parameters | tensors.buffers).items() if name not in tensors.affine}
    _copy_(rows, tensors.index(filters), snapshot)


@torch.no_grad()
def freeze_(tensors: FilterTensors, filters: Collection[int]) -> None:
    """Eq. 7: zero filters for good: weights, affine and optimiser state."""
    for tensor in (*tensors.parameters.values(), *tensors.state.values()):
        tensor.index_fill_(0, tensors.index(filters), 0.0)


def apply_(
    model: nn.Module, layers: Sequence[PrunableLayer], plan: PrunePlan, optimizer: Optimizer | None = None
) -> None:
    """Zero the plan's filters for good, whoever made the plan.

    Raises:
        InputError: the plan is of another network.
    """
    for layer, part in plan.match(layers):
        freeze_(filter_tensors(model, layer, optimizer), part.pruned)


def _copy_(tensors: dict[str, Tensor], index: Tensor, snapshot: Snapshot) -> None:
    for name, tensor in tensors.items() if len(index) else ():
        if name in snapshot:
            tensor.index_copy_(0, index, snapshot[name].index_select(0, index))
        else:
            tensor.index_fill_(0, index, 0.0)
