"""What each torch operation does to the channels that lie along its operands; `channels.py` runs these rules.

A rule takes the tracer and one call, and says what lies along the call's results. Operations that are not listed fix
the channels of all their operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from psap_core.channels import (
    NO_ID,
    NO_LABEL,
    Call,
    Channels,
    Fixed,
    Grid,
    Role,
    Rule,
    Split,
    Sum,
    Tracer,
)
from psap_core.inputs import map_tensors, tensors_in
from psap_core.sizes import Size, follows

# Channel-wise, and 0 becomes 0: a silent channel is silent behind them.
ZERO_PRESERVING = [
    "abs",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool1d_with_indices",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool3d",
    "adaptive_max_pool3d_with_indices",
    "arctan",
    "asinh",
    "atan",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "bfloat16",
    "ceil",
    "celu",
    "clone",
    "contiguous",
    "cpu",
    "cuda",
    "data",
    "detach",
    "double",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "elu",
    "erf",
    "expm1",
    "feature_dropout",
    "float",
    "floor",
    "gelu",
    "half",
    "hardshrink",
    "hardswish",
    "interpolate",
    "leaky_relu",
    "log1p",
    "lp_pool1d",
    "lp_pool2d",
    "max_pool1d",
    "max_pool1d_with_indices",
    "max_pool2d",
    "max_pool2d_with_indices",
    "max_pool3d",
    "max_pool3d_with_indices",
    "max_unpool1d",
    "max_unpool2d",
    "mish",
    "nan_to_num",
    "neg",
    "negative",
    "positive",
    "relu",
    "relu6",
    "requires_grad",
    "round",
    "rrelu",
    "selu",
    "sign",
    "silu",
    "sin",
    "sinh",
    "softshrink",
    "softsign",
    "sqrt",
    "square",
    "tan",
    "tanh",
    "tanhshrink",
    "to",
    "trunc",
    "type",
    "type_as",
    "upsample",
    "upsample_bilinear",
    "upsample_nearest",
]
# Channel-wise, but 0 becomes something else.
CHANNEL_WISE = [
    "acos",
    "alpha_dropout",
    "bernoulli",
    "cos",
    "cosh",
    "empty_like",
    "eq",
    "exp",
    "exp2",
    "feature_alpha_dropout",
    "full_like",
    "ge",
    "gt",
    "hardsigmoid",
    "isfinite",
    "isinf",
    "isnan",
    "le",
    "log",
    "log10",
    "log2",
    "logical_not",
    "logsigmoid",
    "lt",
    "ne",
    "ones_like",
    "rand_like",
    "randn_like",
    "reciprocal",
    "rsqrt",
    "sigmoid",
    "softplus",
    "zeros_like",
]
SUMS = ("add", "sub", "rsub", "subtract", "maximum", "minimum", "fmax", "fmin")
ADDS = ("add", "sub", "rsub", "subtract")
PRODUCTS = ("mul", "multiply", "div", "divide", "true_divide", "truediv")
# Rearrangements: the very same operation on the ids says where every channel goes.
REARRANGEMENTS = [
    "expand",
    "expand_as",
    "flatten",
    "flip",
    "fliplr",
    "flipud",
    "moveaxis",
    "movedim",
    "mt",
    "permute",
    "ravel",
    "repeat",
    "repeat_interleave",
    "reshape",
    "reshape_as",
    "squeeze",
    "swapaxes",
    "swapdims",
    "t",
    "tile",
    "transpose",
    "unflatten",
    "unsqueeze",
    "view",
    "view_as",
]
REDUCTIONS_OF_ZEROS = [
    "amax",
    "amin",
    "count_nonzero",
    "max",
    "mean",
    "min",
    "std",
    "std_mean",
    "sum",
    "var",
    "var_mean",
]
REDUCTIONS = [*REDUCTIONS_OF_ZEROS, "all", "any", "argmax", "argmin", "logsumexp", "median", "prod"]
CONSTANTS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


# ---------------------------------------------------------------------------- the general rules


def unknown(tracer: Tracer, call: Call) -> None:
    """Whatever this does, the channels of all operands are needed as they are."""
    _fix_all(tracer, call, f"they reach {call.where}")


def _fix_all(tracer: Tracer, call: Call, reason: str) -> None:
    known = [tracer.of(tensor) for tensor in tensors_in((call.args, call.kwargs))]
    for channels in known:
        tracer.fix(channels, reason)
    if any(channels is not None for channels in known):
        for tensor in tensors_in(call.result):
            tracer.set(tensor, Fixed(reason))


def constant(tracer: Tracer, call: Call) -> None:
    """The results hold nothing of the network's channels."""


def keep(tracer: Tracer, call: Call) -> None:
    """Channel-wise and f(0) = 0."""
    call.keeps_channels = True
    _same(tracer, call, silent=True)


def keep_ids(tracer: Tracer, call: Call) -> None:
    """Channel-wise, but f(0) is not 0."""
    _same(tracer, call, silent=False)


def _same(tracer: Tracer, call: Call, silent: bool) -> None:
    _pass_on(tracer, call, call.first, silent)


def _pass_on(tracer: Tracer, call: Call, operand: Tensor, silent: bool) -> None:
    known = tracer.known(operand)
    if isinstance(known, (Channels, Grid)) and not silent:
        known = replace(known, labels=torch.zeros_like(known.labels))
    for tensor in tensors_in(call.result):
        tracer.set(tensor, known)


def _behind_the_end(tensor: Tensor, channels: Channels) -> int:
    """The channel dimension counted from the end, as broadcasting counts: -1 is the last."""
    return channels.dim - tensor.ndim


# ---------------------------------------------------------------------------- elementwise


def combine(tracer: Tracer, call: Call) -> None:
    """A sum, difference, maximum, minimum, comparison of two tensors: joined place by place."""
    operands = _tensor_operands(call)
    numbers = [value for value in call.args[:2] if isinstance(value, (int, float))]
    if call.name in ADDS and numbers == [0]:
        keep(tracer, call)
        return
    ends = not tracer.couple_sums and call.name in SUMS and len(operands) > 1
    if call.name in SUMS and len(operands) > 1:
        known = tuple((tracer.of(tensor), tracer.node_of(tensor)) for tensor in operands)
        tracer.sums.append(Sum(known))
    if ends and sum(tracer.of(tensor) is not None for tensor in operands) > 1:
        for tensor in operands:
            tracer.fix(tracer.of(tensor), f"they reach a sum ({call.where})")
        tracer.set(call.result, Fixed(f"they reach a sum ({call.where})"))
        return
    silent_together = call.name in SUMS and len(operands) > 1
    _elementwise(tracer, call, operands, _union if silent_together else None)


def multiply(tracer: Tracer, call: Call) -> None:
    """A product is silent where either factor is; a quotient where its numerator is."""
    operands = _tensor_operands(call)
    if len(operands) == 1:
        is_numerator = operands[0] is call.first and call.name != "rdiv"
        silent = is_numerator or call.name.startswith("mul")
        _pass_on(tracer, call, operands[0], silent)
        return
    if call.name.startswith("mul"):
        operands.sort(key=_is_parameter)  # what it is multiplied with silences it first
        _elementwise(tracer, call, operands, _either)
    else:
        _elementwise(tracer, call, operands, _of_the_first)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def choose(tracer: Tracer, call: Call) -> None:
    """torch.where: silent where both choices are."""
    condition = call.argument(0, "condition")
    choices = [call.argument(1, "input"), call.argument(2, "other")]
    if any(choice is None for choice in choices):
        unknown(tracer, call)
        return
    numbers = [choice for choice in choices if not isinstance(choice, Tensor)]
    operands = [choice for choice in choices if isinstance(choice, Tensor)]
    silent = all(number == 0 for number in numbers)
    conditions = [condition] if isinstance(condition, Tensor) else []
    _elementwise(tracer, call, operands, _union if silent else None, also_joined=conditions)


def fill_masked(tracer: Tracer, call: Call) -> None:
    mask, value = call.argument(1, "mask"), call.argument(2, "value")
    silent = not isinstance(value, Tensor) and value == 0
    _elementwise(tracer, call, [call.first], _of_the_first if silent else None, also_joined=[mask])


def raise_to(tracer: Tracer, call: Call) -> None:
    exponent = call.argument(1, "exponent")
    positive = isinstance(exponent, (int, float)) and exponent > 0
    (keep if positive and isinstance(call.first, Tensor) else unknown)(tracer, call)


def clamp(tracer: Tracer, call: Call) -> None:
    low_default, high_default = (-1.0, 1.0) if call.name == "hardtanh" else (None, None)
    names = ("min_val", "max_val") if call.name == "hardtanh" else ("min", "max")
    low = call.argument(1, names[0], low_default)
    high = call.argument(2, names[1], high_default)
    if call.name == "clamp_min":
        high = None
    if call.name == "clamp_max":
        low, high = None, low
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        unknown(tracer, call)
        return
    holds_zero = (low is None or low <= 0) and (high is None or high >= 0)
    (keep if holds_zero else keep_ids)(tracer, call)


def prelu(tracer: Tracer, call: Call) -> None:
    """The slopes lie along dimension 1, one for each channel or one for all."""
    channels, slopes = tracer.of(call.first), tracer.of(call.argument(1, "weight"))
    if isinstance(channels, Channels) and isinstance(slopes, Channels):
        if channels.dim != 1:
            unknown(tracer, call)
            return
        tracer.join(channels.ids, slopes.ids, f"they reach {call.where}")
    keep(tracer, call)


def _tensor_operands(call: Call) -> list[Tensor]:
    both = (call.argument(0, "input"), call.argument(1, "other"))
    return [operand for operand in both if isinstance(operand, Tensor)]


Labelling = Callable[[Tracer, Sequence[Tensor]], Tensor]


def _elementwise(
    tracer: Tracer,
    call: Call,
    operands: Sequence[Tensor],
    labelling: Labelling | None,
    also_joined: Sequence[Tensor] = (),
) -> None:
    """Join the channels of operands that broadcast together; `labelling` says what silences the result."""
    everything = [*operands, *also_joined]
    _lay_alike(tracer, everything)
    along = {
        _behind_the_end(tensor, channels)
        for tensor in everything
        if isinstance(channels := tracer.of(tensor), Channels)
    }
    if not along:
        tracer.set(call.result, _first_known(tracer, everything))
        return
    if len(along) > 1:
        unknown(tracer, call)
        return
    dim = along.pop()
    size = call.result.shape[dim]
    known = [_spread(tracer, tensor, dim, size, call) for tensor in everything]
    present = [channels for channels in known if channels is not None]
    ids = max(present, key=lambda channels: bool(channels.ids.any())).ids
    for channels in present:
        tracer.join(ids, channels.ids, f"they meet a tensor of fixed size in {call.where}")
    labels = torch.zeros_like(ids)
    if labelling is not None:
        parts = known[: len(operands)]
        silent = [torch.zeros_like(ids) if part is None else part.labels for part in parts]
        labels = labelling(tracer, silent)
    tracer.set(call.result, Channels(ids, labels, call.result.ndim + dim))


def _lay_alike(tracer: Tracer, tensors: Sequence[Tensor]) -> None:
    """Where the channels of one operand lie along one dimension, those of a grid are to shrink along the same."""
    plain = [(tensor, tracer.known(tensor)) for tensor in tensors]
    along = {_behind_the_end(t, known) for t, known in plain if isinstance(known, Channels)}
    for tensor in tensors:
        others = [dim for dim in range(tensor.ndim) if dim - tensor.ndim not in along]
        tracer.of_avoiding(tensor, others if along else ())


def _first_known(tracer: Tracer, tensors: Sequence[Tensor]) -> Channels | Fixed | None:
    for tensor in tensors:
        known = tracer.of(tensor)
        if known is not None:
            return known
    return None


def _spread(tracer: Tracer, tensor: Tensor, dim: int, size: int, call: Call) -> Channels | None:
    """The channels of an operand along dimension `dim` (from the end) of the result; None if it has one entry there."""
    channels = tracer.of(tensor)
    entries = tensor.shape[dim] if tensor.ndim >= -dim else 1
    if entries == 1 and size > 1:
        tracer.fix(channels, f"one channel meets many in {call.where}")
        return None
    if isinstance(channels, Channels):
        return channels
    if isinstance(channels, Fixed):
        return _laid_out(tracer, tensor, tensor.ndim + dim)
    name = tracer.name_of(tensor)
    if name is not None and entries > 1:  # such as an embedding of positions
        return tracer.entries_of(tensor, name, tensor.ndim + dim)
    none = torch.zeros(size, dtype=torch.long)
    return Channels(none, none, tensor.ndim + dim)


def _union(tracer: Tracer, labels: Sequence[Tensor]) -> Tensor:
    return tracer.union(labels)


def _either(tracer: Tracer, labels: Sequence[Tensor]) -> Tensor:
    """Silent where one is: by the first that can be silenced."""
    first, second = labels
    return torch.where(first != NO_LABEL, first, second)


def _of_the_first(tracer: Tracer, labels: Sequence[Tensor]) -> Tensor:
    return labels[0]


# ---------------------------------------------------------------------------- convolutions and linear layers


def convolve(tracer: Tracer, call: Call) -> None:
    """Reads the channels of its input and writes new ones; a grouped one passes whole groups on."""
    weight = call.argument(1, "weight")
    transposed = "transpose" in call.name
    groups = call.argument(6, "groups", 1)
    dim = call.first.ndim - weight.ndim + 1
    name = tracer.name_of(weight)
    if name is None:
        reason = f"they reach {call.where}, whose weight is computed"
        _fix_all(tracer, call, reason)
        return
    channels = _along(
        tracer, call, dim, weight.shape[0] if transposed else weight.shape[1] * groups
    )
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    if channels is None:
        unknown(tracer, call)
    elif groups == 1:
        _read_and_write(tracer, call, channels, name, 0 if transposed else 1)
    elif min(rows, columns) > groups:
        _write_in_groups(tracer, call, channels, groups, name, transposed)
    else:
        _pass_groups(tracer, call, channels, groups, name, transposed)


def linear(tracer: Tracer, call: Call) -> None:
    weight = call.argument(1, "weight")
    name = tracer.name_of(weight)
    channels = tracer.of(call.first)
    last = call.first.ndim - 1
    if name is None:
        _fix_all(tracer, call, f"they reach {call.where}, whose weight is computed")
    elif isinstance(channels, Channels) and channels.dim != last:
        # It mixes positions, for every channel alike.
        (keep_ids if call.argument(2, "bias") is not None else keep)(tracer, call)
    else:
        read = _along(tracer, call, last, weight.shape[1])
        assert read is not None
        _read_and_write(tracer, call, read, name, 1)


def _along(tracer: Tracer, call: Call, dim: int, size: int) -> Channels | None:
    """The channels of the first argument along `dim`; None if they lie along another one."""
    channels = tracer.of(call.first)
    if isinstance(channels, Channels):
        return channels if channels.dim == dim else None
    none = torch.zeros(size, dtype=torch.long)
    return Channels(none, none, dim)


def _read_and_write(
    tracer: Tracer, call: Call, channels: Channels, name: str, input_dim: int
) -> None:
    weight = call.argument(1, "weight")
    output_dim = 1 - input_dim
    # The rows of a constant silence channels, and go with them; a group is written by trained rows.
    role: Role = "writes" if isinstance(weight, nn.Parameter) else "passes"
    tracer.read(channels, call.where)
    tracer.slot((name, input_dim), channels.ids, "reads")
    count = weight.shape[output_dim]
    if count == 1:  # what is never pruned is no channel, and may be broadcast over others
        tracer.slot((name, output_dim), torch.full((1,), NO_ID), role)
        tracer.set(call.result, None)
        return
    if (name, output_dim) not in tracer.slots:
        tracer.slot((name, output_dim), tracer.new_ids(count), role)
    ids = tracer.slots[name, output_dim].ids
    rows = {(name, output_dim)} | _bias_slot(tracer, call, ids)
    labels = torch.full_like(ids, tracer.label(frozenset(rows)))
    tracer.set(call.result, Channels(ids, labels, channels.dim))


def _write_in_groups(
    tracer: Tracer, call: Call, channels: Channels, groups: int, name: str, transposed: bool
) -> None:
    """A few large groups stay, and all become thinner alike: the same place of every group joins."""
    weight = call.argument(1, "weight")
    of_groups = channels.ids.view(groups, -1)
    reason = f"they meet fixed channels in {call.where}"
    tracer.join(of_groups[:1].expand_as(of_groups), of_groups, reason)
    tracer.read(channels, call.where)
    input_dim, output_dim = (0, 1) if transposed else (1, 0)
    tracer.slot((name, input_dim), channels.ids if transposed else of_groups[0], "reads")
    if (name, output_dim) not in tracer.slots:
        outputs = tracer.new_ids(weight.shape[1] if transposed else weight.shape[0] // groups)
        rows = outputs if transposed else outputs.repeat(groups)
        tracer.slot((name, output_dim), rows, "writes")
    written = tracer.slots[name, output_dim].ids
    ids = written.repeat(groups) if transposed else written
    rows_and_bias = {(name, output_dim)} | _bias_slot(tracer, call, ids)
    labels = torch.full_like(ids, tracer.label(frozenset(rows_and_bias)))
    tracer.set(call.result, Channels(ids, labels, channels.dim))


def _pass_groups(
    tracer: Tracer, call: Call, channels: Channels, groups: int, name: str, transposed: bool
) -> None:
    """A filter is a whole group: its inputs, its rows and its outputs live and die together."""
    weight = call.argument(1, "weight")
    of_groups = channels.ids.view(groups, -1)
    labels = channels.labels.view(groups, -1)
    reason = f"they meet fixed channels in {call.where}"
    tracer.join(of_groups[:, :1].expand_as(of_groups), of_groups, reason)
    _count_groups(tracer, call, "groups", call.argument(6, "groups"), of_groups[:, 0], channels.ids)
    outputs = weight.shape[1] if transposed else weight.shape[0] // groups
    ids = of_groups[:, 0].repeat_interleave(outputs)
    tracer.slot((name, 0), channels.ids if transposed else ids, "passes")
    bias = _bias_slot(tracer, call, ids)
    if bias:
        rows = frozenset({(name, 0)} | bias)
        silent = torch.full_like(ids, tracer.label(rows))
    else:
        silent = _union(tracer, labels.unbind(1)).repeat_interleave(outputs)
    tracer.set(call.result, Channels(ids, silent, channels.dim))


def _count_groups(
    tracer: Tracer, call: Call, attribute: str, number: int, ids: Tensor, source: Tensor
) -> None:
    """The number of groups, which is a torch module's, an attribute of another's, or computed."""
    if isinstance(call.owner, (nn.modules.conv._ConvNd, nn.GroupNorm)):
        number = Size(number, f"{call.owner_name}.{attribute}".lstrip("."))
    tracer.count(number, ids, source, call.where)


def _bias_slot(tracer: Tracer, call: Call, ids: Tensor) -> set[tuple[str, int]]:
    bias = call.argument(2, "bias")
    if bias is None:
        return set()
    name = tracer.name_of(bias)
    if name is None:
        tracer.fix_ids(ids, torch.zeros_like(ids), f"the bias of {call.where} is computed")
        return set()
    tracer.slot((name, 0), ids, "passes")
    return {(name, 0)}


# ---------------------------------------------------------------------------- normalisation


def batch_norm(tracer: Tracer, call: Call) -> None:
    """BatchNorm and InstanceNorm: entries of gamma and beta belong to the channel and silence it."""
    tensors = [
        call.argument(i, name)
        for i, name in enumerate(("", "running_mean", "running_var", "weight", "bias"))
    ]
    if not _own_entries(tracer, call, tensors[1:]):
        return
    weight, bias = tensors[3:]
    uses_input_statistics = call.name == "instance_norm" and call.argument(
        5, "use_input_stats", True
    )
    _silence_by_affine(tracer, call, weight, bias, keeps_zeros=uses_input_statistics)


def group_norm(tracer: Tracer, call: Call) -> None:
    groups = call.argument(1, "num_groups")
    weight, bias = call.argument(2, "weight"), call.argument(3, "bias")
    if not _own_entries(tracer, call, [weight, bias]):
        return
    channels = tracer.of(call.first)
    assert isinstance(channels, Channels)
    members = channels.ids.view(groups, -1)
    reason = f"they meet fixed channels in {call.where}"
    tracer.join(members[:, :1].expand_as(members), members, reason)
    _count_groups(tracer, call, "num_groups", groups, members[:, 0], channels.ids)
    _silence_by_affine(tracer, call, weight, bias, keeps_zeros=True)


def layer_norm(tracer: Tracer, call: Call) -> None:
    """Over channels it needs them all; over positions it is channel-wise."""
    normalised = len(call.argument(1, "normalized_shape"))
    last = range(call.first.ndim - normalised, call.first.ndim)
    channels = tracer.of_avoiding(call.first, last)
    if isinstance(channels, Channels) and channels.dim >= call.first.ndim - normalised:
        _fix_all(tracer, call, f"they reach {call.where}, over channels")
        return
    keeps_zeros = call.name == "rms_norm" or call.argument(3, "bias") is None
    (keep if keeps_zeros else keep_ids)(tracer, call)


def softmax(tracer: Tracer, call: Call) -> None:
    dim = call.argument(1, "dim")
    channels = tracer.of_avoiding(call.first, () if dim is None else (dim % call.first.ndim,))
    over_channels = isinstance(channels, Channels) and (
        dim is None or dim % call.first.ndim == channels.dim
    )
    (unknown if over_channels else keep_ids)(tracer, call)


def normalize(tracer: Tracer, call: Call) -> None:
    """F.normalize over channels needs them all."""
    dims = call.argument(2, "dim", 1)
    over = {d % call.first.ndim for d in ([dims] if isinstance(dims, int) else dims)}
    channels = tracer.of_avoiding(call.first, over)
    over_channels = isinstance(channels, Channels) and channels.dim in over
    (unknown if over_channels else keep)(tracer, call)


def grid_sample(tracer: Tracer, call: Call) -> None:
    tracer.fix(tracer.of(call.argument(1, "grid")), f"they reach {call.where}")
    keep(tracer, call)


def _own_entries(tracer: Tracer, call: Call, tensors: Sequence[Tensor | None]) -> bool:
    """Give a normalisation's entries to the channels of its input; False if there are none to give them to."""
    channels = tracer.of(call.first)
    if not isinstance(channels, Channels):
        _same(tracer, call, silent=True)
        return False
    present = [tensor for tensor in tensors if tensor is not None]
    names = [name for name in map(tracer.name_of, present) if name is not None]
    if channels.dim != 1 or len(names) < len(present):
        unknown(tracer, call)
        return False
    if isinstance(call.owner, nn.GroupNorm):
        names.append(f"{call.owner_name}.num_channels".lstrip("."))
    elif not names and isinstance(call.owner, nn.modules.instancenorm._InstanceNorm):
        names.append(f"{call.owner_name}.num_features".lstrip("."))
    for name in names:
        tracer.slot((name, 0), channels.ids, "passes")
    return True


def _silence_by_affine(
    tracer: Tracer, call: Call, weight: Tensor | None, bias: Tensor | None, keeps_zeros: bool
) -> None:
    channels = tracer.of(call.first)
    assert isinstance(channels, Channels)
    names = [tracer.name_of(tensor) for tensor in (weight, bias) if tensor is not None]
    if weight is not None:
        label = tracer.label(frozenset((name, 0) for name in names if name is not None))
        labels = torch.full_like(channels.ids, label)
    elif keeps_zeros and bias is None:
        labels = channels.labels
    else:
        labels = torch.zeros_like(channels.ids)
    tracer.set(call.result, Channels(channels.ids, labels, channels.dim))


# ---------------------------------------------------------------------------- rearrangements


def rearrange(tracer: Tracer, call: Call) -> None:
    """The same operation on the places of the channels; where they then vary along several dimensions, one shrinks."""
    source = call.first
    sizes = _sizes_asked(tracer, call)
    if not sizes and _moves_grid(tracer, call):
        return
    channels = tracer.of(source)
    if not isinstance(channels, Channels):
        _same(tracer, call, silent=True)
        for size in sizes:
            tracer.hold(size, call.where)
        return
    call.keeps_channels = call.result.ndim == 2 or call.result.shape == source.shape
    places = _moved(source, channels, call)
    varying = [d for d in range(places.ndim) if _varies(places, d)]
    if not varying:
        unknown(tracer, call)  # a single channel, of which nobody knows where it lies
        return
    _set_along(tracer, call, channels, places, varying, sizes or [None] * places.ndim)


def _set_along(
    tracer: Tracer,
    call: Call,
    channels: Channels,
    places: Tensor,
    varying: Sequence[int],
    sizes: Sequence[int | None],
) -> None:
    """What lies along a view's result.

    Args:
        places: numbers of the operand's channels, in the result's shape.
        varying: the dimensions along which they vary.
        sizes: what the view says of every dimension.
    """
    for d, size in enumerate(sizes):
        if d not in varying:
            tracer.hold(size, call.where)
    if len(varying) == 1:
        vector = _vector(places, varying[0])
        ids, labels = channels.ids[vector], channels.labels[vector]
        tracer.count(sizes[varying[0]], ids, channels.ids, call.where)
        tracer.set(call.result, Channels(ids, labels, varying[0]))
        return
    for d in reversed(range(places.ndim)):
        if d not in varying:
            places = places.select(d, 0)
    asked = tuple(sizes[d] for d in varying)
    can_shrink = tuple(_can_shrink(size, channels) for size in asked)
    split = Split(channels.ids[places], channels.ids, asked, can_shrink, call.where)
    tracer.set(call.result, Grid(split, channels.labels[places], tuple(varying)))


def _sizes_asked(tracer: Tracer, call: Call) -> list[int | None]:
    """What a view says of every dimension of its result; None: what is left. Empty for other operations."""
    if call.name in ("view_as", "reshape_as", "expand_as"):
        return [*tracer.sizes_of(call.argument(1, "other"))]
    if call.name not in ("view", "reshape", "unflatten", "expand"):
        return []
    arguments = [*call.args[1:], *call.kwargs.values()]
    before, after = 0, 0
    if call.name == "unflatten":
        before = arguments.pop(0) % call.first.ndim
        after = call.first.ndim - 1 - before
    if len(arguments) == 1 and isinstance(arguments[0], (tuple, list)):
        arguments = [*arguments[0]]
    if not all(isinstance(size, int) for size in arguments):
        return []
    asked = [None if size == -1 else size for size in arguments]
    return [*[None] * before, *asked, *[None] * after]


def _can_shrink(size: int | None, channels: Channels) -> bool:
    """Does this size follow when channels go, or can it be made to?"""
    if size is None:
        return True
    if not isinstance(size, Size):
        return False
    return not size.sources or follows(size, channels.ids)


def _moves_grid(tracer: Tracer, call: Call) -> bool:
    """Pass a grid on, where that can be left open."""
    grid = tracer.known(call.first)
    moved = _moved_grid(call.first, grid, call) if isinstance(grid, Grid) else None
    if moved is None:
        return False
    for result, part in zip(tensors_in(call.result), moved, strict=True):
        tracer.set(result, part)
    return True


def _moved_grid(source: Tensor, grid: Grid, call: Call) -> list[Grid] | None:
    """The grids of a call's results if every axis still lies along one dimension, or one entry of it was taken."""
    lies = [axis for axis, dim in enumerate(grid.dims) if dim is not None]
    results: list[Grid] | None = None
    for axis in lies:
        dim, size = grid.dims[axis], grid.split.ids.shape[axis]
        assert dim is not None
        whole = Channels(torch.arange(size), torch.zeros(size, dtype=torch.long), dim)
        found = _moved(source, whole, call)
        parts = [found] if isinstance(found, Tensor) else [*found]
        results = results or [grid] * len(parts)
        for number, part in enumerate(parts):
            moved = _moved_axis(results[number], axis, part)
            if moved is None:
                return None
            results[number] = moved
    return results


def _moved_axis(grid: Grid, axis: int, places: Tensor) -> Grid | None:
    """The same grid with one axis where its places are now; None if they are not all there, in their order."""
    varying = [d for d in range(places.ndim) if _varies(places, d)]
    dims, labels = [*grid.dims], grid.labels
    if not varying:
        place = int(places.flatten()[0])
        dims[axis], labels = None, labels.narrow(axis, place, 1)
    elif len(varying) == 1 and places.shape[varying[0]] == labels.shape[axis]:
        if not torch.equal(_vector(places, varying[0]), torch.arange(labels.shape[axis])):
            return None
        dims[axis] = varying[0]
    else:
        return None
    return Grid(grid.split, labels, tuple(dims))


def pixel_shuffle(tracer: Tracer, call: Call) -> None:
    """[N, C r^2, H, W] -> [N, C, r H, r W]: the r^2 channels of a new one join."""
    channels = tracer.of(call.first)
    factor = call.argument(1, "upscale_factor")
    if not isinstance(channels, Channels) or channels.dim != call.first.ndim - 3:
        unknown(tracer, call)
        return
    members = channels.ids.view(-1, factor**2)
    labels = channels.labels.view(-1, factor**2)
    for member in range(1, factor**2):
        tracer.join(members[:, 0], members[:, member], f"they meet fixed channels in {call.where}")
    together = _union(tracer, labels.unbind(1))
    tracer.set(call.result, Channels(members[:, 0], together, channels.dim))


def pixel_unshuffle(tracer: Tracer, call: Call) -> None:
    """[N, C, r H, r W] -> [N, C r^2, H, W]: each channel has r^2 places."""
    channels = tracer.of(call.first)
    factor = call.argument(1, "downscale_factor")
    if not isinstance(channels, Channels) or channels.dim != call.first.ndim - 3:
        unknown(tracer, call)
        return
    ids = channels.ids.repeat_interleave(factor**2)
    labels = channels.labels.repeat_interleave(factor**2)
    tracer.set(call.result, Channels(ids, labels, channels.dim))


def channel_shuffle(tracer: Tracer, call: Call) -> None:
    """The same place of every group joins."""
    channels = tracer.of(call.first)
    groups = call.argument(1, "groups")
    if not isinstance(channels, Channels) or channels.dim != 1:
        unknown(tracer, call)
        return
    members = channels.ids.view(groups, -1)
    for member in range(1, groups):
        tracer.join(members[0], members[member], f"they meet fixed channels in {call.where}")
    labels = channels.labels.view(groups, -1).T.flatten()
    tracer.set(call.result, Channels(members.T.flatten(), labels, 1))


def take(tracer: Tracer, call: Call) -> None:
    """Indexing: all channels in their order pass, a part of them is written in the code and fixes them."""
    if _moves_grid(tracer, call):
        return
    channels = tracer.of(call.first)
    if not isinstance(channels, Channels):
        _same(tracer, call, silent=True)
        return
    places = _moved(call.first, channels, call)
    results = [call.result] if isinstance(call.result, Tensor) else [*call.result]
    parts = [places] if isinstance(places, Tensor) else [*places]
    everything = torch.arange(len(channels.ids))
    for result, part in zip(results, parts, strict=True):
        varying = [d for d in range(part.ndim) if _varies(part, d)]
        if len(varying) == 1 and torch.equal(_vector(part, varying[0]), everything):
            tracer.set(result, Channels(channels.ids, channels.labels, varying[0]))
        else:
            reason = f"a part of them is taken by number in {call.where}"
            tracer.fix(channels, reason)
            tracer.set(result, Fixed(reason))


def set_item(tracer: Tracer, call: Call) -> None:
    reason = f"{call.where} writes into a part of a tensor"
    for tensor in tensors_in(call.args):
        tracer.fix(tracer.of(tensor), reason)
    tracer.set(call.first, Fixed(reason))


def split(tracer: Tracer, call: Call) -> None:
    """Into equal parts by their number: the same place of every part joins. Sizes written in the code fix channels."""
    channels = tracer.of(call.first)
    dim = call.argument(2, "dim", 0) % call.first.ndim
    if not isinstance(channels, Channels) or channels.dim != dim:
        for part in call.result:
            tracer.set(part, channels)
        return
    sizes = [part.shape[dim] for part in call.result]
    by_number = call.name in ("chunk", "tensor_split") and isinstance(
        call.argument(1, "chunks"), int
    )
    equal = len({*sizes}) == 1
    pieces = channels.ids.split(sizes)
    labels = channels.labels.split(sizes)
    if by_number and equal:
        for ids in pieces:
            tracer.join(pieces[0], ids, f"they meet fixed channels in {call.where}")
    elif len(sizes) > 1:
        _count_pieces(tracer, call, channels, pieces)
    for part, ids, silent in zip(call.result, pieces, labels, strict=True):
        tracer.set(part, Channels(ids, silent, dim))


def _count_pieces(tracer: Tracer, call: Call, channels: Channels, pieces: Sequence[Tensor]) -> None:
    """The sizes of a split: a sequence of them, or one for all."""
    asked = call.argument(1, "split_size_or_sections", call.kwargs.get("split_size"))
    if call.name not in ("split", "split_with_sizes") or asked is None:
        tracer.fix(channels, f"they are split by sizes in {call.where}")
        return
    sizes = [*asked] if isinstance(asked, (tuple, list)) else [asked] * len(pieces)
    for size, ids in zip(sizes, pieces, strict=True):
        if not isinstance(size, Size) and len(ids) > 1:
            tracer.fix(channels, f"they are split by sizes in {call.where}")
        tracer.count(size, ids, channels.ids, call.where)


def glu(tracer: Tracer, call: Call) -> None:
    """The first half times a gate of the second: both halves shrink alike."""
    channels = tracer.of(call.first)
    dim = call.argument(1, "dim", -1) % call.first.ndim
    if not isinstance(channels, Channels):
        _same(tracer, call, silent=True)
        return
    if channels.dim != dim:
        keep(tracer, call)
        return
    half, gate = channels.ids.chunk(2)
    tracer.join(half, gate, f"they meet fixed channels in {call.where}")
    tracer.set(call.result, Channels(half, channels.labels.chunk(2)[0], dim))


def concatenate(tracer: Tracer, call: Call) -> None:
    """Along channels: side by side. Along positions: joined place by place."""
    tensors = [*call.argument(0, "tensors")]
    dim = call.argument(1, "dim", 0) % call.result.ndim
    tensors = [tensor for tensor in tensors if tensor.ndim == call.result.ndim]
    found = [tracer.of(tensor) for tensor in tensors]
    along = {channels.dim for channels in found if isinstance(channels, Channels)}
    if not along:
        tracer.set(call.result, _first_known(tracer, tensors))
    elif along == {dim}:
        parts = [_laid_out(tracer, tensor, dim) for tensor in tensors]
        ids = torch.cat([part.ids for part in parts])
        labels = torch.cat([part.labels for part in parts])
        tracer.set(call.result, Channels(ids, labels, dim))
    elif dim not in along and len(along) == 1:
        _elementwise(tracer, call, tensors, _union)
    else:
        unknown(tracer, call)


def stack(tracer: Tracer, call: Call) -> None:
    """Along a new dimension: joined place by place."""
    tensors = [*call.argument(0, "tensors")]
    dim = call.argument(1, "dim", 0) % call.result.ndim
    found = [tracer.of(tensor) for tensor in tensors]
    along = {channels.dim for channels in found if isinstance(channels, Channels)}
    if len(along) != 1 or not all(isinstance(channels, Channels) for channels in found):
        unknown(tracer, call)
        return
    old = along.pop()
    vectors = [channels for channels in found if isinstance(channels, Channels)]
    for channels in vectors[1:]:
        tracer.join(vectors[0].ids, channels.ids, f"they meet fixed channels in {call.where}")
    labels = _union(tracer, [channels.labels for channels in vectors])
    tracer.set(call.result, Channels(vectors[0].ids, labels, old + (dim <= old)))


def pad(tracer: Tracer, call: Call) -> None:
    """Of positions: channel-wise. Of channels: entries that are no channel lie beside them."""
    widths = [*call.argument(1, "pad")]
    mode, value = call.argument(2, "mode", "constant"), call.argument(3, "value") or 0
    channels = tracer.of(call.first)
    if not isinstance(channels, Channels):
        _same(tracer, call, silent=True)
        return
    place = 2 * (call.first.ndim - 1 - channels.dim)
    before, after = widths[place : place + 2] if place < len(widths) else (0, 0)
    silent = mode != "constant" or value == 0
    if (before, after) == (0, 0):
        (keep if silent else keep_ids)(tracer, call)
    elif mode != "constant" or min(before, after) < 0:
        unknown(tracer, call)
    else:
        ids = F.pad(channels.ids, (before, after), value=NO_ID)
        labels = F.pad(channels.labels, (before, after), value=NO_LABEL)
        tracer.set(call.result, Channels(ids, labels if silent else labels * 0, channels.dim))


def roll(tracer: Tracer, call: Call) -> None:
    dims = call.argument(2, "dims")
    channels = tracer.of(call.first)
    moved = {d % call.first.ndim for d in ([dims] if isinstance(dims, int) else dims or [])}
    moves_channels = isinstance(channels, Channels) and (not moved or channels.dim in moved)
    (unknown if moves_channels else keep)(tracer, call)


def _moved(source: Tensor, channels: Channels, call: Call) -> Any:
    """Where the channels are afterwards: the same operation on a tensor that holds each entry's channel number."""
    shape = [1] * source.ndim
    shape[channels.dim] = -1
    numbers = torch.arange(len(channels.ids), device=source.device).view(shape).expand(source.shape)
    if call.name in ("view", "view_as"):  # which an expanded tensor refuses
        return numbers.reshape(call.result.shape).cpu()
    operation = getattr(numbers, call.method)
    if isinstance(operation, Tensor):  # a property, such as mT
        return operation.cpu()
    named = {key: value for key, value in call.kwargs.items() if key not in ("input", "self")}
    return map_tensors(operation(*call.args[1:], **named), Tensor.cpu)


def _varies(places: Tensor, dim: int) -> bool:
    if places.shape[dim] == 1 or places.stride(dim) == 0:
        return False
    return not torch.equal(places, places.narrow(dim, 0, 1).expand_as(places))


def _vector(places: Tensor, dim: int) -> Tensor:
    """The entries along one dimension, at the first place of all others."""
    for other in reversed(range(places.ndim)):
        if other != dim:
            places = places.select(other, 0)
    return places


def _laid_out(tracer: Tracer, tensor: Tensor, dim: int) -> Channels:
    """The channels of one part of a concatenation; a part that has none keeps its place."""
    channels = tracer.of(tensor)
    if isinstance(channels, Channels):
        return channels
    size = tensor.shape[dim]
    ids = torch.zeros(size, dtype=torch.long)
    if isinstance(channels, Fixed):
        ids = tracer.new_ids(1).expand(size)
        tracer.fix_ids(ids[:1], ids[:1] * 0, channels.reason)
    return Channels(ids, torch.zeros(size, dtype=torch.long), dim)


# ---------------------------------------------------------------------------- products of matrices


def matmul(tracer: Tracer, call: Call) -> None:
    """Channels along rows, columns or the batch pass; those along the dimension that is summed are read."""
    first, second = call.argument(0, "input"), call.argument(1, "other", call.kwargs.get("mat2"))
    if min(first.ndim, second.ndim) < 2:
        unknown(tracer, call)
        return
    left, right = tracer.of(first), tracer.of(second)
    sides = (_side_of_product(first, left, -1), _side_of_product(second, right, -2))
    match sides:
        case ("summed", "summed"):
            assert isinstance(left, Channels)
            assert isinstance(right, Channels)
            tracer.join(left.ids, right.ids, f"they meet fixed channels in {call.where}")
            tracer.read(
                replace(left, labels=_either(tracer, [left.labels, right.labels])), call.where
            )
        case ("batch", "batch"):
            _elementwise(tracer, call, [first, second], _either)
        case ("free", "none"):
            assert isinstance(left, Channels)
            tracer.set(call.result, replace(left, dim=left.dim + call.result.ndim - first.ndim))
        case ("none", "free"):
            assert isinstance(right, Channels)
            tracer.set(call.result, replace(right, dim=right.dim + call.result.ndim - second.ndim))
        case ("none", "none"):
            tracer.set(call.result, _first_known(tracer, [first, second]))
        case _:
            unknown(tracer, call)


def _side_of_product(tensor: Tensor, channels: Channels | Fixed | None, summed: int) -> str:
    if not isinstance(channels, Channels):
        return "none"
    behind = _behind_the_end(tensor, channels)
    if behind < -2:
        return "batch"
    return "summed" if behind == summed else "free"


def attention(tracer: Tracer, call: Call) -> None:
    """scaled_dot_product_attention: whole heads go; entries of a head only where the scale is given."""
    operands = [call.argument(place, name) for place, name in enumerate(("query", "key", "value"))]
    mask = call.argument(3, "attn_mask")
    summed = call.kwargs.get("scale") is None
    found = []
    for tensor in operands:
        avoided = (tensor.ndim - 2, tensor.ndim - 1) if summed else (tensor.ndim - 2,)
        found.append(tracer.of_avoiding(tensor, avoided))
    if not all(isinstance(channels, Channels) for channels in found):
        unknown(tracer, call)
        return
    query, key, value = [channels for channels in found if isinstance(channels, Channels)]
    behind = {_behind_the_end(t, c) for t, c in zip(operands, (query, key, value), strict=True)}
    is_of_heads = behind == {-3} and (mask is None or mask.ndim < 3 or mask.shape[-3] == 1)
    is_of_entries = behind == {-1} and not summed
    if not (is_of_heads or is_of_entries) or tracer.of(mask) is not None:
        unknown(tracer, call)
        return
    for channels in (query, key):
        tracer.join(value.ids, channels.ids, f"they meet fixed channels in {call.where}")
    tracer.set(call.result, replace(value, dim=call.result.ndim + behind.pop()))


# ---------------------------------------------------------------------------- reductions


def reduce(tracer: Tracer, call: Call) -> None:
    """Over positions: channel-wise. Over channels: they are all needed."""
    other = call.argument(1, "other")
    if isinstance(other, Tensor):
        combine(tracer, call)
        return
    ndim = call.first.ndim
    dims = call.argument(1, "dim", call.kwargs.get("axis"))
    if isinstance(dims, bool) or dims is None or dims == ():
        dims = [*range(ndim)]
    dims = {d % ndim for d in ([dims] if isinstance(dims, int) else dims)}
    channels = tracer.of_avoiding(call.first, dims)
    if not isinstance(channels, Channels):
        _same(tracer, call, silent=True)
        return
    if channels.dim in dims:
        unknown(tracer, call)
        return
    results = [*tensors_in(call.result)]
    keeps_dims = results[0].ndim == ndim
    dim = channels.dim if keeps_dims else channels.dim - sum(d < channels.dim for d in dims)
    silent = call.name in REDUCTIONS_OF_ZEROS
    labels = channels.labels if silent else torch.zeros_like(channels.labels)
    call.keeps_channels = call.name == "mean"
    for result in results:
        tracer.set(result, Channels(channels.ids, labels, dim))


def norm(tracer: Tracer, call: Call) -> None:
    """torch.norm and torch.linalg.vector_norm, whose second argument is the order."""
    dims = call.argument(2, "dim")
    moved = Call(
        call.name,
        (call.first, dims),
        {},
        call.result,
        call.where,
        call.order,
        call.owner,
        call.owner_name,
        call.method,
    )
    reduce(tracer, moved)


def _rules() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    rules |= dict.fromkeys(ZERO_PRESERVING, keep)
    rules |= dict.fromkeys(CHANNEL_WISE, keep_ids)
    rules |= dict.fromkeys(REARRANGEMENTS, rearrange)
    rules |= dict.fromkeys(REDUCTIONS, reduce)
    rules |= dict.fromkeys(CONSTANTS, constant)
    rules |= dict.fromkeys((*SUMS, "eq", "ne", "lt", "le", "gt", "ge"), combine)
    rules |= dict.fromkeys((*PRODUCTS, "rdiv"), multiply)
    rules |= dict.fromkeys([f"conv{d}d" for d in (1, 2, 3)], convolve)
    rules |= dict.fromkeys([f"conv_transpose{d}d" for d in (1, 2, 3)], convolve)
    rules |= dict.fromkeys(("clamp", "clip", "hardtanh", "clamp_min", "clamp_max"), clamp)
    rules |= dict.fromkeys(("getitem", "narrow", "select", "unbind", "index_select"), take)
    rules |= dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes"), split)
    rules |= dict.fromkeys(("cat", "concat", "concatenate"), concatenate)
    rules |= dict.fromkeys(("layer_norm", "rms_norm"), layer_norm)
    rules |= dict.fromkeys(("softmax", "log_softmax", "softmin", "cumsum"), softmax)
    rules |= dict.fromkeys(("batch_norm", "instance_norm"), batch_norm)
    rules |= dict.fromkeys(("native_channel_shuffle", "channel_shuffle"), channel_shuffle)
    rules |= dict.fromkeys(("norm", "vector_norm"), norm)
    return rules | {
        "glu": glu,
        "grid_sample": grid_sample,
        "group_norm": group_norm,
        "linear": linear,
        "masked_fill": fill_masked,
        "matmul": matmul,
        "bmm": matmul,
        "normalize": normalize,
        "pad": pad,
        "pixel_shuffle": pixel_shuffle,
        "pixel_unshuffle": pixel_unshuffle,
        "pow": raise_to,
        "prelu": prelu,
        "roll": roll,
        "scaled_dot_product_attention": attention,
        "setitem": set_item,
        "stack": stack,
        "where": choose,
    }


RULES: dict[str, Rule] = _rules()
