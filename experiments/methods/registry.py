"""Which methods there are: each module of this folder says what its names mean."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor, nn
from torch.optim import Optimizer

from experiments import methods
from experiments.methods.base import BatchesOf, Method, SaveStep
from experiments.schema import Config, MethodConfig
from psap_core import InputError
from psap_core.supervision import LossOfBatch


@dataclass(frozen=True)
class MethodContext:
    """The training that a method prunes in, as far as a method may need it.

    Attributes:
        model: the bare network.
        example_input: one image of the data's shape.
        batches_of: makes the batches of a pulse, at most `batches`, when so many epochs are done.
        loss_of_batch: the loss of one of them, a scalar.
        save: takes every step's plan and pulse.
    """

    cfg: Config
    model: nn.Module
    optimizer: Optimizer
    example_input: Tensor
    batches_of: BatchesOf
    loss_of_batch: LossOfBatch
    batches: int
    save: SaveStep


Make = Callable[[MethodContext], Method]


@dataclass(frozen=True)
class Entry:
    """The type of a method's configuration, and what makes its callback."""

    config: type[MethodConfig]
    make: Make


_ENTRIES: dict[str, Entry] = {}


def register(config: type[MethodConfig], *names: str) -> Callable[[Make], Make]:
    """Say of a function that it makes the methods of these names, which conf/method/<name>.yaml configures."""

    def decorate(make: Make) -> Make:
        for name in names:
            if name in _ENTRIES:
                other = _ENTRIES[name].make.__module__
                raise ValueError(f"{make.__module__} and {other} both make the method {name!r}")
            _ENTRIES[name] = Entry(config, make)
        return make

    return decorate


@cache
def entries() -> dict[str, Entry]:
    """All methods, by name."""
    for module in pkgutil.iter_modules(methods.__path__):
        importlib.import_module(f"{methods.__name__}.{module.name}")
    return _ENTRIES


def make_method(context: MethodContext) -> Method:
    """The callback of a run's method.

    Raises:
        InputError: the method's name and settings are of two methods, or they do not fit the network or the data.
    """
    method = context.cfg.method
    entry = entries().get(method.name)
    if entry is None or entry.config is not type(method):
        raise InputError(
            f"method.name={method.name!r} does not name the chosen method: choose with "
            f"method=<{'|'.join(sorted(entries()))}>"
        )
    return entry.make(context)
