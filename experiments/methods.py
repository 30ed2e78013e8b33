"""What each method name means."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.baselines.sfp import SFP
from experiments.harness.callbacks import Method, PSAPCallback, SavePlan, Unpruned
from experiments.schema import MethodConfig, ModelConfig, PSAPConfig, TargetConfig
from psap_core import PSAP


def make_method(
    method: MethodConfig,
    model_cfg: ModelConfig,
    epochs: int,
    model: nn.Module,
    optimizer: Optimizer,
    example_input: Tensor,
    make_losses: Callable[[int], Iterable[Tensor]],
    save_plan: SavePlan,
) -> Method:
    """The callback of a method. Raises InputError where its settings do not fit the network."""
    match method:
        case PSAPConfig():
            pruner = PSAP(
                model,
                optimizer,
                example_input,
                target_macs_cut=method.target_macs_cut,
                total_epochs=epochs,
                scope=method.scope.value,
                exclude=method.exclude,
                kappa=method.kappa,
                sparsity_reference=method.sparsity_reference.value,
                fan=model_cfg.fan.value,
                alpha=method.alpha,
                protection=method.protection,
                pulse_batches=method.pulse_batches,
                margin=method.margin,
                min_filters=method.min_filters,
                min_filter_share=method.min_filter_share,
                start=method.start,
                ramp_end=method.ramp_end,
                freeze=method.freeze,
                interval=method.interval,
            )
            return PSAPCallback(pruner, make_losses, save_plan)
        case TargetConfig(name="sfp"):
            return SFP(model, example_input, method.target_macs_cut, save_plan)
        case _:
            return Unpruned(model, example_input)
