"""The dataflow analysis: every channel carries an id through one real run of the network.

The network runs once on its example input while a `TorchFunctionMode` sees every torch call with its real arguments.
Control flow, containers of inputs and outputs, in-place operations and shared modules need no special care, because the
network simply runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from psap_core.channels import Call, Ledger, Node, Read, Slot, SlotKey, Sum
from psap_core.elementwise import keep, unknown
from psap_core.errors import InputError
from psap_core.inputs import Example, call, copy_network, map_tensors, tensors_in
from psap_core.layouts import keep_values, of, sizes_of
from psap_core.operations import RULES
from psap_core.sizes import Size, sizes_in, track_attributes_

# Calls whose rules ask which channels a size counts; in any other one a size must stay what it is.
SHAPED_BY_SIZES = ("view", "reshape", "unflatten", "expand", "split", "split_with_sizes", "narrow")
WITHOUT_RESULT = ("array", "numpy", "setitem", "tolist")  # that a rule follows all the same


@dataclass
class ChannelTrace:
    """What one run said about a network's channels.

    Attributes:
        tensors: names of the network's parameters and buffers.
        slots: by tensor name and dimension.
        reads: in the order of the calls.
        silencers: what a label stands for: slots of parameters.
        component: int64 [ids]; ids that live and die together have the same.
        convolutions: name of the weight to (node of the input, node of the output), for plain convolutions.
        sums: the sums of two tensors.
        computed: names of the modules whose weight is computed.
        nodes: for every call the nodes it reads, and what it is.
    """

    tensors: frozenset[str]
    slots: dict[SlotKey, Slot]
    reads: list[Read]
    silencers: list[frozenset[SlotKey]]
    component: Tensor
    convolutions: dict[str, tuple[int, int]]
    sums: list[Sum]
    computed: set[str]
    nodes: list[Node]


class Tracer(TorchFunctionMode):
    """Carries channels through the calls of a run; see the module's description.

    Args:
        model: the network that runs.
        couple_sums: whether a sum joins the channels of its operands; otherwise it ends them.
        zero_preserving: operations and module classes of the user's that keep channels and map 0 to 0.
        track_sizes: whether the sizes of tensors say which channels they count.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        couple_sums: bool,
        zero_preserving: Collection[Any] = (),
        track_sizes: bool = True,
    ) -> None:
        super().__init__()
        self.ledger = Ledger(model, couple_sums=couple_sums)
        self.track_sizes = track_sizes
        self.zero_preserving = [*zero_preserving]
        self.convolutions: dict[str, tuple[int, int]] = {}
        self._modules: list[tuple[str, nn.Module]] = [("", model)]
        self._paused = 0

    def run(self, model: nn.Module, example: Example) -> None:
        """Follow one forward pass; what the model returns is fixed."""
        for tensor in tensors_in(example):
            self.ledger.add_node([tensor])
        with torch.no_grad(), self._watching(model), self:
            output = call(model, example)
        tensors = [*tensors_in(output)]
        if not tensors:
            kind = type(output).__name__
            raise InputError(
                f"the model returns a {kind} in which no tensor is found: return tensors, containers of them or "
                "a dataclass"
            )
        for tensor in tensors:
            self.ledger.fix(of(self.ledger, tensor), "the model returns them")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._paused:
            self._see_sizes(operation_name(func), args, kwargs)
            self._follow(func, args, kwargs, result)
        if self.track_sizes and isinstance(result, (torch.Size, int)):
            return self._tracked(operation_name(func), args, kwargs, result)
        return result

    def _see_sizes(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A size that is a factor, a width, a stride or a number in a tensor cannot follow channels."""
        if name in SHAPED_BY_SIZES:
            return
        if name.startswith("conv"):
            args, kwargs = args[:6], {k: v for k, v in kwargs.items() if k != "groups"}
        if name == "group_norm":
            args, kwargs = args[:1], {k: v for k, v in kwargs.items() if k != "num_groups"}
        for size in sizes_in((args, kwargs)):
            size.becomes_value()

    def _tracked(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> Any:
        """A tensor's shape that says which channels it counts."""
        if name not in ("shape", "size"):
            return result
        sizes = sizes_of(self.ledger, args[0])
        if isinstance(result, torch.Size):
            return torch.Size(sizes)
        dim = args[1] if len(args) > 1 else kwargs["dim"]
        return sizes[dim]

    def _follow(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        name = operation_name(func)
        results = [*tensors_in(result)]
        if not results and name not in WITHOUT_RESULT:
            return
        operands = [*tensors_in((args, kwargs))]
        nodes = [self.ledger.node_of(tensor) for tensor in operands]
        parents = tuple(node for node in nodes if node is not None)
        if not parents and not any(self._is_known(tensor) for tensor in operands):
            return
        this = self._call(func, args, kwargs, result)
        self.ledger.used.clear()
        self._apply_rule(func, this)
        if any(tensor is not operands[0] for tensor in results):
            self._keep_other_parameters(operands)
        if not parents:
            return
        is_convolution = name.startswith("conv")
        node = self.ledger.add_node(results, parents, is_convolution, this.keeps_channels)
        if is_convolution:
            self._remember_convolution(this, parents[0], node)

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Call:
        name = operation_name(func)
        owner_name, owner = self._modules[-1]
        where = f"{name} in {owner_name}" if owner_name else name
        order = len(self.ledger.nodes)
        method = method_name(func)
        return Call(name, args, kwargs, result, where, order, owner, owner_name, method)

    def _is_known(self, tensor: Tensor) -> bool:
        is_own = self.ledger.name_of(tensor) is not None
        return is_own or self.ledger.said_of(tensor) is not None

    def _apply_rule(self, func: Any, this: Call) -> None:
        if func in self.zero_preserving:
            keep(self.ledger, this)
        else:
            rule = RULES.get(this.name, unknown)
            rule(self.ledger, this)

    def _keep_other_parameters(self, operands: Sequence[Tensor]) -> None:
        """A weight that is used in a way that no rule knows, such as a tied one's transpose, stays what it is."""
        for operand in operands:
            name = self.ledger.name_of(operand)
            is_used = name in self.ledger.used or self.ledger.said_of(operand) is not None
            if name is not None and not is_used:
                self.ledger.keep_tensor(name)

    def _remember_convolution(self, this: Call, source: int, node: int) -> None:
        name = self.ledger.name_of(this.argument(1, "weight"))
        if name is not None and (name, 0) in self.ledger.slots:
            self.convolutions[name] = (source, node)

    @contextmanager
    def _watching(self, model: nn.Module) -> Iterator[None]:
        """Know which module is running, and leave the inside of the user's zero-preserving classes alone."""
        kinds = tuple(kind for kind in self.zero_preserving if isinstance(kind, type))
        handles = []
        for name, module in model.named_modules():
            enter, leave = self._hooks(name, isinstance(module, kinds))
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._modules = self._modules[:1]
            self._paused = 0

    def _hooks(self, name: str, is_unit: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._modules.append((name, module))
            self._paused += is_unit

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._modules.pop()
            self._paused -= is_unit
            if is_unit and not self._paused:
                for tensor in tensors_in(output):
                    self.ledger.set(tensor, of(self.ledger, args[0]))

        return enter, leave

    def finish(self) -> ChannelTrace:
        """What all runs said together."""
        keep_values(self.ledger)
        return ChannelTrace(
            frozenset(self.ledger.tensors),
            self.ledger.slots,
            self.ledger.reads,
            self.ledger.silencers,
            self.ledger.components(),
            self.convolutions,
            self.ledger.sums,
            self.ledger.computed,
            self.ledger.nodes,
        )


def trace_channels(
    model: nn.Module, example: Example, *, couple_sums: bool, zero_preserving: Collection[Any] = ()
) -> ChannelTrace:
    """Run a copy of the network, in evaluation mode and, where it accepts that, in training mode.

    Args:
        model: any network that runs; it is left as it is.
        example: an input batch: a tensor, or a tuple or dictionary of what forward takes.
        couple_sums: whether a sum joins the channels of its operands (scope `coupled`) or ends them.
        zero_preserving: torch operations and module classes that keep channels and map 0 to 0.

    Raises:
        InputError: the network cannot be copied or does not run on the example.
    """
    _check_zero_preserving(zero_preserving)
    _check_modules(model)
    for track_sizes in (True, False):
        network = copy_network(model).eval()
        attributes: list[Size] = []
        if track_sizes:
            attributes = track_attributes_(network)
        tracer = Tracer(
            network,
            couple_sums=couple_sums,
            zero_preserving=zero_preserving,
            track_sizes=track_sizes,
        )
        tracer.ledger.sizes += attributes
        try:
            tracer.run(network, example)
        except InputError:
            raise
        except Exception as error:
            if track_sizes:  # compiled code may refuse a number that is more than a number
                continue
            raise InputError(
                f"{type(model).__name__} does not run on example_input ({_shapes(example)}): {_reason(error)}"
            ) from error
        break
    _run_in_training_mode(tracer, network, example)
    return tracer.finish()


def _run_in_training_mode(tracer: Tracer, network: nn.Module, example: Example) -> None:
    """Heads that exist in training only; BatchNorm needs more than one value, so two inputs are tried first."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.eval()  # it waits for the other processes
    with torch.random.fork_rng(devices=[]):
        for batch in (map_tensors(example, _twice), example):
            convolutions = dict(tracer.convolutions)
            try:
                tracer.run(network, batch)
            except Exception:  # what runs in evaluation only is analysed in evaluation only
                tracer.convolutions = convolutions
                continue
            return


def _twice(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.ndim else tensor


def method_name(func: Any) -> str:
    """The tensor's method or property that does the same, not in place."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":
        name = str(func.__self__.__name__)
    return name if name.endswith("__") else name.rstrip("_")


def operation_name(func: Any) -> str:
    """`add` for torch.add, Tensor.add_, Tensor.__iadd__ and Tensor.__radd__; of a property its own name."""
    name = method_name(func)
    in_place = name.startswith("__i") and name not in ("__invert__", "__index__", "__int__")
    name = name.strip("_").lower()
    return name[1:] if in_place else name


def _check_zero_preserving(operations: Collection[Any]) -> None:
    if isinstance(operations, str) or not isinstance(operations, Collection):
        raise InputError(f"zero_preserving must be a list of operations, not {operations!r}")
    for operation in operations:
        if isinstance(operation, nn.Module) or not callable(operation):
            raise InputError(
                f"zero_preserving takes torch operations and module classes, not {operation!r}"
            )
        module = str(getattr(operation, "__module__", ""))
        plain = type(operation).__name__ == "function" and not hasattr(operation, "__wrapped__")
        if plain and not module.startswith("torch"):
            raise InputError(
                f"zero_preserving: calls of {operation.__name__} cannot be seen: "
                "decorate it with torch.overrides.wrap_torch_function, or give a module class"
            )


def _check_modules(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{name or 'the model'} is a ScriptModule, whose inside cannot be seen: give the module it was made of"
            )
        own = [*module._parameters.values(), *module._buffers.values()]
        if any(is_lazy(tensor) for tensor in own):
            raise InputError(f"{name or 'the model'} has no weights yet: run the model once first")


def _shapes(example: Example) -> str:
    return ", ".join(str([*tensor.shape]) for tensor in tensors_in(example)) or "no tensor"


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
