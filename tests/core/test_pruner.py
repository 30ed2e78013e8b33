"""PSAP as a whole: budgets, floors, resumption, freezing, switches, and what it refuses."""

import copy
import dataclasses
import enum
import functools
import io
import math
import warnings

import numpy as np
import pytest
import torch
from _pytest.mark import ParameterSet
from torch import nn

from psap_core.allocation import filter_floors
from psap_core.cost import macs
from psap_core.errors import InputError
from psap_core.exported import export
from psap_core.groups import Scope
from psap_core.plan import PrunePlan
from psap_core.pruner import PSAP, report
from psap_core.settings import Settings
from psap_core.suspension import filter_tensors
from tests.core.networks import (
    KINDS,
    SCOPES,
    SMALL_FILTERS,
    SMALL_NETWORKS,
    SMALL_NETWORKS_AND_SCOPES,
    Small,
    loss_on,
    sgd,
    small_example,
    train_,
)
from tests.core.test_suspension import OPTIMIZERS, entries_of, everything, same

EPOCHS = 8
SCHEDULE = {"total_epochs": EPOCHS, "start": 1, "ramp_end": 4, "freeze": 5}
# Early training moves ratios and utilities a lot: what a step does is then easy to see.
DEFAULTS = {"target_macs_cut": 0.5, "min_filters": 1, "pulse_batches": 3, **SCHEDULE}


class Word(enum.StrEnum):
    coupled = "coupled"


class Run:
    """A few batches an epoch on a small network, with a PSAP; every batch is a function of its position."""

    def __init__(self, make_optimizer=sgd, network: str = "small", **settings) -> None:
        torch.manual_seed(0)
        self.model = SMALL_NETWORKS[network]()
        self.optimizer = make_optimizer(self.model)
        self.pruner = PSAP(self.model, self.optimizer, small_example(), **(DEFAULTS | settings))
        self.steps = []

    def loss(self, seed: int) -> torch.Tensor:
        return loss_on(self.model, side=8, seed=seed)

    def epoch(self, after_step=lambda: None) -> None:
        done = self.pruner.epochs_done
        for batch in range(2):
            self.optimizer.zero_grad()
            self.loss(100 * done + batch).backward()
            self.optimizer.step()
            after_step()
        seeds = [100 * done + 50 + k for k in range(10)]
        self.steps.append(self.pruner.end_epoch(seeds, self.loss))

    def to_the_end(self) -> "Run":
        while self.pruner.epochs_done < EPOCHS:
            self.epoch()
        return self

    def plans(self) -> list[str | None]:
        return [step and step.plan.digest for step in self.steps]

    def tensors(self):
        """(what a group owns, its pruned filters) for every group."""
        for group, part in self.pruner.plan.match(self.pruner.groups):
            yield filter_tensors(self.model, group, self.optimizer), list(part.pruned)

    def live_silencers(self) -> list[str]:
        """Names of silencers in which a pruned filter is not zero."""
        return [
            name
            for tensors, pruned in self.tensors()
            for name in tensors.silencers
            if tensors.parameters[name].take(tensors.index(pruned)).any()
        ]


@functools.cache
def whole_run(**settings) -> Run:
    return Run(**settings).to_the_end()


@functools.cache
def a_large_cut(network: str, scope: Scope) -> float:
    """Seven tenths of what the minimum filters allow."""
    found = report(SMALL_NETWORKS[network](), small_example(), scope=scope)
    return round(0.7 * found.largest_macs_cut, 3)


def check_plan(run: Run, plan: PrunePlan, round_to: int = 1) -> None:
    """It costs at most what was asked for, no further filter fits, and no group is below its minimum."""
    budget = (1 - plan.target_cut) * plan.dense_macs
    assert plan.macs <= budget
    kept = [part.kept for part in plan.layers]
    floors = filter_floors([part.filters for part in plan.layers], 1, round_to=round_to)
    for l, (part, floor) in enumerate(zip(plan.layers, floors, strict=True)):
        assert part.kept >= floor
        step = round_to if part.filters >= 2 * round_to else 1
        assert part.kept % step == 0 or part.kept == part.filters
        more = min(step, part.filters - part.kept)
        one_more = [k + more * (m == l) for m, k in enumerate(kept)]
        assert not more or run.pruner.macs_cost.cost(one_more) > budget


@pytest.mark.parametrize(
    ("network", "scope", "round_to"),
    [
        *((network, scope, 1) for network, scope in SMALL_NETWORKS_AND_SCOPES),
        ("small", "coupled", 2),
        ("stream", "coupled", 2),
    ],
)
def test_every_plan_meets_its_budget_and_silencers_stay_zero(
    network: str, scope: Scope, round_to: int
) -> None:
    """No further filter fits; what silences pruned filters is zero after every optimiser step."""
    target = a_large_cut(network, scope)
    run = Run(network=network, scope=scope, target_macs_cut=target, round_to=round_to)

    def check() -> None:
        assert not run.live_silencers()

    while run.pruner.epochs_done < EPOCHS:
        run.epoch(after_step=check)
        check()
    assert [step is not None for step in run.steps] == [True] * 5 + [False] * 3
    cuts = [step.plan.target_cut for step in run.steps[:5]]
    shares = [1 - (1 - x) ** 3 for x in (0.25, 0.5, 0.75, 1.0, 1.0)]
    assert cuts == pytest.approx([target * share for share in shares])
    for step in run.steps[:5]:
        check_plan(run, step.plan, round_to)
    assert run.pruner.plan.scope == scope
    small = export(run.model, run.pruner.plan)
    assert macs(small, small_example()) == run.pruner.plan.macs


@pytest.mark.parametrize("scope", SCOPES)
def test_a_budget_in_filters(scope: Scope) -> None:
    run = Run(target_macs_cut=None, target_filters_cut=0.4, scope=scope).to_the_end()
    plan = run.pruner.plan
    assert plan.unit == "filters"
    filters = sum(SMALL_FILTERS[scope].values())
    assert sum(part.kept for part in plan.layers) == math.floor(0.6 * filters)
    assert plan.target_cut == 0.4


def test_the_step_at_freeze_is_always_taken() -> None:
    run = Run(start=1, ramp_end=4, freeze=6, interval=3).to_the_end()
    assert [epoch for epoch, step in enumerate(run.steps, 1) if step] == [1, 4, 6]


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        *((name, "coupled") for name in OPTIMIZERS if name != "adamw"),
        ("sgd_nesterov", "all"),
        ("adamw", "inner"),
    ],
)
def test_after_the_freeze_the_plan_stands_and_frozen_weights_stay_zero(
    name: str, scope: Scope
) -> None:
    run = Run(OPTIMIZERS[name], scope=scope, target_macs_cut=0.4)
    while run.pruner.epochs_done < run.pruner.schedule.freeze:
        run.epoch()
    plan = run.pruner.plan
    assert not any(snapshot.rows for snapshot in run.pruner._snapshots.values())
    run.to_the_end()
    assert run.pruner.plan is plan
    for tensors, pruned in run.tensors():
        assert tensors.parameters.keys() <= dict(run.model.named_parameters()).keys()
        for member, rows in tensors.parameters.items():
            assert not rows.take(tensors.index(pruned)).any(), member
    small = export(run.model, plan)
    batch = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(small.eval()(batch), run.model.eval()(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("network", "scope"), SMALL_NETWORKS_AND_SCOPES)
def test_restored_filters_come_back_exactly(network: str, scope: Scope) -> None:
    """Filters proposed and restored in the same step are untouched by it, optimiser state included."""
    target = a_large_cut(network, scope)
    run = Run(network=network, scope=scope, target_macs_cut=target, margin=1.0, start=2)
    run.epoch()
    owned = {
        group.name: filter_tensors(run.model, group, run.optimizer) for group in run.pruner.groups
    }
    before = copy.deepcopy(owned)
    step = run.pruner._step(owned, 2, range(3), run.loss)
    assert sum(map(len, step.restored.values())) >= 1
    for name, filters in step.restored.items():
        assert owned[name].state
        assert same(entries_of(before[name], filters), entries_of(owned[name], filters))


@pytest.mark.parametrize("scope", SCOPES)
def test_same_seed_same_plans(scope: Scope) -> None:
    again = Run(scope=scope, target_macs_cut=0.4).to_the_end()
    assert again.plans() == whole_run(scope=scope, target_macs_cut=0.4).plans()


def check_resumption(stop: int, **settings) -> None:
    whole = whole_run(**settings)
    first = Run(**settings)
    for _ in range(stop):
        first.epoch()
    file = io.BytesIO()
    torch.save(
        [first.model.state_dict(), first.optimizer.state_dict(), first.pruner.state_dict()], file
    )
    file.seek(0)
    model, optimizer, pruner = torch.load(file, weights_only=True)
    second = Run(**settings)
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    second.pruner.load_state_dict(pruner)
    second.to_the_end()
    assert first.plans() + second.plans() == whole.plans()
    assert same(
        everything(second.model, second.optimizer), everything(whole.model, whole.optimizer)
    )


def stops_and_scopes() -> list[ParameterSet]:
    """Every stop in every scope; most only in the long tests."""
    quick = {("coupled", 2), ("coupled", 4), ("coupled", 6), ("all", 2), ("inner", 6)}
    return [
        pytest.param(stop, scope, marks=() if (scope, stop) in quick else pytest.mark.long)
        for scope in SCOPES
        for stop in range(1, EPOCHS)
    ]


@pytest.mark.parametrize(("stop", "scope"), stops_and_scopes())
def test_stop_and_resume_anywhere_makes_the_same_plans_and_weights(stop: int, scope: Scope) -> None:
    check_resumption(stop, scope=scope, target_macs_cut=0.4)


@pytest.mark.parametrize("network", ["stream", "no_norm"])
def test_stop_and_resume_whatever_silences(network: str) -> None:
    target = a_large_cut(network, "coupled")
    adamw = OPTIMIZERS["adamw"]
    check_resumption(
        3, make_optimizer=adamw, network=network, scope="coupled", target_macs_cut=target
    )


@pytest.mark.parametrize(
    "switch",
    [
        {"alpha": 0.0},
        {"alpha": 3.0},
        {"kappa": 1.0},
        {"sparsity_reference": "layer"},
        {"protection": False},
        {"margin": 1.0},
        {"pulse_batches": 7},
        {"scope": "all"},
        {"freeze": 7},
        {"target_macs_cut": None, "target_filters_cut": 0.5},
        *(
            pytest.param(switch, marks=pytest.mark.long)
            for switch in (
                {"fan": "out"},
                {"interval": 2},
                {"scope": "inner"},
                {"round_to": 3},
                {"exclude": ["expand"]},
                {"min_filters": 4},
                {"min_filter_share": 0.5},
                {"ramp_end": 2},
                {"start": 2},
                {"target_macs_cut": 0.4},
            )
        ),
    ],
    ids=lambda switch: "-".join(f"{k}={v}" for k, v in switch.items()),
)
def test_every_switch_changes_the_plans(switch) -> None:
    assert Run(**switch).to_the_end().plans() != whole_run().plans()


def test_without_protection_nothing_is_called_and_no_batch_is_made() -> None:
    run = Run(protection=False)
    train_(run.model, run.optimizer, 8, 2)

    def batches():
        yield pytest.fail("a batch was made")

    step = run.pruner.end_epoch(batches(), lambda _: pytest.fail("called"))
    assert not step.utility
    assert not any(step.restored.values())
    assert step.plan.macs_cut > 0.2


def test_between_the_steps_nothing_is_called_and_no_batch_is_made() -> None:
    run = Run(start=3)

    def batches():
        yield pytest.fail("a batch was made")

    assert run.pruner.end_epoch(batches(), lambda _: pytest.fail("called")) is None


@pytest.mark.parametrize(("network", "scope"), SMALL_NETWORKS_AND_SCOPES)
def test_a_failed_step_leaves_everything_as_it_was(network: str, scope: Scope) -> None:
    """What it suspended anew is back; what was suspended before contributes nothing, as before."""
    run = Run(network=network, scope=scope, target_macs_cut=a_large_cut(network, scope))
    run.epoch()
    run.epoch()
    before, plan = everything(run.model, run.optimizer), run.pruner.plan
    with pytest.raises(InputError, match="at least 2 batches"):
        run.pruner.end_epoch([], run.loss)
    assert run.pruner.plan is plan
    assert run.pruner.epochs_done == 2
    suspended = {
        name
        for group, part in plan.match(run.pruner.groups)
        if part.pruned
        for name in group.modules
    }
    for key, now in everything(run.model, run.optimizer).items():
        if key.removeprefix("model.").rpartition(".")[0] not in suspended:
            assert torch.equal(before[key], now), key
    batch = torch.randn(4, 3, 8, 8)
    twin = copy.deepcopy(run.model)
    twin.load_state_dict(
        {key.removeprefix("model."): t for key, t in before.items() if key.startswith("model.")}
    )
    assert torch.equal(twin.train()(batch), run.model.train()(batch))
    run.epoch()
    assert run.steps[-1].epochs_done == 3


@pytest.mark.parametrize("scope", SCOPES)
def test_it_works_under_autocast(scope: Scope) -> None:
    run = Run(scope=scope, target_macs_cut=0.4)
    for _ in range(EPOCHS):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run.optimizer.zero_grad()
            loss = loss_on(run.model, side=8)
            loss.backward()
            run.optimizer.step()
            run.pruner.end_epoch(range(4), run.loss)
    assert run.pruner.plan.macs_cut >= 0.4
    export(run.model, run.pruner.plan)


@pytest.mark.parametrize("epochs", [0, 3])
def test_an_export_before_the_freeze_is_warned_of(epochs: int) -> None:
    run = Run()
    for _ in range(epochs):
        run.epoch()
    with pytest.warns(UserWarning, match=f"end_epoch was called {epochs} times, and has to be 5"):
        export(run.model, run.pruner.plan)
    run.to_the_end()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export(run.model, run.pruner.plan)


def test_end_epoch_after_every_batch_is_warned_of_once() -> None:
    run = Run().to_the_end()
    with pytest.warns(UserWarning, match=f"more than total_epochs={EPOCHS} times"):
        run.epoch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.epoch()


def test_a_step_is_printed_on_one_line() -> None:
    run = Run()
    while not any(run.steps):
        run.epoch()
    step = run.steps[-1]
    pruned = sum(len(filters) for filters in step.plan.pruned.values())
    restored = sum(len(filters) for filters in step.restored.values())
    cut = f"{100 * step.plan.macs_cut:.1f} % of the MACs cut"
    assert str(step) == f"epoch 1: {cut}, {pruned} filters pruned, {restored} given back"


@pytest.mark.filterwarnings("ignore:end_epoch is called more than")
def test_epochs_after_the_schedule_do_nothing() -> None:
    run = Run().to_the_end()
    plan = run.pruner.plan
    for _ in range(2):
        run.epoch()
    assert run.steps[EPOCHS:] == [None, None]
    assert run.pruner.epochs_done == EPOCHS + 2
    assert run.pruner.plan is plan
    assert not run.live_silencers()


# ---------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"target_macs_cut": 1.0}, r"target_macs_cut must be a share in \[0, 1\), not 1.0"),
        ({"target_macs_cut": -0.1}, "target_macs_cut must be"),
        ({"target_macs_cut": 0.5, "target_filters_cut": 0.5}, "exactly one of"),
        ({"target_macs_cut": None}, "exactly one of"),
        ({"target_macs_cut": 0.9, "min_filters": 5}, "a cut of 0.9000 is unreachable"),
        ({"start": 6, "freeze": 5}, "start <= ramp_end"),
        ({"freeze": EPOCHS + 1}, "freeze <= total_epochs"),
        ({"interval": 0}, "interval must be an integer from 1"),
        ({"start": 1.5}, r"share of the epochs must be in \[0, 1\]"),
        ({"kappa": 0.0}, "kappa must be above 0"),
        ({"alpha": -1.0}, "alpha must be at least 0"),
        ({"interval": 1.0}, "interval must be an integer from 1, not 1.0"),
        ({"total_epochs": 8.0}, "total_epochs must be an integer from 1, not 8.0"),
        ({"kappa": float("inf")}, "kappa must be above 0"),
        ({"kappa": 10**400}, "kappa must be above 0, and at most 1e"),
        ({"pulse_batches": 10**30}, r"pulse_batches must be an integer below 2\^63"),
        ({"scope": np.array(["all"])}, "scope must be coupled, all or inner"),
        ({"pulse_batches": 1}, "pulse_batches must be an integer from 2"),
        ({"pulse_batches": 3.0}, "pulse_batches must be an integer from 2"),
        ({"margin": 1.1}, "margin must be"),
        ({"min_filters": 0}, "min_filters must be an integer from 1"),
        ({"min_filters": 1.5}, "min_filters must be an integer from 1"),
        ({"min_filter_share": 2.0}, "min_filter_share must be"),
        ({"fan": "average"}, "fan must be in or out"),
        ({"scope": "outer"}, "scope must be coupled, all or inner, not 'outer'"),
        ({"sparsity_reference": "net"}, "sparsity_reference must be"),
        ({"round_to": 0}, "round_to must be an integer from 1"),
        ({"kappa": float("nan")}, "kappa must be above 0"),
        ({"kappa": "0.5"}, "kappa must be above 0"),
        ({"margin": True}, "margin must be a share"),
        ({"pulse_batches": True}, "pulse_batches must be an integer from 2"),
        (
            {"target_macs_cut": None, "target_filters_cut": 1.5},
            "target_filters_cut must be a share",
        ),
        ({"total_epochs": "8"}, "total_epochs must be an integer from 1, not '8'"),
        ({"start": "0.1"}, r"start must be epochs \(an integer\) or a share .* not '0\.1'"),
        ({"freeze": True}, "freeze must be epochs .* not True"),
        ({"protection": "false"}, "protection must be True or False, not 'false'"),
        ({"exclude": None}, "exclude must be a list of names of modules, not None"),
        ({"exclude": [1]}, r"exclude must be a list of names of modules, not \[1\]"),
        ({"exclude": "stem"}, r"exclude must be a list of names: \['stem'\]"),
    ],
)
def test_settings_out_of_range(settings, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Run(**settings)
    if "unreachable" not in says:
        with pytest.raises(InputError, match=says):
            Settings(**{"target_macs_cut": 0.5, **SCHEDULE, **settings})


def test_settings_are_a_frozen_value() -> None:
    settings = Run(exclude=["stem"]).pruner.settings
    assert settings == Settings(exclude=("stem",), **DEFAULTS)
    assert (settings.unit, settings.target_cut, settings.exclude) == ("macs", 0.5, ("stem",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.kappa = 1.0  # type: ignore[misc]
    with pytest.raises(InputError, match="no setting 'targets': "):
        Run(targets=0.5)


def test_numbers_of_other_types_are_taken_as_they_are_meant() -> None:
    shared = {**SCHEDULE, "start": np.int64(1), "total_epochs": np.int64(EPOCHS)}
    settings = Settings(target_macs_cut=np.float32(0.5), round_to=np.int64(2), **shared)
    assert settings == Settings(target_macs_cut=0.5, round_to=2, **SCHEDULE | {"start": 1})
    assert {type(settings.start), type(settings.round_to)} == {int}
    texts = {"scope": Word.coupled, "fan": np.str_("in"), "exclude": np.array(["stem"])}
    plain = {
        type(value) for value in vars(Settings(target_macs_cut=0.5, **texts, **SCHEDULE)).values()
    }
    assert plain == {str, int, float, bool, tuple, type(None)}
    saved = Run(target_macs_cut=np.float64(0.5), alpha=np.float32(1), scope=Word.coupled)
    saved.epoch()
    buffer = io.BytesIO()
    torch.save(saved.pruner.state_dict(), buffer)
    buffer.seek(0)
    resumed = Run()
    resumed.model.load_state_dict(saved.model.state_dict())
    resumed.pruner.load_state_dict(torch.load(buffer, weights_only=True))
    assert resumed.pruner.plan == saved.pruner.plan


def test_an_unknown_excluded_module() -> None:
    with pytest.raises(InputError, match="'nothing' is no module of Small"):
        Run(exclude=["nothing"])
    with pytest.raises(InputError, match="'' is no module of Small"):
        Run(exclude=[""])


@pytest.mark.parametrize("losses", [[torch.zeros(())], iter([]), None, torch.zeros(())])
def test_losses_instead_of_a_function(losses) -> None:
    with pytest.raises(InputError, match="computed before the pulse"):
        Run().pruner.end_epoch([], losses)


def test_wrapped_models() -> None:
    model = Small()
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        with pytest.raises(InputError, match=f"model must be bare.*, not {type(wrapped).__name__}"):
            PSAP(wrapped, sgd(model), small_example(), **DEFAULTS)


def test_an_optimiser_serves_one_pruner() -> None:
    run = Run()
    with pytest.raises(InputError, match="optimizer must be new: this one serves another PSAP"):
        PSAP(run.model, run.optimizer, small_example(), **DEFAULTS)
    assert PSAP(run.model, sgd(run.model), small_example(), **DEFAULTS)


def test_a_refused_pruner_does_not_keep_its_optimiser() -> None:
    model = Small()
    optimizer = sgd(model)
    with pytest.raises(InputError, match="unreachable"):
        PSAP(model, optimizer, small_example(), **DEFAULTS | {"target_macs_cut": 0.99})
    assert PSAP(model, optimizer, small_example(), **DEFAULTS)


@pytest.mark.parametrize("scope", SCOPES)
def test_what_the_optimiser_lacks_is_left_alone(scope: Scope) -> None:
    model = Small()
    some = [parameter for name, parameter in model.named_parameters() if name != "inner_bn.bias"]
    settings = DEFAULTS | {"scope": scope, "target_macs_cut": 0.1}
    pruner = PSAP(model, torch.optim.SGD(some, 0.1), small_example(), **settings)
    assert {group.name for group in pruner.groups} == {*SMALL_FILTERS[scope]} - {"inner"}
    why = {layer.name: layer.reason for layer in pruner.report.left_alone}
    assert why["inner"] == "inner_bn.bias is frozen, or the optimizer does not train it"


@pytest.mark.parametrize("scope", SCOPES)
def test_frozen_layers_are_left_alone(scope: Scope) -> None:
    model = Small()
    model.expand.weight.requires_grad_(False)
    settings = DEFAULTS | {"scope": scope, "target_macs_cut": 0.2}
    pruner = PSAP(model, sgd(model), small_example(), **settings)
    assert {group.name for group in pruner.groups} == {*SMALL_FILTERS[scope]} - {"expand"}
    why = {layer.name: layer.reason for layer in pruner.report.left_alone}
    assert why["expand"] == "expand.weight is frozen, or the optimizer does not train it"


def test_shared_parameters_are_joined() -> None:
    model = Small()
    model.project_bn.weight = model.shortcut_bn.weight
    names = {
        scope: {
            group.name
            for group in PSAP(
                model, sgd(model), small_example(), **DEFAULTS | {"scope": scope}
            ).groups
        }
        for scope in ("coupled", "all")
    }
    assert "project" in names["coupled"]
    assert "project" not in names["all"]  # it lives with the projection shortcut


def test_half_precision_parameters_are_refused() -> None:
    model = Small().bfloat16()
    with pytest.raises(
        InputError, match=r"'stem\.weight' is torch\.bfloat16: keep parameters in float32"
    ):
        PSAP(model, sgd(model), small_example().bfloat16(), **DEFAULTS)


@pytest.mark.parametrize("network", KINDS)
def test_something_else_that_writes_parameters_is_noticed(network: str) -> None:
    """Averaged weights, or an optimiser that the pruner does not know: while it prunes, and after the freeze."""
    run = Run(network=network, scope="coupled", target_macs_cut=a_large_cut(network, "coupled"))
    for epochs in (2, 6):
        while run.pruner.epochs_done < epochs:
            run.epoch()
        check_revivals_are_noticed(run)


@torch.no_grad()
def check_revivals_are_noticed(run: Run) -> None:
    for tensors, pruned in run.tensors():
        for name in tensors.silencers if pruned else ():
            rows = tensors.parameters[name]
            one = tensors.index(pruned[:1])
            rows.put_(one, torch.full_like(rows.take(one), 0.5))
            with pytest.raises(InputError, match="a pruned filter came back to life"):
                run.pruner.end_epoch([], run.loss)
            rows.zero_(one)
            assert run.pruner._mask.holds()


def test_a_diverged_live_filter_is_no_revival() -> None:
    run = Run()
    run.epoch()
    tensors, pruned = next((tensors, pruned) for tensors, pruned in run.tensors() if pruned)
    live = next(f for f in range(100) if f not in pruned)
    silencer = tensors.parameters[tensors.silencers[0]]
    with torch.no_grad():
        silencer.tensor[live] = float("nan")
    assert run.pruner._mask.holds()


def test_a_pulse_in_evaluation_mode_is_refused() -> None:
    run = Run()
    run.model.eval()
    with pytest.raises(InputError, match=r"call end_epoch before model\.eval\(\)"):
        run.epoch()
    run.model.train()
    run.to_the_end()
    unprotected = Run(protection=False)
    unprotected.model.eval()
    unprotected.to_the_end()


def test_a_pulse_leaves_no_gradient_to_what_only_the_loss_has() -> None:
    torch.manual_seed(0)
    model, temperature = Small(), nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([*model.parameters(), temperature], 0.05)
    pruner = PSAP(model, optimizer, small_example(), **DEFAULTS)

    def loss(_: int) -> torch.Tensor:
        return loss_on(model, side=8) * temperature

    assert pruner.end_epoch(range(3), loss).utility
    assert temperature.grad is None
    with pytest.raises(InputError, match="at least 2 batches"):
        pruner.end_epoch([0], loss)
    assert temperature.grad is None


def test_weights_that_are_not_finite_are_refused_without_a_pulse_too() -> None:
    run = Run(protection=False)
    run.epoch()
    with torch.no_grad():
        run.model.linear.bias.fill_(float("nan"))  # the next steps spread it
    before = run.pruner.plan
    with pytest.raises(InputError, match="a weight is not finite"):
        run.epoch()
    assert run.pruner.plan is before


def test_state_before_the_models_own() -> None:
    saved, resumed = Run(), Run()
    saved.epoch()
    state = copy.deepcopy((saved.model.state_dict(), saved.pruner.state_dict()))
    with pytest.raises(InputError, match="load the model's state first"):
        resumed.pruner.load_state_dict(state[1])
    assert resumed.pruner.state_dict() == Run().pruner.state_dict()
    before = copy.deepcopy(resumed.model.state_dict())
    resumed.optimizer.step()  # without gradients
    assert all(torch.equal(before[name], now) for name, now in resumed.model.state_dict().items())
    resumed.model.load_state_dict(state[0])
    resumed.pruner.load_state_dict(state[1])
    assert resumed.pruner.plan == saved.pruner.plan


def test_state_of_another_network_or_configuration() -> None:
    state = Run().pruner.state_dict()
    with pytest.raises(InputError, match=r"saved with exclude \[\], this run has \['stem'\]"):
        Run(exclude=["stem"]).pruner.load_state_dict(state)
    with pytest.raises(InputError, match=r"saved with target_macs_cut 0\.5, this run has 0\.4"):
        Run(target_macs_cut=0.4).pruner.load_state_dict(state)
    with pytest.raises(InputError, match="saved with scope coupled, this run has all"):
        Run(scope="all").pruner.load_state_dict(state)
    with pytest.raises(InputError, match="saved with schedule"):
        Run(freeze=7).pruner.load_state_dict(state)
    with pytest.raises(InputError, match=r"saved with .* None, this run has"):
        Run().pruner.load_state_dict({})
    with pytest.raises(InputError, match=r"saved with groups stem\[6\].* this run has conv\[8\]"):
        Run(network="own_batch_norm").pruner.load_state_dict(state)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    at = {
        side: PSAP(model, sgd(model), torch.zeros(1, 3, side, side), **DEFAULTS) for side in (8, 9)
    }
    with pytest.raises(
        InputError, match=r"saved with inputs .*\[1, 3, 8, 8\].* this run has .*\[1, 3, 9, 9\]"
    ):
        at[9].load_state_dict(at[8].state_dict())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs_done": 99}, "it has 99 of 8 epochs done"),
        ({"epochs_done": -1}, "it has -1 of 8 epochs done"),
        ({"epochs_done": "1"}, "it has '1' of 8 epochs done"),
        ({"is_compact": "no"}, "is_compact is not True or False"),
        ({"snapshots": None}, "it holds no snapshots"),
        ({"snapshots": {"stem": {"stem.weight": 1}}}, "it holds no snapshots"),
        ({"plan": None}, "not a pruning plan"),
        ({"settings": None}, "its settings are no dictionary"),
    ],
)
def test_a_state_that_no_run_saved(changes, sentence: str) -> None:
    run = Run()
    before = run.pruner.state_dict()
    with pytest.raises(InputError, match=sentence):
        run.pruner.load_state_dict(before | changes)
    assert run.pruner.state_dict() == before


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: {}, "snapshot of 'conv' lacks tensors"),
        (
            lambda rows: {name: rows[name][1:] for name in rows},
            r"snapshot of .* is torch.float32 \[",
        ),
        (lambda rows: {name: rows[name].double() for name in rows}, "is torch.float64"),
    ],
    ids=["no rows", "a row less", "another type"],
)
def test_snapshots_that_are_not_of_the_plans_filters(change, sentence: str) -> None:
    run = Run(network="own_batch_norm")
    while not run.pruner.plan.pruned["conv"]:
        run.epoch()
    state = run.pruner.state_dict()
    snapshots = state["snapshots"] | {"conv": change(state["snapshots"]["conv"])}
    with pytest.raises(InputError, match=sentence):
        run.pruner.load_state_dict(state | {"snapshots": snapshots})
    run.pruner.load_state_dict(state)


@pytest.mark.parametrize("make", [torch.optim.Adafactor, torch.optim.LBFGS])
def test_state_that_is_not_of_the_parameters_shape(make) -> None:
    run = Run(make_optimizer=lambda model: torch.optim.SGD(model.parameters(), 0.01))
    for _ in range(5):
        run.epoch()
    optimizer = make(run.model.parameters(), 0.01)
    run.pruner.use(optimizer)
    step = functools.partial(optimizer.step, lambda: run.loss(0))
    run.loss(0).backward()
    step()
    if make is torch.optim.Adafactor:  # its factors are cut as well
        run.pruner.compact_()
        optimizer.zero_grad()
        run.loss(0).backward()
        step()
        return
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(InputError, match=r"the state '.*' of LBFGS cannot be cut: go on masked"):
        run.pruner.compact_()
    assert {n: t.shape for n, t in run.model.state_dict().items()} == {
        n: t.shape for n, t in before.items()
    }
    step()
    assert run.pruner._mask.holds()


def test_a_compact_network_takes_no_other_state() -> None:
    run, other = Run(), Run(margin=0.3)
    for _ in range(5):
        run.epoch()
    before = run.pruner.state_dict()
    run.pruner.compact_()
    with pytest.raises(InputError, match="compact already, and not by the state's plan"):
        run.pruner.load_state_dict(before)
    with pytest.raises(InputError, match="must be a dictionary, not NoneType"):
        other.pruner.load_state_dict(None)
    del before["snapshots"]
    with pytest.raises(InputError, match="is damaged: it has no 'snapshots'"):
        other.pruner.load_state_dict(before)


def test_parameters_that_are_other_objects_are_noticed() -> None:
    run = Run()
    run.epoch()
    run.model.load_state_dict(copy.deepcopy(run.model.state_dict()), assign=True)
    with pytest.raises(InputError, match="parameters are other objects"):
        run.pruner.use(sgd(run.model))
    with pytest.raises(InputError, match="parameters are other objects"):
        run.epoch()


@pytest.mark.parametrize("given", [5, "relu", ["relu"], [nn.ReLU()], torch.relu])
def test_zero_preserving_must_be_operations(given) -> None:
    with pytest.raises(InputError, match="zero_preserving"):
        Run(zero_preserving=given)


def test_batches_must_be_some() -> None:
    with pytest.raises(InputError, match="batches must be an iterable of them, not int"):
        Run().pruner.end_epoch(5, lambda batch: batch)
