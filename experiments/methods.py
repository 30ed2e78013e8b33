"""What each method name means."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.baselines.sfp import SFP
from experiments.harness.callbacks import Method, PSAPCallback, SavePlan, Unpruned
from experiments.schema import MethodConfig, ModelConfig, PSAPConfig, TargetConfig
from psap_core import PSAP, InputError

CONFIGS: dict[str, type[MethodConfig]] = {
    "dense": MethodConfig,
    "thin": TargetConfig,
    "sfp": TargetConfig,
    "psap": PSAPConfig,
}
PULSE_BATCHES = 2  # fewer have no standard error


def make_method(
    method: MethodConfig,
    model_cfg: ModelConfig,
    epochs: int,
    model: nn.Module,
    optimizer: Optimizer,
    example_input: Tensor,
    make_losses: Callable[[int], Iterable[Tensor]],
    batches: int,
    save_plan: SavePlan,
) -> Method:
    """The callback of a method; `make_losses` yields at most `batches` losses.

    Raises:
        InputError: the method's name and settings are of two methods, or they do not fit the network or the data.
    """
    if CONFIGS.get(method.name) is not type(method):
        raise InputError(
            f"method.name={method.name!r} does not name the chosen method: choose with method=<{'|'.join(CONFIGS)}>"
        )
    match method:
        case PSAPConfig():
            if method.protection and batches < PULSE_BATCHES:
                raise InputError(
                    f"method=psap needs at least {PULSE_BATCHES} training batches per epoch for its pulse, "
                    f"there is {batches}: lower optim.batch_size"
                )
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
