"""Soft Filter Pruning (He et al., IJCAI 2018), as its official code does it.

At the end of every epoch the filters of lowest L2 norm, the same share of every layer, have their convolution
weights set to zero. Gradients are not masked and momentum is kept, so filters may come back. BatchNorm's beta is left
alone: a "pruned" channel is a constant. The exported network keeps the constants of filters that are scattered into a
residual sum and drops all others, as the official small networks do; the accuracies they publish are of the masked
network (`masked_top1`).

Different here: the official code also prunes before the first epoch, and takes the best epoch's accuracy. With a
ramp it is Asymptotic SFP (He et al., IEEE Trans. Cybernetics 2019), whose cut grows; there along an exponential through
three points, here along PSAP's ramp, so that both are given the same budgets.
"""

from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.methods.base import Metrics, SaveStep
from experiments.methods.registry import MethodContext, register
from experiments.methods.uniform import UniformMethod
from experiments.schema import SFPConfig
from psap_core.groups import Scope
from psap_core.schedule import make_schedule
from psap_core.scoring import filter_norms


class SFP(UniformMethod):
    """See the module's description.

    Args:
        ramp_end: when the whole cut is reached, in epochs (int) or as a share of them (float).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_input: Tensor,
        target_macs_cut: float,
        scope: Scope,
        epochs: int,
        ramp_end: int | float,
        save: SaveStep,
    ) -> None:
        super().__init__(model, optimizer, example_input, target_macs_cut, scope, save)
        self.schedule = make_schedule(epochs, 1, ramp_end, epochs)

    def scores(self, rows: Tensor) -> Tensor:
        return filter_norms(rows)

    def end_epoch(self, epochs_done: int) -> Metrics:
        return self.zero_and_adopt(epochs_done, self.target_cut * self.schedule.ramp(epochs_done))


@register(SFPConfig, "sfp")
def make(context: MethodContext) -> SFP:
    method = context.cfg.method
    assert isinstance(method, SFPConfig)
    return SFP(
        context.model,
        context.optimizer,
        context.example_input,
        method.target_macs_cut,
        method.scope.value,
        context.cfg.epochs,
        method.ramp_end,
        context.save,
    )
