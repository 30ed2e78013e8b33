"""What each method name means."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.methods.base import BatchesOf, Method, SaveStep
from experiments.methods.fpgm import FPGM
from experiments.methods.one_shot import OneShot
from experiments.methods.psap import PSAPCallback
from experiments.methods.sfp import SFP
from experiments.methods.unpruned import Unpruned
from experiments.methods.variants import PSAPVariant
from experiments.schema import (
    Config,
    MethodConfig,
    PSAPConfig,
    PSAPVariantConfig,
    SFPConfig,
    TargetConfig,
    ThinPlanConfig,
    UniformConfig,
)
from psap_core import PSAP, InputError
from psap_core.supervision import LossOfBatch

CONFIGS: dict[str, type[MethodConfig]] = {
    "dense": MethodConfig,
    "thin": TargetConfig,
    "thin_plan": ThinPlanConfig,
    "l1": UniformConfig,
    "l2": UniformConfig,
    "random": UniformConfig,
    "fpgm": UniformConfig,
    "sfp": SFPConfig,
    "psap": PSAPConfig,
    "psap_variant": PSAPVariantConfig,
}
PULSE_BATCHES = 2  # fewer have no standard error


def make_method(
    cfg: Config,
    model: nn.Module,
    optimizer: Optimizer,
    example_input: Tensor,
    batches_of: BatchesOf,
    loss_of_batch: LossOfBatch,
    batches: int,
    save: SaveStep,
) -> Method:
    """The callback of a run's method.

    Args:
        batches_of: makes the batches of a pulse, at most `batches`.
        loss_of_batch: the loss of one of them, a scalar.
        save: takes every step's plan and pulse.

    Raises:
        InputError: the method's name and settings are of two methods, or they do not fit the network or the data.
    """
    method = cfg.method
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
            make: Callable[..., PSAP] = PSAP
            if isinstance(method, PSAPVariantConfig):
                make = partial(PSAPVariant, rule=method.rule, seed=cfg.seed)
            pruner = make(
                model,
                optimizer,
                example_input,
                target_macs_cut=method.target_macs_cut,
                total_epochs=cfg.epochs,
                scope=method.scope.value,
                exclude=method.exclude,
                kappa=method.kappa,
                sparsity_reference=method.sparsity_reference.value,
                fan=cfg.model.fan.value,
                alpha=method.alpha,
                protection=method.protection,
                pulse_batches=method.pulse_batches,
                margin=method.margin,
                min_filters=method.min_filters,
                min_filter_share=method.min_filter_share,
                round_to=method.round_to,
                start=method.start,
                ramp_end=method.ramp_end,
                freeze=method.freeze,
                interval=method.interval,
            )
            return PSAPCallback(pruner, batches_of, loss_of_batch, save)
        case SFPConfig():
            return SFP(
                model,
                example_input,
                method.target_macs_cut,
                method.scope.value,
                cfg.epochs,
                method.ramp_end,
                save,
            )
        case UniformConfig(name="fpgm"):
            return FPGM(
                model, optimizer, example_input, method.target_macs_cut, method.scope.value, save
            )
        case UniformConfig(name="l1" | "l2" | "random" as score):
            # A pretrained network is pruned before the first epoch, a fresh one when it has half of its training.
            prune_at = 0 if cfg.model.weights else (cfg.epochs + 1) // 2
            return OneShot(
                model,
                optimizer,
                example_input,
                method.target_macs_cut,
                method.scope.value,
                score,
                prune_at,
                cfg.seed,
                save,
            )
        case _:
            return Unpruned(model, example_input)
