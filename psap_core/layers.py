"""The only dataflow analysis: prunable layers, the affine that silences a filter, their role and consumers.

Works on the torch.fx graph, by module type and by who reads whose channels, never by name or ordinal.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from psap_core.errors import InputError

Scope = Literal["all", "inner"]

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# Operations, as torch.nn, functional and method calls name them (lower case, no underscores).
# Channel-wise ones that map 0 to 0: a channel whose affine is zero is still zero behind them.
ZERO_PRESERVING = {
    "relu",
    "relu6",
    "leakyrelu",
    "elu",
    "silu",
    "gelu",
    "mish",
    "hardswish",
    "tanh",
    "identity",
    "dropout",
    "dropout2d",
    "maxpool2d",
    "avgpool2d",
    "adaptiveavgpool2d",
    "adaptivemaxpool2d",
    "contiguous",
    "clone",
}
RESHAPES = {"flatten", "view", "reshape", "squeeze"}
SUMS = {"add", "iadd"}


@dataclass(frozen=True)
class PrunableLayer:
    """A convolution whose filters can be pruned, with all that goes with a filter.

    Attributes:
        name: module path of the convolution.
        members: modules whose dimension-0 entries belong to a filter, in dataflow order: the convolution,
            its BatchNorm and, before a depthwise convolution, that convolution and its BatchNorm.
        role: `inner` if the channels reach only other convolutions or linear layers through channel-wise
            operations, `residual` if they reach a sum.
        filters: number of filters O.
        consumers: convolutions and linear layers that read the channels (empty for `residual`).
    """

    name: str
    members: tuple[str, ...]
    role: Literal["inner", "residual"]
    filters: int
    consumers: tuple[str, ...]

    @property
    def affine(self) -> str:
        """The BatchNorm whose (gamma, beta) is the last the channels pass before they are mixed."""
        return self.members[-1]


def find_layers(
    model: nn.Module, example_input: Tensor, *, scope: Scope = "all", exclude: Sequence[str] = ()
) -> tuple[PrunableLayer, ...]:
    """The prunable layers of a network, in network order. Projection shortcuts are never among them.

    Args:
        model: a network that torch.fx can trace.
        example_input: one input batch [N, C, H, W].
        scope: `all`, or `inner` for the layers whose channels never reach a sum.
        exclude: names of convolutions to leave alone.

    Raises:
        InputError: the network cannot be traced, has no prunable layer, an excluded name is no convolution
            of the network, or a layer cannot be silenced by its affine and is not excluded.
    """
    convolutions = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    if unknown := sorted(set(exclude) - convolutions):
        raise InputError(
            f"excluded layer {unknown[0]!r} is not a convolution of {type(model).__name__}"
        )
    layers, refused = analyse(model, example_input)
    if refusals := {name: why for name, why in refused.items() if name not in exclude}:
        name, why = next(iter(refusals.items()))
        raise InputError(
            f"layer {name!r} cannot be pruned: {why}; exclude={sorted(refusals)} leaves such layers alone"
        )
    found = [
        layer
        for layer in layers
        if layer.name not in exclude and (scope == "all" or layer.role == "inner")
    ]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no prunable layer (convolution, BatchNorm) in scope {scope!r}"
        )
    return tuple(found)


def analyse(model: nn.Module, example_input: Tensor) -> tuple[list[PrunableLayer], dict[str, str]]:
    """All prunable layers of a network, and the refused ones with the reason; see `find_layers`."""
    graph = _Graph(model, example_input)
    layers, refused = list[PrunableLayer](), dict[str, str]()
    for node in graph.nodes:
        members = graph.members(node) if graph.is_dense_convolution(node) else []
        if not any(graph.is_batch_norm(member) for member in members):
            continue
        names = tuple(str(member.target) for member in members)
        try:
            role, consumers = graph.role(members)
        except InputError as why:
            refused[names[0]] = str(why)
            continue
        if role == "inner" or not graph.is_projection_shortcut(node, members[-1]):
            layers.append(PrunableLayer(names[0], names, role, _shape(node)[1], consumers))
    return layers, refused


class _Tracer(fx.Tracer):
    """Keeps every convolution and BatchNorm a leaf, subclasses from outside torch.nn included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, nn.Linear, *BATCH_NORMS)) or super().is_leaf_module(
            m, module_qualified_name
        )


class _Graph:
    """A traced network with the questions that the analysis asks of it."""

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        try:
            model = copy.deepcopy(model).eval()
            graph = _Tracer().trace(model)
            with torch.no_grad():
                images = example_input[:1].expand(
                    2, *example_input.shape[1:]
                )  # a batch of one could be squeezed
                _ = model(
                    images
                ).shape  # one output; and ShapeProp would print a failure's traceback
                ShapeProp(fx.GraphModule(model, graph)).propagate(images)
        except Exception as error:
            network, reason = (
                type(model).__name__,
                (str(error).strip() or type(error).__name__).splitlines()[0],
            )
            raise InputError(
                f"{network} cannot be traced by torch.fx on {[*example_input.shape]}: {reason}"
            ) from error
        self.nodes = list(graph.nodes)
        self.modules = dict(model.named_modules())
        targets = [node.target for node in self.nodes if node.op == "call_module"]
        self.reused = {target for target in targets if targets.count(target) > 1}

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def operation(self, node: fx.Node) -> str:
        target = type(self.module(node)) if node.op == "call_module" else node.target
        return str(getattr(target, "__name__", target)).lower().replace("_", "")

    def is_dense_convolution(self, node: fx.Node) -> bool:
        module = self.module(node)
        return (
            isinstance(module, nn.Conv2d) and module.groups == 1 and node.target not in self.reused
        )

    def is_linear(self, node: fx.Node, tensor: fx.Node) -> bool:
        """Does a linear layer read channels, each as one column or several?"""
        return (
            isinstance(self.module(node), nn.Linear)
            and len(_shape(tensor)) == 2
            and node.target not in self.reused
        )

    def is_depthwise(self, node: fx.Node) -> bool:
        module = self.module(node)
        return (
            isinstance(module, nn.Conv2d)
            and 1 < module.groups == module.in_channels == module.out_channels
        )

    def is_plain(self, node: fx.Node) -> bool:
        """Is its weight a parameter and, of a BatchNorm, the forward torch's or ours?"""
        module = self.modules[str(node.target)]
        foreign = not type(module).forward.__module__.startswith(("torch.", "psap_core."))
        return "weight" in module._parameters and not (foreign and isinstance(module, BATCH_NORMS))

    def is_batch_norm(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), BATCH_NORMS)

    def is_sum(self, node: fx.Node) -> bool:
        return (
            self.operation(node) in SUMS
            and [*map(type, (*node.args, *node.kwargs.values()))].count(fx.Node) == 2
        )

    def keeps_channels(self, node: fx.Node) -> bool:
        """Is this a channel-wise operation that maps 0 to 0?"""
        operation = self.operation(node)
        if operation in RESHAPES:
            return len(_shape(node)) == 2 and _shape(node)[0] == _shape(node.all_input_nodes[0])[0]
        if operation == "mean":
            dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            rank = len(_shape(node.all_input_nodes[0]))
            return all(d % rank >= 2 for d in ([dims] if isinstance(dims, int) else dims))
        return operation in ZERO_PRESERVING

    def members(self, convolution: fx.Node) -> list[fx.Node]:
        """The convolution, then every BatchNorm and depthwise convolution up to the first fork or mixing."""
        members, node = [convolution], convolution
        while len(readers := _readers(node)) == 1:
            node = readers[0]
            if self.is_batch_norm(node) or self.is_depthwise(node):
                members.append(node)
            elif not self.keeps_channels(node):
                break
        return members

    def reads_of(self, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """Every (tensor, reader) at which the channels of `node` are read, through channel-wise operations."""
        pending = [node]
        for tensor in pending:
            for reader in _readers(tensor):
                yield tensor, reader
                if self.keeps_channels(reader) and reader not in pending:
                    pending.append(reader)

    def role(self, members: list[fx.Node]) -> tuple[Literal["inner", "residual"], tuple[str, ...]]:
        """Role and consumers of a layer; raises InputError with the reason if its affine cannot silence it."""
        if not all(map(self.is_plain, members)) or not getattr(
            self.module(members[-1]), "affine", False
        ):
            raise InputError(
                f"its weight is computed, or {members[-1].target!r} is no plain BatchNorm with an affine"
            )
        if self.reused.intersection(member.target for member in members):
            raise InputError("its BatchNorm is called more than once")
        ends = [
            (tensor, end)
            for tensor, end in self.reads_of(members[-1])
            if not self.keeps_channels(end)
        ]
        for tensor, end in ends:
            if not (
                self.is_sum(end) or self.is_dense_convolution(end) or self.is_linear(end, tensor)
            ):
                raise InputError(
                    f"its channels reach {str(end.target)!r}, which is not known to map 0 to 0 by channel"
                )
        if any(self.is_sum(end) for _, end in ends):
            return "residual", ()
        if computed := [end.target for _, end in ends if not self.is_plain(end)]:
            raise InputError(f"its channels reach {computed[0]!r}, which computes its weight")
        return "inner", tuple(str(end.target) for _, end in ends)

    def is_projection_shortcut(self, convolution: fx.Node, affine: fx.Node) -> bool:
        """Does a longer branch, from the same input to the same sum, run beside this convolution?"""
        source = convolution.all_input_nodes[0]
        while self.keeps_channels(source) and len(source.all_input_nodes) == 1:
            source = source.all_input_nodes[0]
        depth = self._convolutions_from(source, avoiding=convolution)
        return any(
            depth.get(operand, 0) >= 2
            for tensor, reader in self.reads_of(affine)
            if self.is_sum(reader)
            for operand in reader.all_input_nodes
            if operand is not tensor
        )

    def _convolutions_from(self, source: fx.Node, avoiding: fx.Node) -> dict[fx.Node, int]:
        """Nodes that `source` reaches without `avoiding`, each with the most convolutions on the way."""
        depth = {source: 0}
        for node in self.nodes[self.nodes.index(source) + 1 :]:
            reached = [depth[operand] for operand in node.all_input_nodes if operand in depth]
            if reached and node is not avoiding:
                depth[node] = max(reached) + isinstance(self.module(node), nn.Conv2d)
        return depth


def _shape(node: fx.Node) -> Any:
    return node.meta["tensor_meta"].shape


def _readers(node: fx.Node) -> list[fx.Node]:
    """Nodes that read a tensor's values; x.size() and x.shape read none."""
    return [user for user in node.users if user.op == "output" or "tensor_meta" in user.meta]
