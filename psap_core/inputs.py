"""What a network is called with: any nesting of tuples, lists and dictionaries of tensors, described and drawn anew."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from psap_core.checks import require_whole
from psap_core.errors import InputError

Example = Any  # a tensor, or a tuple (positional) or dictionary (by name) of what forward takes
Description = dict[str, Any]  # JSON values


def call(model: nn.Module, example: Example) -> Any:
    """The model's output for an example input."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, (tuple, list)):
        return model(*example)
    return model(example)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers, the fields of output objects included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, (tuple, list, set, frozenset)):
        for part in value:
            yield from tensors_in(part)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in(vars(value))


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nesting with every tensor changed; a list becomes a tuple."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(part, change) for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(map_tensors(part, change) for part in value)
    return value


def batch_size(example: Example) -> int:
    """Inputs in a batch: the length of the first tensor."""
    first = next(tensors_in(example), None)
    if first is None or first.ndim == 0 or not len(first):
        raise InputError(
            "example_input holds no batch: give a tensor [N, ...], or a tuple or dictionary with one"
        )
    return len(first)


def describe(example: Example) -> Description:
    """Shapes, types and ranges of an example input, as JSON values; `draw` makes inputs of them."""
    if isinstance(example, Tensor):
        dtype = str(example.dtype).removeprefix("torch.")
        content = example.detach()
        low, high = (float(content.min()), float(content.max())) if content.numel() else (0.0, 0.0)
        return {"shape": [*example.shape], "dtype": dtype, "low": low, "high": high}
    if isinstance(example, Mapping):
        return {"by_name": {str(key): describe(part) for key, part in example.items()}}
    if isinstance(example, (tuple, list)):
        return {"in_order": [describe(part) for part in example]}
    if example is None or isinstance(example, (bool, int, float, str)):
        return {"value": example}
    raise InputError(
        f"example_input holds a {type(example).__name__}: tensors, numbers, text and None are possible"
    )


def require_description(description: Any) -> None:
    """Raise InputError for what `describe` cannot have made."""
    if not isinstance(description, Mapping):
        raise InputError(f"the description of the inputs is no dictionary, but {description!r:.60}")
    for name in ("by_name", "in_order"):
        if name in description:
            parts = description[name]
            for part in parts.values() if isinstance(parts, Mapping) else parts:
                require_description(part)
            return
    if "value" not in description:
        _require_tensor(description)


def _require_tensor(description: Mapping[str, Any]) -> None:
    shape, dtype = description.get("shape"), description.get("dtype")
    if not isinstance(shape, (list, tuple)):
        raise InputError(f"the shape of an input is no list, but {shape!r:.60}")
    for size in shape:
        require_whole("a size of an input", size, 0)
    if not isinstance(dtype, str) or not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"the type of an input, {dtype!r:.60}, is none of torch's")
    for name in ("low", "high"):
        value = description.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"{name} of an input is no number, but {value!r:.60}")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise InputError(f"{name} of an input is beyond 64 bits")


def shapes_of(description: Any) -> Any:
    """A description without the ranges of the values: what does not depend on the example's content."""
    if isinstance(description, dict):
        parts = {key: part for key, part in description.items() if key not in ("low", "high")}
        return {key: shapes_of(part) for key, part in parts.items()}
    if isinstance(description, list):
        return [shapes_of(part) for part in description]
    return description


def draw(
    description: Description, generator: torch.Generator, double: bool = False, device: Any = "cpu"
) -> Example:
    """Random inputs like those that `describe` was given, with float64 in place of float types if `double`."""
    if "by_name" in description:
        parts = description["by_name"].items()
        return {name: draw(part, generator, double, device) for name, part in parts}
    if "in_order" in description:
        return tuple(draw(part, generator, double, device) for part in description["in_order"])
    if "value" in description:
        return description["value"]
    dtype = getattr(torch, description["dtype"])
    values = _values(description, dtype, generator)
    if double and dtype.is_floating_point:
        dtype = torch.float64
    return values.to(device=device, dtype=dtype)


def _values(description: Description, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """In the example's range; a constant says only its sign: zeros stand for any number."""
    shape, low, high = description["shape"], description["low"], description["high"]
    if dtype == torch.uint8 and low == high:
        low, high = 0, 255
    if not dtype.is_floating_point:
        return torch.randint(int(low), int(high) + 1, shape, generator=generator)
    if low == high == 0:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if low == high:
        low, high = sorted((0.5 * low, 1.5 * high))
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def copy_network(model: nn.Module) -> nn.Module:
    """A deep copy; an activation that a module keeps as an attribute is copied without its graph.

    Raises:
        InputError: the model cannot be copied.
    """
    tensors = (part for module in model.modules() for part in tensors_in(vars(module)))
    memo = {id(tensor): tensor.detach().clone() for tensor in tensors if tensor.grad_fn is not None}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{type(model).__name__} cannot be copied, which every check needs: {type(error).__name__}: {reason}"
        ) from error
