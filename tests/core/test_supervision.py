"""Eq. 5: what the pulse measures is the loss reduction of giving a filter back, and it leaves no trace."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psap_core.errors import InputError
from psap_core.groups import Scope
from psap_core.supervision import Supervision, pulse
from psap_core.suspension import FilterTensors, Snapshot, filter_tensors, restore_, suspend_
from tests.core.networks import (
    KINDS,
    SCOPES,
    SMALL_NETWORKS,
    SMALL_NETWORKS_AND_SCOPES,
    loss_on,
    randomise_,
    sgd,
    train_,
)
from tests.core.test_suspension import everything, groups_of, same

SUSPENDED = {"stem": [2], "inner": [1, 5], "outer": [3], "expand": [4], "project": [], "last": []}
Tensors = Mapping[str, FilterTensors]
Snapshots = Mapping[str, Snapshot]
T = 1e-4  # how much of a filter the pulse gives back


def suspended_network(
    network: str = "small",
    scope: Scope = "all",
    suspended: Mapping[str, Sequence[int]] = SUSPENDED,
    dtype: torch.dtype = torch.float64,
):
    torch.manual_seed(0)
    model = SMALL_NETWORKS[network]()
    randomise_(model)
    optimizer = sgd(model)
    train_(model, optimizer, side=8, steps=5)
    model.to(dtype)
    tensors = {
        group.name: filter_tensors(model, group, optimizer) for group in groups_of(model, scope)
    }
    snapshots = {
        name: suspend_(group, suspended.get(name, ()), Snapshot())
        for name, group in tensors.items()
    }
    return model, optimizer, tensors, snapshots


def supervise(
    model: nn.Module,
    tensors: Tensors,
    snapshots: Snapshots,
    batches: Iterable[Any] = range(2),
    loss_of_batch: Callable[[Any], Tensor] | None = None,
    count: int = 2,
) -> Supervision:
    """A pulse whose batches are seeds, unless told otherwise."""

    def loss_of_seed(seed: int) -> Tensor:
        return loss_on(model, side=8, batch=64, seed=seed)

    return pulse(model, tensors, snapshots, batches, loss_of_batch or loss_of_seed, count)


def different_groups() -> list[tuple[str, Scope, str]]:
    """Every group of every small network, in the first scope that has it."""
    found: dict[tuple, tuple[str, Scope, str]] = {}
    for network, scope in SMALL_NETWORKS_AND_SCOPES:
        for group in groups_of(SMALL_NETWORKS[network](), scope):
            silencers = tuple(silencer.tensor for silencer in group.silencers)
            kind = (network, group.name, silencers, group.scattered)
            found.setdefault(kind, (network, scope, group.name))
    return [*found.values()]


@torch.no_grad()
def loss_reductions(model: nn.Module, group: FilterTensors, snapshot: Snapshot) -> Tensor:
    """(L(0) - L(t saved)) / t of two batches, of a snapshot of one filter, measured on the network itself."""
    reductions = []
    index = group.index(snapshot.filters)
    for seed in range(2):
        without = loss_on(model, side=8, batch=64, seed=seed)
        for name in group.silencers:
            group.parameters[name].put_(index, T * snapshot.rows[name])
        back = loss_on(model, side=8, batch=64, seed=seed)
        for name in group.silencers:
            group.parameters[name].zero_(index)
        reductions.append((without - back) / T)
    return torch.stack(reductions)


def most_useful(model: nn.Module, group: FilterTensors) -> int:
    """The filter that matters most when it goes alone: of others a ReLU may hide everything."""
    found = {}
    for f in range(len(group.parameters[group.silencers[0]].index)):
        snapshot = suspend_(group, [f], Snapshot())
        found[f] = loss_reductions(model, group, snapshot).mean().abs().item()
        restore_(group, snapshot)
    return max(found, key=found.__getitem__)


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize(("network", "scope", "name"), different_groups())
def test_utility_is_the_loss_reduction_of_giving_a_filter_back(
    network: str, scope: Scope, name: str, training: bool
) -> None:
    """u_f equals (L(0) - L(t * saved)) / t for small t, to 1 %, in float64; it is not zero."""
    model, _, tensors, snapshots = suspended_network(network, scope, {})
    model.train(training)
    group = tensors[name]
    f = most_useful(model, group)
    snapshots[name] = suspend_(group, [f], Snapshot())
    seen = supervise(model, tensors, snapshots)
    reductions = loss_reductions(model, group, snapshots[name])
    mean, error = seen.utility[name][f]
    assert abs(mean) > 1e-4
    close = {"abs": 1e-2 * reductions.abs().max().item()}
    assert mean == pytest.approx(reductions.mean().item(), **close)
    assert error == pytest.approx((reductions.std() / 2**0.5).item(), **close)


def test_every_kind_of_silencer_is_among_them() -> None:
    tested = {(network, name) for network, _, name in different_groups()}
    assert {(network, kind.group) for network, kind in KINDS.items()} <= tested


@pytest.mark.parametrize("scope", SCOPES)
def test_gradient_norms_are_those_of_the_silencers(scope: Scope) -> None:
    model, _, tensors, snapshots = suspended_network(scope=scope)
    seen = supervise(model, tensors, snapshots)
    assert seen.grad_norm_live.keys() == tensors.keys()
    assert seen.grad_norm_suspended.keys() == {name for name in tensors if SUSPENDED[name]}
    norms = {"last": [], "project": []}
    for seed in range(2):
        model.zero_grad()
        loss_on(model, side=8, batch=64, seed=seed).backward()
        last, project, shortcut = (
            torch.stack([norm.weight.grad, norm.bias.grad])
            for norm in (model.last_bn, model.project_bn, model.shortcut_bn)
        )
        norms["last"].append(last.norm(dim=0).mean())
        if scope == "coupled":
            project = torch.cat([project, shortcut])
        norms["project"].append(project.norm(dim=0).mean())
    for name in {*norms} & {*tensors}:
        expected = torch.stack(norms[name]).mean().item()
        assert seen.grad_norm_live[name] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(("network", "scope"), SMALL_NETWORKS_AND_SCOPES)
def test_the_pulse_leaves_no_trace(network: str, scope: Scope) -> None:
    names = [group.name for group in groups_of(SMALL_NETWORKS[network](), scope)]
    suspended = {name: [1] for name in names}
    model, optimizer, tensors, snapshots = suspended_network(
        network, scope, suspended, torch.float32
    )
    [*model.modules()][-1].eval()
    before, generator = everything(model, optimizer), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    supervise(
        model,
        tensors,
        snapshots,
        range(3),
        lambda _: loss_on(model, side=8) + 0 * torch.rand(()),
        count=3,
    )
    assert same(before, everything(model, optimizer))
    assert torch.equal(generator, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_are_drawn_inside_the_fork_of_the_generators() -> None:
    model, _, tensors, snapshots = suspended_network()
    before = torch.get_rng_state()
    batches = (torch.randint(1000, ()).item() for _ in range(2))
    supervise(model, tensors, snapshots, batches)
    assert torch.equal(before, torch.get_rng_state())


def test_gradients_do_not_add_up_over_batches() -> None:
    model, _, tensors, snapshots = suspended_network()
    loss_on(model, side=8).backward()  # left over from training
    one = supervise(model, tensors, snapshots, [7] * 2, count=2)
    many = supervise(model, tensors, snapshots, [7] * 6, count=6)
    mean, error = one.utility["stem"][2]
    assert many.utility["stem"][2][0] == pytest.approx(mean, rel=1e-9)
    assert error == pytest.approx(0, abs=1e-12)


def test_no_more_batches_are_made_than_asked_for() -> None:
    model, _, tensors, snapshots = suspended_network()
    made = []

    def batches():
        for seed in range(100):
            made.append(seed)
            yield seed

    supervise(model, tensors, snapshots, batches(), count=4)
    assert made == [0, 1, 2, 3]


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_batches(count: int) -> None:
    model, optimizer, tensors, snapshots = suspended_network()
    before = everything(model, optimizer)
    with pytest.raises(InputError, match=f"at least 2 batches .* it was given {count}"):
        supervise(model, tensors, snapshots, range(count), count=5)
    assert same(before, everything(model, optimizer))


def test_a_few_batches_will_do() -> None:
    model, _, tensors, snapshots = suspended_network()
    some = supervise(model, tensors, snapshots, range(3), count=10)
    assert some == supervise(model, tensors, snapshots, range(3), count=3)


def test_a_loss_that_is_not_finite() -> None:
    model, _, tensors, snapshots = suspended_network()
    with pytest.raises(InputError, match="not finite"):
        supervise(
            model, tensors, snapshots, range(2), lambda _: loss_on(model, side=8) * float("nan")
        )


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda loss: loss.item(), "must return a scalar tensor, not a float"),
        (lambda loss: None, "must return a scalar tensor, not a NoneType"),
        (
            lambda loss: loss.expand(2),
            r"one real number that has a gradient, not a tensor of shape \[2",
        ),
        (lambda loss: loss.detach(), r"of shape \[\] with requires_grad=False"),
        (lambda loss: loss * 1j, "must return one real number"),
    ],
)
def test_a_loss_that_is_no_scalar_with_a_gradient(spoil, says: str) -> None:
    model, optimizer, tensors, snapshots = suspended_network()
    before = everything(model, optimizer)
    with pytest.raises(InputError, match=says):
        supervise(model, tensors, snapshots, range(2), lambda _: spoil(loss_on(model, side=8)))
    assert same(before, everything(model, optimizer))


def test_a_loss_that_is_used_up() -> None:
    model, optimizer, tensors, snapshots = suspended_network()
    loss = loss_on(model, side=8)
    before = everything(model, optimizer)
    with pytest.raises(InputError, match="must compute a loss anew of every batch"):
        supervise(model, tensors, snapshots, range(2), lambda _: loss)
    assert same(before, everything(model, optimizer))


def test_a_group_without_a_gradient() -> None:
    model, optimizer, tensors, snapshots = suspended_network()
    before = everything(model, optimizer)
    other, *_ = suspended_network()
    with pytest.raises(InputError, match="no filter got a gradient: loss_of_batch uses another"):
        supervise(model, tensors, snapshots, range(2), lambda _: loss_on(other, side=8))
    model.inner_bn.bias.requires_grad_(False)
    with pytest.raises(InputError, match=r"'inner' got no gradient: inner_bn\.bias is frozen"):
        supervise(model, tensors, snapshots)
    assert same(before, everything(model, optimizer))


def test_an_interrupted_pulse_is_undone() -> None:
    model, optimizer, tensors, snapshots = suspended_network()
    before = everything(model, optimizer)

    def batches():
        yield 0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise(model, tensors, snapshots, batches(), count=5)
    assert same(before, everything(model, optimizer))


def test_the_pulse_runs_without_autocast_and_with_gradients() -> None:
    model, _, tensors, snapshots = suspended_network(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = supervise(model, tensors, snapshots)
    assert inside == supervise(model, tensors, snapshots)
