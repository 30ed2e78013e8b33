"""PSAP as a whole: budgets, floors, resumption, freezing, switches, and what it refuses."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from psap_core import PSAP, InputError, export, filter_floors, macs
from tests.core.networks import Small, loss_on, sgd, small_example, train_
from tests.core.test_suspension import OPTIMIZERS, everything

EPOCHS = 8
SCHEDULE = {"total_epochs": EPOCHS, "start": 1, "ramp_end": 4, "freeze": 5}
# Early training moves ratios and utilities a lot: what a step does is then easy to see.
DEFAULTS = {"target_macs_cut": 0.5, "min_filters": 1, "pulse_batches": 3, **SCHEDULE}


class Run:
    """A few batches an epoch on a small network, with a PSAP; every batch is a function of its position."""

    def __init__(self, make_optimizer=sgd, **settings) -> None:
        torch.manual_seed(0)
        self.model = Small()
        self.optimizer = make_optimizer(self.model)
        self.pruner = PSAP(self.model, self.optimizer, small_example(), **(DEFAULTS | settings))
        self.steps = []

    def epoch(self, after_step=lambda: None) -> None:
        done = self.pruner.epochs_done
        for batch in range(3):
            self.optimizer.zero_grad()
            loss_on(self.model, side=8, seed=100 * done + batch).backward()
            self.optimizer.step()
            after_step()

        def make_losses():
            return (loss_on(self.model, side=8, seed=100 * done + 50 + k) for k in range(10))

        self.steps.append(self.pruner.end_epoch(make_losses))

    def to_the_end(self) -> "Run":
        while self.pruner.epochs_done < EPOCHS:
            self.epoch()
        return self

    def plans(self) -> list[str | None]:
        return [step and step.plan.digest for step in self.steps]


def test_every_plan_meets_its_budget_and_no_further_filter_fits() -> None:
    run = Run().to_the_end()
    assert [step is not None for step in run.steps] == [True] * 5 + [False] * 3
    cuts = [step.plan.target_cut for step in run.steps[:5]]
    assert cuts == pytest.approx([0.5 * (1 - (1 - x) ** 3) for x in (0.25, 0.5, 0.75, 1.0, 1.0)])
    for step in run.steps[:5]:
        plan = step.plan
        assert plan.macs <= (1 - plan.target_cut) * plan.dense_macs
        kept = [part.kept for part in plan.layers]
        room = (1 - plan.target_cut) * plan.dense_macs - plan.macs
        marginal = [run.pruner._macs.marginal(kept, l) for l in range(len(kept))]
        assert all(
            m > room
            for m, part in zip(marginal, plan.layers, strict=True)
            if part.kept < part.filters
        )
        assert all(
            k >= floor for k, floor in zip(kept, filter_floors([6, 8, 6, 10, 7, 5], 1), strict=True)
        )
    small = export(run.model, run.pruner.plan)
    assert macs(small, small_example()) == run.pruner.plan.macs


def test_a_budget_in_filters() -> None:
    run = Run(target_macs_cut=None, target_filters_cut=0.4).to_the_end()
    plan = run.pruner.plan
    assert plan.unit == "filters"
    assert sum(part.kept for part in plan.layers) == math.floor(0.6 * 42)
    assert plan.target_cut == 0.4


def test_the_step_at_freeze_is_always_taken() -> None:
    run = Run(start=1, ramp_end=4, freeze=6, interval=3).to_the_end()
    assert [epoch for epoch, step in enumerate(run.steps, 1) if step] == [1, 4, 6]


def test_suspended_affines_are_zero_after_every_optimiser_step() -> None:
    run = Run()

    def check() -> None:
        for layer, part in run.pruner.plan.match(run.pruner.layers):
            norm = run.model.get_submodule(layer.affine)
            assert not norm.weight[list(part.pruned)].any()
            assert not norm.bias[list(part.pruned)].any()

    while run.pruner.epochs_done < EPOCHS:
        run.epoch(after_step=check)
        check()
    assert run.pruner.plan.macs_cut >= 0.5


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_the_freeze_the_plan_stands_and_frozen_weights_stay_zero(name: str) -> None:
    run = Run(OPTIMIZERS[name])
    while run.pruner.epochs_done < run.pruner.schedule.freeze:
        run.epoch()
    plan = run.pruner.plan
    assert not any(snapshot.rows for snapshot in run.pruner._snapshots.values())
    run.to_the_end()
    assert run.pruner.plan is plan
    for layer, part in plan.match(run.pruner.layers):
        for member in layer.members:
            for parameter in run.model.get_submodule(member).parameters():
                assert not parameter[list(part.pruned)].any(), member
    small = export(run.model, plan)
    batch = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(small.eval()(batch), run.model.eval()(batch), rtol=1e-4, atol=1e-5)


def test_restored_filters_come_back_exactly() -> None:
    """Filters proposed and restored in the same step are untouched by it, optimiser state included."""
    run = Run(margin=1.0)
    run.epoch()
    before = everything(run.model, run.optimizer)
    momentum = {id(p): s["momentum_buffer"].clone() for p, s in run.optimizer.state.items()}
    step = run.pruner._step(2, lambda: (loss_on(run.model, side=8, seed=k) for k in range(3)))
    assert sum(map(len, step.restored.values())) > 3
    for layer, _ in step.plan.match(run.pruner.layers):
        rows = list(step.restored[layer.name])
        for member in layer.members:
            module = run.model.get_submodule(member)
            for name, tensor in module.state_dict().items():
                if tensor.ndim:
                    assert torch.equal(tensor[rows], before[f"model.{member}.{name}"][rows])
            for parameter in module.parameters():
                now = run.optimizer.state[parameter]["momentum_buffer"]
                assert torch.equal(now[rows], momentum[id(parameter)][rows])


def test_same_seed_same_plans() -> None:
    assert Run().to_the_end().plans() == Run().to_the_end().plans()


@pytest.mark.parametrize("stop", range(1, EPOCHS))
def test_stop_and_resume_anywhere_makes_the_same_plans_and_weights(stop: int) -> None:
    whole = Run().to_the_end()
    first = Run()
    for _ in range(stop):
        first.epoch()
    file = io.BytesIO()
    torch.save(
        [first.model.state_dict(), first.optimizer.state_dict(), first.pruner.state_dict()], file
    )
    file.seek(0)
    model, optimizer, pruner = torch.load(file, weights_only=True)
    second = Run()
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    second.pruner.load_state_dict(pruner)
    second.to_the_end()
    assert first.plans() + second.plans() == whole.plans()
    ours, theirs = (
        everything(second.model, second.optimizer),
        everything(whole.model, whole.optimizer),
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize(
    "switch",
    [
        {"alpha": 0.0},
        {"alpha": 3.0},
        {"kappa": 1.0},
        {"sparsity_reference": "layer"},
        {"fan": "out"},
        {"protection": False},
        {"margin": 1.0},
        {"pulse_batches": 7},
        {"interval": 2},
        {"scope": "inner"},
        {"exclude": ["expand"]},
        {"min_filters": 4},
        {"min_filter_share": 0.5},
        {"ramp_end": 2},
        {"freeze": 7},
        {"start": 2},
        {"target_macs_cut": 0.4},
        {"target_macs_cut": None, "target_filters_cut": 0.5},
    ],
    ids=lambda switch: "-".join(f"{k}={v}" for k, v in switch.items()),
)
def test_every_switch_changes_the_plans(switch) -> None:
    assert Run(**switch).to_the_end().plans() != Run().to_the_end().plans()


def test_without_protection_the_function_is_not_called() -> None:
    run = Run(protection=False)
    train_(run.model, run.optimizer, 8, 2)
    step = run.pruner.end_epoch(lambda: pytest.fail("called"))
    assert not step.utility
    assert not any(step.restored.values())
    assert step.plan.macs_cut > 0.2


def test_a_failed_step_leaves_everything_as_it_was() -> None:
    run = Run()
    run.epoch()
    run.epoch()
    before, plan = everything(run.model, run.optimizer), run.pruner.plan
    with pytest.raises(InputError, match="at least 2 losses"):
        run.pruner.end_epoch(lambda: iter(()))
    assert run.pruner.plan is plan
    assert run.pruner.epochs_done == 2
    suspended = {
        name
        for layer, part in plan.match(run.pruner.layers)
        if part.pruned
        for name in layer.members
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
    run.to_the_end()


def test_it_works_under_autocast() -> None:
    run = Run()
    for _ in range(EPOCHS):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            run.optimizer.zero_grad()
            loss = loss_on(run.model, side=8)
            loss.backward()
            run.optimizer.step()
            run.pruner.end_epoch(lambda: (loss_on(run.model, side=8) for _ in range(4)))
    assert run.pruner.plan.macs_cut >= 0.5
    export(run.model, run.pruner.plan)


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
        ({"interval": 0}, "interval at least 1"),
        ({"start": 1.5}, r"share of the epochs must be in \[0, 1\]"),
        ({"kappa": 0.0}, "kappa must be above 0"),
        ({"alpha": -1.0}, "alpha must be at least 0"),
        ({"interval": 1.0}, "must be whole numbers"),
        ({"total_epochs": 8.0}, "must be whole numbers"),
        ({"kappa": float("inf")}, "kappa must be above 0"),
        ({"pulse_batches": 1}, "pulse_batches must be an integer from 2"),
        ({"pulse_batches": 3.0}, "pulse_batches must be an integer from 2"),
        ({"margin": 1.1}, "margin must be"),
        ({"min_filters": 0}, "min_filters must be an integer from 1"),
        ({"min_filters": 1.5}, "min_filters must be an integer from 1"),
        ({"min_filter_share": 2.0}, "min_filter_share must be"),
        ({"fan": "average"}, "fan must be in or out"),
        ({"scope": "outer"}, "scope must be all or inner"),
        ({"sparsity_reference": "net"}, "sparsity_reference must be"),
        ({"exclude": ["nothing"]}, "'nothing' is not a convolution"),
    ],
)
def test_settings_out_of_range(settings, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Run(**settings)


@pytest.mark.parametrize("losses", [[torch.zeros(())], iter([]), None, torch.zeros(())])
def test_losses_instead_of_a_function(losses) -> None:
    with pytest.raises(InputError, match="computed before the pulse"):
        Run().pruner.end_epoch(losses)


def test_wrapped_models() -> None:
    model = Small()
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        with pytest.raises(InputError, match=f"model must be bare.*, not {type(wrapped).__name__}"):
            PSAP(wrapped, sgd(model), small_example(), **DEFAULTS)


def test_an_optimiser_serves_one_pruner() -> None:
    run = Run()
    with pytest.raises(
        InputError, match="optimizer must be new, not one after whose steps another PSAP"
    ):
        PSAP(run.model, run.optimizer, small_example(), **DEFAULTS)
    assert PSAP(run.model, sgd(run.model), small_example(), **DEFAULTS)


def test_an_optimiser_that_lacks_a_pruned_parameter() -> None:
    model = Small()
    some = [parameter for name, parameter in model.named_parameters() if name != "inner_bn.bias"]
    optimizer = torch.optim.SGD(some, 0.1)
    with pytest.raises(InputError, match=r"does not train 'inner_bn\.bias'"):
        PSAP(model, optimizer, small_example(), **DEFAULTS)
    PSAP(model, optimizer, small_example(), **DEFAULTS, exclude=["inner"])
    frozen = Small()
    frozen.stem.weight.requires_grad_(False)
    with pytest.raises(InputError, match=r"does not train 'stem\.weight'"):
        PSAP(frozen, sgd(frozen), small_example(), **DEFAULTS)


def test_shared_parameters_are_refused() -> None:
    model = Small()
    model.project_bn.weight = model.shortcut_bn.weight
    with pytest.raises(InputError, match=r"'project_bn\.weight' .* is shared with another module"):
        PSAP(model, sgd(model), small_example(), **DEFAULTS)
    PSAP(model, sgd(model), small_example(), **DEFAULTS, exclude=["project"])


def test_half_precision_parameters_are_refused() -> None:
    model = Small().bfloat16()
    with pytest.raises(
        InputError, match=r"'stem\.weight' is torch\.bfloat16: keep parameters in float32"
    ):
        PSAP(model, sgd(model), small_example().bfloat16(), **DEFAULTS)


@pytest.mark.parametrize("epochs", [2, 6])
def test_something_else_that_writes_parameters_is_noticed(epochs: int) -> None:
    """Averaged weights, or an optimiser that the pruner does not know: while it prunes, and after the freeze."""
    run = Run()
    for _ in range(epochs):
        run.epoch()
    layer, part = next(pair for pair in run.pruner.plan.match(run.pruner.layers) if pair[1].pruned)
    affine = run.model.get_submodule(layer.affine).weight
    with torch.no_grad():
        affine[part.pruned[0]] = 0.5
    with pytest.raises(InputError, match="a pruned filter came back to life"):
        run.pruner.end_epoch(lambda: ())
    with torch.no_grad():
        affine[part.pruned[0]] = 0.0
        affine[next(f for f in range(part.filters) if f not in part.pruned)] = float("nan")
    assert run.pruner._silence.holds()


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
    assert pruner.end_epoch(
        lambda: (loss_on(model, side=8) * temperature for _ in range(3))
    ).utility
    assert temperature.grad is None
    with pytest.raises(InputError, match="at least 2 losses"):
        pruner.end_epoch(lambda: [loss_on(model, side=8) * temperature])
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


def test_more_epochs_than_the_schedule_has() -> None:
    run = Run().to_the_end()
    with pytest.raises(InputError, match="all 8 epochs"):
        run.epoch()


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
    with pytest.raises(InputError, match=r"saved with layers stem\[6\].* this run has inner"):
        Run(exclude=["stem"]).pruner.load_state_dict(state)
    with pytest.raises(InputError, match="saved with target"):
        Run(target_macs_cut=0.4).pruner.load_state_dict(state)
    with pytest.raises(InputError, match="saved with schedule"):
        Run(freeze=7).pruner.load_state_dict(state)
    with pytest.raises(InputError, match="saved with layers None"):
        Run().pruner.load_state_dict({})
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    at = {
        side: PSAP(model, sgd(model), torch.zeros(1, 3, side, side), **DEFAULTS) for side in (8, 9)
    }
    with pytest.raises(InputError, match=r"saved with input \[3, 8, 8\], this run has \[3, 9, 9\]"):
        at[9].load_state_dict(at[8].state_dict())
