"""Making a network physically small: cut the filters of a plan out of every tensor that holds them."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.optim import Optimizer

from psap_core.errors import InputError
from psap_core.groups import ChannelGroup
from psap_core.inputs import copy_network, tensors_in
from psap_core.plan import PrunePlan
from psap_core.sizes import COUNTS, read_number, write_number_
from psap_core.suspension import lies_along


class ScatteredBatchNorm(_BatchNorm):
    """BatchNorm over the kept channels, scattered into the full-width stream: [N, kept, ...] -> [N, width, ...].

    Other channels are what `norm` made of zeros: zero behind a silenced affine, a constant behind zeroed weights alone.
    Convert to SyncBatchNorm before pruning, not after: a conversion would make this a plain one.
    """

    kept: Tensor
    constant: Tensor

    def __init__(self, norm: _BatchNorm, kept: Tensor) -> None:
        like: Any = {"device": norm.weight.device, "dtype": norm.weight.dtype}
        super().__init__(
            norm.num_features,
            norm.eps,
            norm.momentum,
            norm.affine,
            norm.track_running_stats,
            **like,
        )
        everything = torch.arange(norm.num_features, device=kept.device)
        before = getattr(norm, "kept", everything)  # scattered once already?
        self.register_buffer("kept", before[kept], persistent=False)
        self.register_buffer("constant", _of_zeros(norm).index_fill(0, self.kept, 0.0))

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of dimensions from [N, C] on."""

    def forward(self, input: Tensor) -> Tensor:
        thin = super().forward(input)
        constant = self.constant.to(thin.dtype).view(-1, *[1] * (thin.ndim - 2))
        full = constant.expand(thin.shape[0], -1, *thin.shape[2:])
        channels_last = thin.ndim == 4 and not thin.is_contiguous()
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return full.clone(memory_format=layout).index_copy_(1, self.kept, thin)


@torch.no_grad()
def _of_zeros(norm: _BatchNorm) -> Tensor:
    """What a BatchNorm makes of zeros, in evaluation mode: float64 [width]."""
    mean, variance = norm.running_mean, norm.running_var
    output = F.batch_norm(
        torch.zeros(2, norm.num_features, 1, device=norm.weight.device, dtype=torch.float64),
        None if mean is None else mean.double(),
        None if variance is None else variance.double(),
        norm.weight.double(),
        norm.bias.double(),
        training=mean is None,
        eps=norm.eps,
    )[0].flatten()
    if not isinstance(norm, ScatteredBatchNorm):
        return output
    return norm.constant.double().index_copy(0, norm.kept, output)


def smaller_copy(model: nn.Module, groups: Sequence[ChannelGroup], plan: PrunePlan) -> nn.Module:
    """A copy of the network without the plan's filters; the network is left as it is."""
    small = copy_network(model)
    cut_(small, groups, plan)
    return small


def cut_(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    plan: PrunePlan,
    optimizers: Sequence[Optimizer] = (),
) -> None:
    """Cut the plan's filters out of the network, in place; parameters stay the same objects.

    Args:
        model: the network that `groups` are of.
        optimizers: whose state of the shrunk parameters is cut as well.

    Raises:
        InputError: the plan is of another network, or an optimiser keeps state that cannot be cut; nothing is cut then.
    """
    _check_state(optimizers)
    cuts = defaultdict[str, dict[int, list[Tensor]]](lambda: defaultdict(list))
    for group, part in plan.match(groups):
        if not part.pruned:
            continue
        if group.scattered is not None:
            _scatter_(model, group, part.pruned)
        for entries in (*group.members, *group.readers):
            places = entries.index[[*part.pruned]].flatten()
            cuts[entries.tensor][entries.dim].append(places)
    owners = _owners(model)
    sizes = defaultdict[str, dict[int, int]](dict)
    for name, by_dim in cuts.items():
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        for dim, parts in by_dim.items():
            index = torch.cat(parts)
            if not isinstance(getattr(module, key, None), Tensor):
                write_number_(module, key, read_number(module, key) - len(index))
                continue
            tensor = getattr(module, key)
            old_size = tensor.shape[dim]
            _cut_tensor_(tensor, dim, index, optimizers)
            for owner in owners[id(tensor)]:
                sizes[owner][old_size] = tensor.shape[dim]
    for owner, changes in sizes.items():
        counted = {name.rpartition(".")[2] for name in cuts if name.rpartition(".")[0] == owner}
        _fit_numbers_(model.get_submodule(owner), changes, counted)


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """The modules that hold a tensor, under any name, by the tensor's id."""
    owners = defaultdict[int, list[str]](list)
    for name, module in model.named_modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            owners[id(tensor)].append(name)
    return owners


def _check_state(optimizers: Sequence[Optimizer]) -> None:
    """Refuse optimisers that keep anything else than numbers and tensors along a parameter's dimensions (LBFGS)."""
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for kind, value in state.items():
                for tensor in tensors_in(value):
                    is_own = tensor is value and lies_along(tensor, parameter.shape)
                    if tensor.numel() > 1 and not is_own:
                        raise InputError(
                            f"the state {kind!r} of {type(optimizer).__name__} cannot be cut: go on masked and export, "
                            "or give a new optimizer to use() first"
                        )


@torch.no_grad()
def _cut_tensor_(tensor: Tensor, dim: int, index: Tensor, optimizers: Sequence[Optimizer]) -> None:
    stays = torch.ones(tensor.shape[dim], dtype=torch.bool)
    stays[index] = False
    kept = stays.nonzero().flatten().to(tensor.device)
    shape = tensor.shape
    for optimizer in optimizers:
        state = optimizer.state.get(tensor, {})
        for kind, value in state.items():
            if lies_along(value, shape) and value.shape[dim] == shape[dim]:
                state[kind] = _selected(value, dim, kept)
    selected = _selected(tensor.detach(), dim, kept)
    # A graph that somebody still holds (a loss, a kept activation) would keep the old shape's gradient accumulator;
    # torch makes a new one where the type changes.
    tensor.data = tensor.new_empty(0, dtype=torch.float16)
    tensor.data = selected
    tensor.grad = None


def _selected(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    selected = tensor.index_select(dim, kept)
    channels_last = tensor.ndim == 4 and not tensor.is_contiguous()
    return selected.contiguous(memory_format=torch.channels_last) if channels_last else selected


def _scatter_(model: nn.Module, group: ChannelGroup, pruned: Collection[int]) -> None:
    """Replace the group's last BatchNorm by one whose output keeps its full width."""
    assert group.scattered is not None
    norm = model.get_submodule(group.scattered)
    assert isinstance(norm, _BatchNorm)
    kept = sorted({*range(group.filters)}.difference(pruned))
    rows = next(entries for entries in group.silencers)
    places = rows.index[kept].flatten().sort().values.to(norm.weight.device)
    scattered = ScatteredBatchNorm(norm, places).train(norm.training)
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(scattered, name, parameter)
    for name, buffer in norm.named_buffers(recurse=False):
        if name not in ("kept", "constant"):
            setattr(scattered, name, buffer)
    model.set_submodule(group.scattered, scattered)


def _fit_numbers_(module: nn.Module, changes: Mapping[int, int], counted: Collection[str]) -> None:
    """Make a module's own counts those of its tensors.

    Args:
        changes: which sizes of its tensors became which.
        counted: names of the numbers that are right already.
    """
    match module:
        case _ConvNd():
            _fit_convolution_(module)
        case nn.Linear():
            module.out_features, module.in_features = module.weight.shape
        case nn.GroupNorm():
            pass  # whose numbers count channels of their own
        case _:
            for name in COUNTS:
                count = getattr(module, name, None)
                if name not in counted and isinstance(count, int) and count in changes:
                    setattr(module, name, changes[count])


def _fit_convolution_(module: _ConvNd) -> None:
    transposed = isinstance(module, _ConvTransposeNd)
    rows = module.weight.shape[0]
    columns = module.weight.shape[1] * module.groups
    module.in_channels, module.out_channels = (rows, columns) if transposed else (columns, rows)
