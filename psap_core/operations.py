"""What each torch operation does to the channels that lie along its operands; `tracer.py` runs these rules.

A rule takes the ledger and one call, and says what lies along the call's results. Operations that are not listed fix
the channels of all their operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from psap_core.channels import NO_ID, Call, Channels, Fixed, Ledger, Role
from psap_core.elementwise import (
    PRODUCTS,
    SUMS,
    behind_the_end,
    choose,
    clamp,
    combine,
    constant,
    either,
    elementwise,
    fill_masked,
    first_known,
    fix_all,
    keep,
    keep_ids,
    multiply,
    prelu,
    raise_to,
    same,
    unknown,
)
from psap_core.inputs import tensors_in
from psap_core.layouts import count, of, of_avoiding
from psap_core.rearrangements import (
    channel_shuffle,
    concatenate,
    glu,
    pad,
    pixel_shuffle,
    pixel_unshuffle,
    rearrange,
    roll,
    set_item,
    split,
    stack,
    take,
)
from psap_core.sizes import Size

# Channel-wise, and 0 becomes 0: a silent channel is silent behind them.
ZERO_PRESERVING = [
    "abs",
    "arctan",
    "asinh",
    "atan",
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
    "leaky_relu",
    "log1p",
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
]
# The same over positions.
RESAMPLING = [
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool1d_with_indices",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool3d",
    "adaptive_max_pool3d_with_indices",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "interpolate",
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
    "logical_not",
    "logsigmoid",
    "lt",
    "ne",
    "ones_like",
    "rand_like",
    "randn_like",
    "sigmoid",
    "softplus",
    "zeros_like",
]
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
INFINITE_AT_ZERO = ["log", "log10", "log2", "reciprocal", "rsqrt"]
REDUCTIONS_OF_ZEROS = [
    "amax",
    "amin",
    "count_nonzero",
    "linalg_vector_norm",
    "max",
    "mean",
    "min",
    "norm",
    "std",
    "std_mean",
    "sum",
    "var",
    "var_mean",
]
REDUCTIONS = [*REDUCTIONS_OF_ZEROS, "all", "any", "argmax", "argmin", "logsumexp", "median", "prod"]
CONSTANTS = ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


# ---------------------------------------------------------------------------- convolutions and linear layers


def convolve(ledger: Ledger, call: Call) -> None:
    """Reads the channels of its input and writes new ones; a grouped one passes whole groups on."""
    weight = call.argument(1, "weight")
    transposed = "transpose" in call.name
    groups = call.argument(6, "groups", 1)
    dim = call.first.ndim - weight.ndim + 1
    name = ledger.name_of(weight)
    if name is None:
        _reach_computed_weight(ledger, call)
        return
    channels = _along(
        ledger, call, dim, weight.shape[0] if transposed else weight.shape[1] * groups
    )
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    if channels is None:
        unknown(ledger, call)
    elif groups == 1:
        _read_and_write(ledger, call, channels, name, 0 if transposed else 1)
    elif min(rows, columns) > groups:
        _write_in_groups(ledger, call, channels, groups, name, transposed)
    else:
        _pass_groups(ledger, call, channels, groups, name, transposed)


def linear(ledger: Ledger, call: Call) -> None:
    weight = call.argument(1, "weight")
    name = ledger.name_of(weight)
    channels = of(ledger, call.first)
    last = call.first.ndim - 1
    if name is None:
        _reach_computed_weight(ledger, call)
    elif isinstance(channels, Channels) and channels.dim != last:
        # Its MACs would go with channels, of which it holds nothing.
        fix_all(ledger, call, f"they reach {call.where}, over positions")
    else:
        read = _along(ledger, call, last, weight.shape[1])
        assert read is not None
        _read_and_write(ledger, call, read, name, 1)


def _reach_computed_weight(ledger: Ledger, call: Call) -> None:
    """No entries of a parameter belong to the channels of a weight that is normalised, standardised or generated."""
    ledger.computed.add(call.owner_name)
    fix_all(ledger, call, f"they reach {call.where}, whose weight is computed")


def _along(ledger: Ledger, call: Call, dim: int, size: int) -> Channels | None:
    """The channels of the first argument along `dim`; None if they lie along another one."""
    channels = of(ledger, call.first)
    if isinstance(channels, Channels):
        return channels if channels.dim == dim else None
    none = torch.zeros(size, dtype=torch.long)
    return Channels(none, none, dim)


def _read_and_write(
    ledger: Ledger, call: Call, channels: Channels, name: str, input_dim: int
) -> None:
    weight = call.argument(1, "weight")
    output_dim = 1 - input_dim
    # The rows of a constant silence channels, and go with them; a group is written by trained rows.
    role: Role = "writes" if isinstance(weight, nn.Parameter) else "passes"
    ledger.read(channels, call.where)
    ledger.slot((name, input_dim), channels.ids, "reads")
    count = weight.shape[output_dim]
    if count == 1:  # what is never pruned is no channel, and may be broadcast over others
        ledger.slot((name, output_dim), torch.full((1,), NO_ID), role)
        ledger.set(call.result, None)
        return
    if (name, output_dim) not in ledger.slots:
        ledger.slot((name, output_dim), ledger.new_ids(count), role)
    elif ledger.slots[name, output_dim].role == "reads":
        ledger.fix_ids(ledger.slots[name, output_dim].ids, None, f"{name} is used both ways")
    ids = ledger.slots[name, output_dim].ids
    rows = {(name, output_dim)} | _bias_slot(ledger, call, ids)
    labels = torch.full_like(ids, ledger.label(frozenset(rows)))
    ledger.set(call.result, Channels(ids, labels, channels.dim))


def _write_in_groups(
    ledger: Ledger, call: Call, channels: Channels, groups: int, name: str, transposed: bool
) -> None:
    """A few large groups stay, and all become thinner alike: the same place of every group joins."""
    weight = call.argument(1, "weight")
    of_groups = channels.ids.view(groups, -1)
    reason = f"they meet fixed channels in {call.where}"
    ledger.join(of_groups[:1].expand_as(of_groups), of_groups, reason)
    ledger.read(channels, call.where)
    input_dim, output_dim = (0, 1) if transposed else (1, 0)
    ledger.slot((name, input_dim), channels.ids if transposed else of_groups[0], "reads")
    if (name, output_dim) not in ledger.slots:
        outputs = ledger.new_ids(weight.shape[1] if transposed else weight.shape[0] // groups)
        rows = outputs if transposed else outputs.repeat(groups)
        ledger.slot((name, output_dim), rows, "writes")
    slot_ids = ledger.slots[name, output_dim].ids
    ids = slot_ids.repeat(groups) if transposed else slot_ids
    rows_and_bias = {(name, output_dim)} | _bias_slot(ledger, call, ids)
    labels = torch.full_like(ids, ledger.label(frozenset(rows_and_bias)))
    ledger.set(call.result, Channels(ids, labels, channels.dim))


def _pass_groups(
    ledger: Ledger, call: Call, channels: Channels, groups: int, name: str, transposed: bool
) -> None:
    """A filter is a whole group: its inputs, its rows and its outputs live and die together."""
    weight = call.argument(1, "weight")
    of_groups = channels.ids.view(groups, -1)
    labels = channels.labels.view(groups, -1)
    reason = f"they meet fixed channels in {call.where}"
    ledger.join(of_groups[:, :1].expand_as(of_groups), of_groups, reason)
    _count_groups(ledger, call, "groups", call.argument(6, "groups"), of_groups[:, 0], channels.ids)
    outputs = weight.shape[1] if transposed else weight.shape[0] // groups
    ids = of_groups[:, 0].repeat_interleave(outputs)
    ledger.slot((name, 0), channels.ids if transposed else ids, "passes")
    bias = _bias_slot(ledger, call, ids)
    if bias:
        rows = frozenset({(name, 0)} | bias)
        silent = torch.full_like(ids, ledger.label(rows))
    else:
        silent = ledger.union(labels.unbind(1)).repeat_interleave(outputs)
    ledger.set(call.result, Channels(ids, silent, channels.dim))


def _count_groups(
    ledger: Ledger, call: Call, attribute: str, number: int, ids: Tensor, source: Tensor
) -> None:
    """The number of groups, which is a torch module's, an attribute of another's, or computed."""
    if isinstance(call.owner, (nn.modules.conv._ConvNd, nn.GroupNorm)):
        number = Size(number, f"{call.owner_name}.{attribute}".lstrip("."))
    count(ledger, number, ids, source, call.where)


def _bias_slot(ledger: Ledger, call: Call, ids: Tensor) -> set[tuple[str, int]]:
    bias = call.argument(2, "bias")
    if bias is None:
        return set()
    name = ledger.name_of(bias)
    if name is None:
        ledger.fix_ids(ids, None, f"the bias of {call.where} is computed")
        return set()
    ledger.slot((name, 0), ids, "passes")
    return {(name, 0)}


# ---------------------------------------------------------------------------- normalisation


def batch_norm(ledger: Ledger, call: Call) -> None:
    """BatchNorm and InstanceNorm: entries of gamma and beta belong to the channel and silence it."""
    tensors = [
        call.argument(i, name)
        for i, name in enumerate(("", "running_mean", "running_var", "weight", "bias"))
    ]
    if not _own_entries(ledger, call, tensors[1:]):
        return
    weight, bias = tensors[3:]
    uses_input_statistics = call.name == "instance_norm" and call.argument(
        5, "use_input_stats", True
    )
    _silence_by_affine(ledger, call, weight, bias, keeps_zeros=uses_input_statistics)


def group_norm(ledger: Ledger, call: Call) -> None:
    groups = call.argument(1, "num_groups")
    weight, bias = call.argument(2, "weight"), call.argument(3, "bias")
    if not _own_entries(ledger, call, [weight, bias]):
        return
    channels = of(ledger, call.first)
    assert isinstance(channels, Channels)
    members = channels.ids.view(groups, -1)
    reason = f"they meet fixed channels in {call.where}"
    ledger.join(members[:, :1].expand_as(members), members, reason)
    _count_groups(ledger, call, "num_groups", groups, members[:, 0], channels.ids)
    _silence_by_affine(ledger, call, weight, bias, keeps_zeros=True)


def layer_norm(ledger: Ledger, call: Call) -> None:
    """Over channels it needs them all; over positions it is channel-wise."""
    normalised = len(call.argument(1, "normalized_shape"))
    last = range(call.first.ndim - normalised, call.first.ndim)
    channels = of_avoiding(ledger, call.first, last)
    if isinstance(channels, Channels) and channels.dim >= call.first.ndim - normalised:
        fix_all(ledger, call, f"they reach {call.where}, over channels")
        return
    keeps_zeros = call.name == "rms_norm" or call.argument(3, "bias") is None
    (keep if keeps_zeros else keep_ids)(ledger, call)


def softmax(ledger: Ledger, call: Call) -> None:
    dim = call.argument(1, "dim")
    channels = of_avoiding(ledger, call.first, () if dim is None else (dim % call.first.ndim,))
    over_channels = isinstance(channels, Channels) and (
        dim is None or dim % call.first.ndim == channels.dim
    )
    (unknown if over_channels else keep_ids)(ledger, call)


def normalize(ledger: Ledger, call: Call) -> None:
    """F.normalize over channels needs them all."""
    dims = call.argument(2, "dim", 1)
    over = {d % call.first.ndim for d in ([dims] if isinstance(dims, int) else dims)}
    channels = of_avoiding(ledger, call.first, over)
    over_channels = isinstance(channels, Channels) and channels.dim in over
    (unknown if over_channels else keep)(ledger, call)


def resample(ledger: Ledger, call: Call) -> None:
    """Pooling and interpolation are channel-wise over positions, which are the last dimensions."""
    digit = call.name.partition("pool")[2][:1]
    positions = int(digit) if digit else call.first.ndim - 2
    over = range(call.first.ndim - positions, call.first.ndim)
    channels = of_avoiding(ledger, call.first, over)
    over_channels = isinstance(channels, Channels) and channels.dim in over
    (unknown if over_channels else keep)(ledger, call)


def grid_sample(ledger: Ledger, call: Call) -> None:
    ledger.fix(of(ledger, call.argument(1, "grid")), f"they reach {call.where}")
    resample(ledger, call)


def _own_entries(ledger: Ledger, call: Call, tensors: Sequence[Tensor | None]) -> bool:
    """Give a normalisation's entries to the channels of its input; False if there are none to give them to."""
    channels = of(ledger, call.first)
    if not isinstance(channels, Channels):
        for name in filter(None, map(ledger.name_of, tensors)):
            ledger.keep_tensor(name)
        same(ledger, call, silent=True)
        return False
    present = [tensor for tensor in tensors if tensor is not None]
    names = [name for name in map(ledger.name_of, present) if name is not None]
    if channels.dim != 1 or len(names) < len(present):
        unknown(ledger, call)
        return False
    if isinstance(call.owner, nn.GroupNorm):
        names.append(f"{call.owner_name}.num_channels".lstrip("."))
    elif not names and isinstance(call.owner, nn.modules.instancenorm._InstanceNorm):
        names.append(f"{call.owner_name}.num_features".lstrip("."))
    for name in names:
        ledger.slot((name, 0), channels.ids, "passes")
    return True


def _silence_by_affine(
    ledger: Ledger, call: Call, weight: Tensor | None, bias: Tensor | None, keeps_zeros: bool
) -> None:
    channels = of(ledger, call.first)
    assert isinstance(channels, Channels)
    names = [ledger.name_of(tensor) for tensor in (weight, bias) if tensor is not None]
    if weight is not None:
        label = ledger.label(frozenset((name, 0) for name in names if name is not None))
        labels = torch.full_like(channels.ids, label)
    elif keeps_zeros and bias is None:
        labels = channels.labels
    else:
        labels = torch.zeros_like(channels.ids)
    ledger.set(call.result, Channels(channels.ids, labels, channels.dim))


def infinite_at_zero(ledger: Ledger, call: Call) -> None:
    """Channel-wise; but a silent channel would become infinite, and what is multiplied with it no number."""
    channels = of(ledger, call.first)
    is_silent = isinstance(channels, Channels) and bool(channels.labels.any())
    (unknown if is_silent else keep_ids)(ledger, call)


# ---------------------------------------------------------------------------- products of matrices


def matmul(ledger: Ledger, call: Call) -> None:
    """Channels along rows, columns or the batch pass; those along the dimension that is summed are read."""
    first, second = call.argument(0, "input"), call.argument(1, "other", call.kwargs.get("mat2"))
    if min(first.ndim, second.ndim) < 2:
        unknown(ledger, call)
        return
    left, right = of(ledger, first), of(ledger, second)
    sides = (_side_of_product(first, left, -1), _side_of_product(second, right, -2))
    match sides:
        case ("summed", "summed"):
            assert isinstance(left, Channels)
            assert isinstance(right, Channels)
            ledger.join(left.ids, right.ids, f"they meet fixed channels in {call.where}")
            ledger.read(
                replace(left, labels=either(ledger, [left.labels, right.labels])), call.where
            )
        case ("batch", "batch"):
            elementwise(ledger, call, [first, second], either)
        case ("free", "none"):
            assert isinstance(left, Channels)
            ledger.set(call.result, replace(left, dim=left.dim + call.result.ndim - first.ndim))
        case ("none", "free"):
            assert isinstance(right, Channels)
            ledger.set(call.result, replace(right, dim=right.dim + call.result.ndim - second.ndim))
        case ("none", "none"):
            ledger.set(call.result, first_known(ledger, [first, second]))
        case _:
            unknown(ledger, call)


def _side_of_product(tensor: Tensor, channels: Channels | Fixed | None, summed: int) -> str:
    if not isinstance(channels, Channels):
        return "none"
    behind = behind_the_end(tensor, channels)
    if behind < -2:
        return "batch"
    return "summed" if behind == summed else "free"


def attention(ledger: Ledger, call: Call) -> None:
    """scaled_dot_product_attention: whole heads go; entries of a head only where the scale is given."""
    operands = [call.argument(place, name) for place, name in enumerate(("query", "key", "value"))]
    mask = call.argument(3, "attn_mask")
    summed = call.kwargs.get("scale") is None
    layouts = []
    for tensor in operands:
        dims = (tensor.ndim - 2, tensor.ndim - 1) if summed else (tensor.ndim - 2,)
        layouts.append(of_avoiding(ledger, tensor, dims))
    if not all(isinstance(channels, Channels) for channels in layouts):
        unknown(ledger, call)
        return
    query, key, value = [channels for channels in layouts if isinstance(channels, Channels)]
    behind = {behind_the_end(t, c) for t, c in zip(operands, (query, key, value), strict=True)}
    is_of_heads = behind == {-3} and (mask is None or mask.ndim < 3 or mask.shape[-3] == 1)
    is_of_entries = behind == {-1} and not summed
    if not (is_of_heads or is_of_entries) or of(ledger, mask) is not None:
        unknown(ledger, call)
        return
    reason = f"they meet fixed channels in {call.where}"
    if is_of_heads and not len(query.ids) == len(key.ids) == len(value.ids):  # grouped queries
        unknown(ledger, call)
        return
    ledger.join(query.ids, key.ids, reason)
    if is_of_heads:
        ledger.join(value.ids, query.ids, reason)
    else:
        silent = either(ledger, [query.labels, key.labels])
        ledger.read(replace(query, labels=silent), call.where)
    ledger.set(call.result, replace(value, dim=call.result.ndim + behind.pop()))


# ---------------------------------------------------------------------------- reductions


def reduce(ledger: Ledger, call: Call) -> None:
    """Over positions: channel-wise. Over channels: they are all needed."""
    other = call.argument(1, "other")
    if isinstance(other, Tensor):
        combine(ledger, call)
        return
    ndim = call.first.ndim
    dims = call.argument(1, "dim", call.kwargs.get("axis"))
    if isinstance(dims, bool) or dims is None or dims == ():
        dims = [*range(ndim)]
    dims = {d % ndim for d in ([dims] if isinstance(dims, int) else dims)}
    channels = of_avoiding(ledger, call.first, dims)
    if not isinstance(channels, Channels):
        same(ledger, call, silent=True)
        return
    if channels.dim in dims:
        unknown(ledger, call)
        return
    results = [*tensors_in(call.result)]
    keeps_dims = results[0].ndim == ndim
    dim = channels.dim if keeps_dims else channels.dim - sum(d < channels.dim for d in dims)
    silent = call.name in REDUCTIONS_OF_ZEROS
    labels = channels.labels if silent else torch.zeros_like(channels.labels)
    call.keeps_channels = call.name == "mean"
    for result in results:
        ledger.set(result, Channels(channels.ids, labels, dim))


def norm(ledger: Ledger, call: Call) -> None:
    """torch.norm and torch.linalg.vector_norm, whose second argument is the order."""
    dims = call.argument(2, "dim")
    reduce(ledger, replace(call, args=(call.first, dims), kwargs={}))


Rule = Callable[[Ledger, Call], None]


def _rules() -> dict[str, Rule]:
    rules: dict[str, Rule] = {}
    rules |= dict.fromkeys(ZERO_PRESERVING, keep)
    rules |= dict.fromkeys(RESAMPLING, resample)
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
    rules |= dict.fromkeys(("norm", "linalg_vector_norm"), norm)
    rules |= dict.fromkeys(INFINITE_AT_ZERO, infinite_at_zero)
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
