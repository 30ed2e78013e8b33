"""Dense and thin networks: nothing is pruned."""

from torch import Tensor, nn

from experiments.methods.base import Method
from experiments.methods.registry import MethodContext, register
from experiments.schema import MethodConfig, TargetConfig, ThinPlanConfig
from psap_core.cost import macs_cost_model
from psap_core.groups import find_groups
from psap_core.inputs import describe
from psap_core.plan import make_plan


class Unpruned(Method):
    """Prunes nothing: dense and thin networks."""

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        self.groups = find_groups(model, example_input, scope="all")
        cost = macs_cost_model(model, self.groups, example_input)
        self.plan = make_plan(self.groups, {}, cost, describe(example_input), "all")

    def compact_(self) -> None:
        """Nothing is pruned: the network is as small as its plan."""


@register(MethodConfig, "dense")
@register(TargetConfig, "thin")
@register(ThinPlanConfig, "thin_plan")
def make(context: MethodContext) -> Method:
    """A thin network was made before: `experiments.methods.thin` says how."""
    return Unpruned(context.model, context.example_input)
