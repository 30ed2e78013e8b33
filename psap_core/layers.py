"""The only dataflow analysis: prunable layers, the affine that silences a filter, their role and consumers.

Works on the torch.fx graph, by module type and by who reads whose channels, never by name or ordinal.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from psap_core.errors import InputError

Role = Literal["inner", "residual"]
Scope = Literal["all", "inner"]

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# Channel-wise operations that map 0 to 0: a channel whose affine is zero is still zero behind them.
ZERO_PRESERVING_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Mish, nn.Hardswish, nn.Tanh,
    nn.Identity, nn.Dropout, nn.Dropout2d,
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
ZERO_PRESERVING_NAMES = {
    "relu", "relu_", "relu6", "leaky_relu", "elu", "silu", "gelu", "mish", "hardswish", "tanh",
    "dropout", "dropout2d", "contiguous", "clone",
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
}  # fmt: skip
RESHAPES = {"flatten", "view", "reshape", "squeeze"}
SUMS = {"add", "add_", "iadd"}


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
    role: Role
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
        raise InputError(f"excluded layer {unknown[0]!r} is not a convolution of {type(model).__name__}")
    layers, refused = analyse(model, example_input)
    if refusals := {name: why for name, why in refused.items() if name not in exclude}:
        name, why = next(iter(refusals.items()))
        raise InputError(
            f"layer {name!r} cannot be pruned: {why}; exclude={sorted(refusals)} leaves such layers alone"
        )
    found = tuple(
        layer for layer in layers if layer.name not in exclude and (scope == "all" or layer.role == "inner")
    )
    if not found:
        raise InputError(
            f"{type(model).__name__} has no prunable layer in scope {scope!r}: "
            "a prunable layer is a convolution followed by a BatchNorm with an affine"
        )
    return found


def analyse(model: nn.Module, example_input: Tensor) -> tuple[list[PrunableLayer], dict[str, str]]:
    """All prunable layers of a network, and the refused ones with the reason; see `find_layers`."""
    graph = _Graph(model, example_input)
    layers: list[PrunableLayer] = []
    refused: dict[str, str] = {}
    for node in graph.nodes:
        if not graph.is_dense_convolution(node):
            continue
        members = graph.members(node)
        if graph.affine_of(members) is None:
            continue
        try:
            role, consumers = graph.role(members)
        except InputError as why:
            refused[str(node.target)] = str(why)
            continue
        if role == "residual" and graph.is_projection_shortcut(node, members[-1]):
            continue
        names = tuple(str(member.target) for member in members)
        filters = graph.convolution(node).out_channels
        layers.append(PrunableLayer(names[0], names, role, filters, consumers))
    return layers, refused


class _Tracer(fx.Tracer):
    """Keeps every convolution and BatchNorm a leaf, subclasses from outside torch.nn included."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf_types = (nn.Conv2d, nn.Linear, *BATCH_NORMS)
        return isinstance(m, leaf_types) or super().is_leaf_module(m, module_qualified_name)


class _Graph:
    """A traced network with the questions that the analysis asks of it."""

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        model = copy.deepcopy(model).eval()
        try:
            graph = _Tracer().trace(model)
            with torch.no_grad():
                ShapeProp(fx.GraphModule(model, graph)).propagate(example_input)
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"{type(model).__name__} cannot be traced by torch.fx on an input of shape "
                f"{list(example_input.shape)}: {reason}"
            ) from error
        self.nodes = list(graph.nodes)
        self.modules = dict(model.named_modules())
        targets = [node.target for node in self.nodes if node.op == "call_module"]
        self.reused = {target for target in targets if targets.count(target) > 1}

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[str(node.target)] if node.op == "call_module" else None

    def convolution(self, node: fx.Node) -> nn.Conv2d:
        module = self.module(node)
        assert isinstance(module, nn.Conv2d)
        return module

    def is_dense_convolution(self, node: fx.Node) -> bool:
        module = self.module(node)
        return isinstance(module, nn.Conv2d) and module.groups == 1 and node.target not in self.reused

    def is_depthwise(self, node: fx.Node) -> bool:
        module = self.module(node)
        return (
            isinstance(module, nn.Conv2d) and 1 < module.groups == module.in_channels == module.out_channels
        )

    def is_batch_norm(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), BATCH_NORMS)

    def is_sum(self, node: fx.Node) -> bool:
        return _called(node) in SUMS and len(node.all_input_nodes) + (node.args[0] is node.args[-1]) == 2

    def keeps_channels(self, node: fx.Node) -> bool:
        """Is this a channel-wise operation that maps 0 to 0?"""
        if isinstance(self.module(node), (*ZERO_PRESERVING_MODULES, nn.Flatten)):
            return True
        name = _called(node)
        if name in RESHAPES:
            return len(_shape(node)) == 2 and _shape(node)[0] == _shape(node.all_input_nodes[0])[0]
        if name == "mean":
            dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            return isinstance(dims, (tuple, list)) and all(d in (2, 3, -1, -2) for d in dims)
        return name in ZERO_PRESERVING_NAMES

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

    def affine_of(self, members: list[fx.Node]) -> nn.Module | None:
        norms = [self.module(member) for member in members if self.is_batch_norm(member)]
        return norms[-1] if norms else None

    def role(self, members: list[fx.Node]) -> tuple[Role, tuple[str, ...]]:
        """Role and consumers of a layer; raises InputError with the reason if its affine cannot silence it."""
        affine = self.module(members[-1])
        reused = [str(member.target) for member in members if member.target in self.reused]
        if reused:
            raise InputError(f"{reused[0]!r} is called more than once")
        if not isinstance(affine, BATCH_NORMS) or not affine.affine:
            raise InputError(f"its channels leave {members[-1].target!r} without the affine of a BatchNorm")
        consumers: list[str] = []
        problem = None
        reaches_sum = False
        pending, seen = _readers(members[-1]), set()
        while pending:
            node = pending.pop(0)
            if node in seen:
                continue
            seen.add(node)
            module = self.module(node)
            if self.is_sum(node):
                reaches_sum = True
            elif self.keeps_channels(node):
                pending += _readers(node)
            elif isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1):
                consumers.append(str(node.target))
                if node.target in self.reused:
                    problem = f"its consumer {node.target!r} is called more than once"
            else:
                problem = f"its channels pass through {str(node.target)!r}, which is not known to map 0 to 0 channel by channel"
        if reaches_sum:
            return "residual", ()
        if problem:
            raise InputError(problem)
        return "inner", tuple(consumers)

    def is_projection_shortcut(self, convolution: fx.Node, affine: fx.Node) -> bool:
        """Does a longer branch, from the same input to the same sum, run beside this convolution?"""
        source = convolution.all_input_nodes[0]
        while self.keeps_channels(source) and len(source.all_input_nodes) == 1:
            source = source.all_input_nodes[0]
        depth = self._convolutions_from(source, avoiding=convolution)
        pending, seen = [affine], set()
        while pending:
            node = pending.pop()
            for reader in _readers(node):
                if self.is_sum(reader):
                    others = [operand for operand in reader.all_input_nodes if operand is not node]
                    if any(depth.get(other, 0) >= 2 for other in others):
                        return True
                elif self.keeps_channels(reader) and reader not in seen:
                    seen.add(reader)
                    pending.append(reader)
        return False

    def _convolutions_from(self, source: fx.Node, avoiding: fx.Node) -> dict[fx.Node, int]:
        """Nodes that `source` reaches without `avoiding`, each with the most convolutions on the way."""
        depth = {source: 0}
        for node in self.nodes[self.nodes.index(source) + 1 :]:
            reached = [depth[operand] for operand in node.all_input_nodes if operand in depth]
            if reached and node is not avoiding:
                depth[node] = max(reached) + isinstance(self.module(node), nn.Conv2d)
        return depth


def _called(node: fx.Node) -> str | None:
    """Name of the function or method that a node calls."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", None) if node.op == "call_function" else None


def _shape(node: fx.Node) -> torch.Size:
    shape: torch.Size = node.meta["tensor_meta"].shape
    return shape


def _readers(node: fx.Node) -> list[fx.Node]:
    """Nodes that read a tensor's values; x.size() and x.shape read none."""
    return [user for user in node.users if user.op == "output" or "tensor_meta" in user.meta]
