"""The settings of PSAP: one frozen value, checked where it is made."""

import math
import numbers
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, cast

from psap_core.checks import (
    require_choice,
    require_cut,
    require_number,
    require_time,
    require_whole,
)
from psap_core.errors import InputError
from psap_core.groups import SCOPES, Scope
from psap_core.plan import Unit
from psap_core.schedule import Schedule, make_schedule
from psap_core.sparsity import Fan, Reference


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user may choose.

    Attributes:
        target_macs_cut: share of multiply-accumulates to remove, in [0, 1).
        target_filters_cut: share of filters to remove, instead of target_macs_cut.
        total_epochs: length of the training.
        scope: `coupled`: sums join channels and the exported modules are plain; `all`: as SFP and FPGM prune, sums keep
            their full width; `inner`: only channels that reach no sum.
        exclude: names of modules, or of modules that hold them, whose filters are left alone.
        kappa: threshold of eq. 1, > 0.
        sparsity_reference: `network` (eq. 1) or `layer` (the ablation's control).
        fan: what the network's initialisation used, `in` or `out`; torchvision's networks use `out`.
        alpha: how strongly the ratios follow the sparsity, >= 0; 0 is one ratio for all groups.
        protection: whether the pulse chooses what comes back; without it the norms decide.
        pulse_batches: K of eq. 5, >= 2.
        margin: filters proposed beyond those needed, as a share of a group's pruned filters, in [0, 1].
        min_filters: a group of O filters keeps at least max(min_filters, ceil(min_filter_share * O)).
        min_filter_share: see min_filters.
        round_to: groups of at least twice as many filters keep a multiple of this, or all; 8 suits tensor cores.
        start: the first pruning step, in completed epochs (int) or as a share of total_epochs (float).
        ramp_end: when the whole cut is asked for.
        freeze: the last step, after which the plan is final.
        interval: epochs between steps.

    Raises:
        InputError: a value is out of its range.
    """

    target_macs_cut: float | None = None
    target_filters_cut: float | None = None
    total_epochs: int
    scope: Scope = "coupled"
    exclude: Sequence[str] = ()
    kappa: float = 0.5
    sparsity_reference: Reference = "network"
    fan: Fan = "in"
    alpha: float = 1.0
    protection: bool = True
    pulse_batches: int = 10
    margin: float = 0.3
    min_filters: int = 2
    min_filter_share: float = 0.05
    round_to: int = 1
    start: int | float = 0.05
    ramp_end: int | float = 0.40
    freeze: int | float = 0.50
    interval: int = 1

    def __post_init__(self) -> None:
        if (self.target_macs_cut is None) == (self.target_filters_cut is None):
            raise InputError("give exactly one of target_macs_cut and target_filters_cut")
        require_cut(f"target_{self.unit}_cut", self.target_cut)
        require_number("kappa", self.kappa, 0, math.inf, "above 0", above=True, below=True)
        require_number("alpha", self.alpha, 0, math.inf, "at least 0", below=True)
        require_number("margin", self.margin, 0, 1, "a share in [0, 1]")
        require_number("min_filter_share", self.min_filter_share, 0, 1, "a share in [0, 1]")
        require_whole("total_epochs", self.total_epochs, 1)
        require_whole("interval", self.interval, 1)
        require_whole("pulse_batches", self.pulse_batches, 2)
        require_whole("min_filters", self.min_filters, 1)
        require_whole("round_to", self.round_to, 1)
        for name in ("start", "ramp_end", "freeze"):
            require_time(name, getattr(self, name))
        require_choice("sparsity_reference", self.sparsity_reference, ("network", "layer"))
        require_choice("fan", self.fan, ("in", "out"))
        require_choice("scope", self.scope, SCOPES)
        if not isinstance(self.protection, bool):
            raise InputError(f"protection must be True or False, not {self.protection!r}")
        self._make_plain()
        _ = self.schedule

    def _make_plain(self) -> None:
        """Numbers and texts of other types (numpy's) become Python's own, which every state file takes."""
        for name, value in vars(self).items():
            if isinstance(value, bool):
                continue
            if isinstance(value, numbers.Integral):
                object.__setattr__(self, name, int(value))
            elif isinstance(value, numbers.Real):
                object.__setattr__(self, name, float(value))
            elif isinstance(value, str):
                object.__setattr__(self, name, plain_text(value))
        object.__setattr__(self, "exclude", names(self.exclude))

    @property
    def unit(self) -> Unit:
        """What the target is a share of: MACs, or filters."""
        return "macs" if self.target_macs_cut is not None else "filters"

    @property
    def target_cut(self) -> float:
        """The share to remove, in the unit."""
        return cast(float, self.target_macs_cut if self.unit == "macs" else self.target_filters_cut)

    @property
    def schedule(self) -> Schedule:
        """When to prune, in completed epochs."""
        return make_schedule(
            self.total_epochs, self.start, self.ramp_end, self.freeze, self.interval
        )


def make_settings(values: Mapping[str, Any]) -> Settings:
    """The settings of these names.

    Raises:
        InputError: a name is unknown or missing, or a value is out of its range.
    """
    known = [field.name for field in fields(Settings)]
    for name in values:
        if name not in known:
            nearest = get_close_matches(name, known, n=1)
            meant = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
            raise InputError(f"there is no setting {name!r}: {meant}")
    if "total_epochs" not in values:
        raise InputError("the setting 'total_epochs' is missing: the length of the training")
    return Settings(**values)


def names(exclude: Any) -> tuple[str, ...]:
    """Names of modules as a tuple; anything else is refused."""
    if isinstance(exclude, str):
        raise InputError(f"exclude must be a list of names: [{exclude!r}]")
    if not isinstance(exclude, Collection) or not all(isinstance(name, str) for name in exclude):
        raise InputError(f"exclude must be a list of names of modules, not {exclude!r}")
    return tuple(plain_text(name) for name in exclude)


def plain_text(text: str) -> str:
    """Python's own string, of an enumeration's member or numpy's, too."""
    return str.__str__(text)
