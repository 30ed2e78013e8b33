"""What elementwise torch operations do to the channels that lie along their operands, and what any rule may need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from psap_core.channels import NO_LABEL, Call, Channels, Fixed, Grid, Ledger, Sum
from psap_core.inputs import tensors_in
from psap_core.layouts import of, of_avoiding

SUMS = ("add", "sub", "rsub", "subtract", "maximum", "minimum", "fmax", "fmin")
ADDS = ("add", "sub", "rsub", "subtract")
PRODUCTS = ("mul", "multiply", "div", "divide", "true_divide", "truediv")


# ---------------------------------------------------------------------------- the general rules


def unknown(ledger: Ledger, call: Call) -> None:
    """Whatever this does, the channels of all operands are needed as they are."""
    fix_all(ledger, call, f"they reach {call.where}")


def fix_all(ledger: Ledger, call: Call, reason: str) -> None:
    """The channels of all operands are needed as they are, for a reason."""
    layouts = [of(ledger, tensor) for tensor in tensors_in((call.args, call.kwargs))]
    for channels in layouts:
        ledger.fix(channels, reason)
    if any(channels is not None for channels in layouts):
        for tensor in tensors_in(call.result):
            ledger.set(tensor, Fixed(reason))


def constant(ledger: Ledger, call: Call) -> None:
    """The results hold nothing of the network's channels."""


def keep(ledger: Ledger, call: Call) -> None:
    """Channel-wise and f(0) = 0."""
    call.keeps_channels = True
    same(ledger, call, silent=True)


def keep_ids(ledger: Ledger, call: Call) -> None:
    """Channel-wise, but f(0) is not 0."""
    same(ledger, call, silent=False)


def same(ledger: Ledger, call: Call, silent: bool) -> None:
    """What lies along the results is what lies along the first operand; `silent` says whether 0 becomes 0."""
    pass_on(ledger, call, call.first, silent)


def pass_on(ledger: Ledger, call: Call, operand: Tensor, silent: bool) -> None:
    """What lies along the results is what lies along this operand."""
    channels = ledger.known(operand)
    if isinstance(channels, (Channels, Grid)) and not silent:
        channels = replace(channels, labels=torch.zeros_like(channels.labels))
    for tensor in tensors_in(call.result):
        ledger.set(tensor, channels)


def behind_the_end(tensor: Tensor, channels: Channels) -> int:
    """The channel dimension counted from the end, as broadcasting counts: -1 is the last."""
    return channels.dim - tensor.ndim


# ---------------------------------------------------------------------------- elementwise


def combine(ledger: Ledger, call: Call) -> None:
    """A sum, difference, maximum, minimum, comparison of two tensors: joined place by place."""
    operands = _tensor_operands(call)
    numbers = [value for value in call.args[:2] if isinstance(value, (int, float))]
    if call.name in ADDS and numbers == [0]:
        keep(ledger, call)
        return
    ends = not ledger.couple_sums and call.name in SUMS and len(operands) > 1
    if call.name in SUMS and len(operands) > 1:
        pairs = tuple((of(ledger, tensor), ledger.node_of(tensor)) for tensor in operands)
        ledger.sums.append(Sum(pairs))
    if ends and sum(of(ledger, tensor) is not None for tensor in operands) > 1:
        for tensor in operands:
            ledger.fix(of(ledger, tensor), f"they reach a sum ({call.where})")
        ledger.set(call.result, Fixed(f"they reach a sum ({call.where})"))
        return
    silent_together = call.name in SUMS and len(operands) > 1
    elementwise(ledger, call, operands, union if silent_together else None)


def multiply(ledger: Ledger, call: Call) -> None:
    """A product is silent where either factor is; a quotient where its numerator is."""
    operands = _tensor_operands(call)
    if len(operands) == 1:
        is_numerator = operands[0] is call.first and call.name != "rdiv"
        silent = is_numerator or call.name.startswith("mul")
        pass_on(ledger, call, operands[0], silent)
        return
    if call.name.startswith("mul"):
        operands.sort(key=_is_parameter)  # what it is multiplied with silences it first
        elementwise(ledger, call, operands, either)
    else:
        elementwise(ledger, call, operands, of_the_first)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def choose(ledger: Ledger, call: Call) -> None:
    """torch.where: silent where both choices are."""
    condition, first = call.argument(0, "condition"), call.argument(1, "input")
    if isinstance(first, Tensor) and first.dtype == torch.bool:  # Tensor.where(condition, other)
        condition, first = first, condition
    choices = [first, call.argument(2, "other")]
    if any(choice is None for choice in choices):
        unknown(ledger, call)
        return
    numbers = [choice for choice in choices if not isinstance(choice, Tensor)]
    operands = [choice for choice in choices if isinstance(choice, Tensor)]
    silent = all(number == 0 for number in numbers)
    conditions = [condition] if isinstance(condition, Tensor) else []
    elementwise(ledger, call, operands, union if silent else None, also_joined=conditions)


def fill_masked(ledger: Ledger, call: Call) -> None:
    mask, value = call.argument(1, "mask"), call.argument(2, "value")
    silent = not isinstance(value, Tensor) and value == 0
    elementwise(ledger, call, [call.first], of_the_first if silent else None, also_joined=[mask])


def raise_to(ledger: Ledger, call: Call) -> None:
    exponent = call.argument(1, "exponent")
    positive = isinstance(exponent, (int, float)) and exponent > 0
    (keep if positive and isinstance(call.first, Tensor) else unknown)(ledger, call)


def clamp(ledger: Ledger, call: Call) -> None:
    low_default, high_default = (-1.0, 1.0) if call.name == "hardtanh" else (None, None)
    names = ("min_val", "max_val") if call.name == "hardtanh" else ("min", "max")
    low = call.argument(1, names[0], low_default)
    high = call.argument(2, names[1], high_default)
    if call.name == "clamp_min":
        high = None
    if call.name == "clamp_max":
        low, high = None, low
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        unknown(ledger, call)
        return
    holds_zero = (low is None or low <= 0) and (high is None or high >= 0)
    (keep if holds_zero else keep_ids)(ledger, call)


def prelu(ledger: Ledger, call: Call) -> None:
    """The slopes lie along dimension 1, one for each channel or one for all."""
    channels, slopes = of(ledger, call.first), of(ledger, call.argument(1, "weight"))
    if isinstance(channels, Channels) and isinstance(slopes, Channels):
        if channels.dim != 1:
            unknown(ledger, call)
            return
        ledger.join(channels.ids, slopes.ids, f"they reach {call.where}")
    else:
        ledger.fix(slopes, f"they reach {call.where}")
    keep(ledger, call)


def _tensor_operands(call: Call) -> list[Tensor]:
    both = (call.argument(0, "input"), call.argument(1, "other"))
    return [operand for operand in both if isinstance(operand, Tensor)]


Labelling = Callable[[Ledger, Sequence[Tensor]], Tensor]


def elementwise(
    ledger: Ledger,
    call: Call,
    operands: Sequence[Tensor],
    labelling: Labelling | None,
    also_joined: Sequence[Tensor] = (),
) -> None:
    """Join the channels of operands that broadcast together; `labelling` says what silences the result."""
    everything = [*operands, *also_joined]
    _lay_alike(ledger, everything)
    along = {
        behind_the_end(tensor, channels)
        for tensor in everything
        if isinstance(channels := of(ledger, tensor), Channels)
    }
    if not along:
        ledger.set(call.result, first_known(ledger, everything))
        return
    if len(along) > 1:
        unknown(ledger, call)
        return
    dim = along.pop()
    size = call.result.shape[dim]
    layouts = [_spread(ledger, tensor, dim, size, call) for tensor in everything]
    present = [channels for channels in layouts if channels is not None]
    ids = max(present, key=lambda channels: bool(channels.ids.any())).ids
    for channels in present:
        ledger.join(ids, channels.ids, f"they meet a tensor of fixed size in {call.where}")
    labels = torch.zeros_like(ids)
    if labelling is not None:
        parts = layouts[: len(operands)]
        silent = [torch.zeros_like(ids) if part is None else part.labels for part in parts]
        labels = labelling(ledger, silent)
    ledger.set(call.result, Channels(ids, labels, call.result.ndim + dim))


def _lay_alike(ledger: Ledger, tensors: Sequence[Tensor]) -> None:
    """Where the channels of one operand lie along one dimension, those of a grid are to shrink along the same."""
    plain = [(tensor, ledger.known(tensor)) for tensor in tensors]
    along = {behind_the_end(t, channels) for t, channels in plain if isinstance(channels, Channels)}
    for tensor in tensors:
        others = [dim for dim in range(tensor.ndim) if dim - tensor.ndim not in along]
        of_avoiding(ledger, tensor, others if along else ())


def first_known(ledger: Ledger, tensors: Sequence[Tensor]) -> Channels | Fixed | None:
    """What is known of the first tensor of which anything is."""
    for tensor in tensors:
        channels = of(ledger, tensor)
        if channels is not None:
            return channels
    return None


def _spread(ledger: Ledger, tensor: Tensor, dim: int, size: int, call: Call) -> Channels | None:
    """The channels of an operand along dimension `dim` (from the end) of the result; None if it has one entry there."""
    channels = of(ledger, tensor)
    entries = tensor.shape[dim] if tensor.ndim >= -dim else 1
    if entries == 1 and size > 1:
        ledger.fix(channels, f"one channel meets many in {call.where}")
        return None
    if isinstance(channels, Channels):
        return channels
    if isinstance(channels, Fixed):
        return laid_out(ledger, tensor, tensor.ndim + dim)
    name = ledger.name_of(tensor)
    if name is not None and entries > 1:  # such as an embedding of positions
        return ledger.entries_of(tensor, name, tensor.ndim + dim)
    none = torch.zeros(size, dtype=torch.long)
    return Channels(none, none, tensor.ndim + dim)


def union(ledger: Ledger, labels: Sequence[Tensor]) -> Tensor:
    """Silent where all are."""
    return ledger.union(labels)


def either(ledger: Ledger, labels: Sequence[Tensor]) -> Tensor:
    """Silent where one is: by the first that can be silenced."""
    first, second = labels
    return torch.where(first != NO_LABEL, first, second)


def of_the_first(ledger: Ledger, labels: Sequence[Tensor]) -> Tensor:
    """Silent where the first is, unless the others are silent there as well: 0 / 0."""
    first, *others = labels
    for other in others:
        first = torch.where(other == NO_LABEL, first, NO_LABEL)
    return first


def laid_out(ledger: Ledger, tensor: Tensor, dim: int) -> Channels:
    """The channels of one part of a concatenation; a part that has none keeps its place."""
    channels = of(ledger, tensor)
    if isinstance(channels, Channels):
        return channels
    size = tensor.shape[dim]
    ids = torch.zeros(size, dtype=torch.long)
    if isinstance(channels, Fixed):
        ids = ledger.new_ids(1).expand(size)
        ledger.fix_ids(ids[:1], None, channels.reason)
    return Channels(ids, torch.zeros(size, dtype=torch.long), dim)
