"""Eq. 4, 6, 7: suspended filters are absent, come back bit for bit, and stay away when frozen."""

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from psap_core.cost import macs_cost_model
from psap_core.exported import export
from psap_core.groups import ChannelGroup, Scope, find_groups
from psap_core.inputs import describe
from psap_core.plan import PrunePlan, make_plan
from psap_core.surgery import smaller_copy
from psap_core.suspension import (
    FilterMask,
    FilterTensors,
    Snapshot,
    apply_,
    filter_tensors,
    freeze_,
    restore_,
    suspend_,
)
from tests.core.networks import (
    KINDS,
    KINDS_AND_SCOPES,
    SCOPES,
    SMALL_NETWORKS,
    SMALL_NETWORKS_AND_SCOPES,
    Small,
    draw_filters,
    loss_on,
    randomise_,
    sgd,
    small_example,
    train_,
)

OPTIMIZERS = {
    "sgd_nesterov": sgd,
    "sgd_plain": lambda model: torch.optim.SGD(model.parameters(), 0.1),
    "adam": lambda model: torch.optim.Adam(model.parameters()),
    "adamw": lambda model: torch.optim.AdamW(model.parameters()),
    "adamw_amsgrad": lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), momentum=0.5, centered=True),
}
# Of Small, whatever the scope.
FILTERS = {
    "stem": [0, 3],
    "inner": [1, 2, 7],
    "outer": [5],
    "expand": [0, 4, 9],
    "project": [6],
    "last": [],
}
Groups = Sequence[ChannelGroup]


def trained(
    make_optimizer=sgd, network: str = "small", steps: int = 3
) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = SMALL_NETWORKS[network]()
    randomise_(model)
    optimizer = make_optimizer(model)
    train_(model, optimizer, side=8, steps=steps)
    return model, optimizer


def groups_of(model: nn.Module, scope: Scope = "all") -> tuple[ChannelGroup, ...]:
    return find_groups(model, small_example().to(next(model.parameters())), scope=scope)


def plan_of(model: nn.Module, groups: Groups, filters: Mapping, scope: Scope) -> PrunePlan:
    example = small_example().to(next(model.parameters()))
    cost = macs_cost_model(model, groups, example)
    pruned = {group.name: filters[group.name] for group in groups}
    return make_plan(groups, pruned, cost, describe(small_example()), scope)


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{index}.{k}": v.clone() for k, v in state.items() if isinstance(v, Tensor)
        }
    return tensors


def same(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """The same names, and the same bits."""
    return before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )


def suspend_all(
    model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], groups: Groups, filters: Mapping
) -> dict[str, Snapshot]:
    return {
        group.name: suspend_(
            filter_tensors(model, group, optimizer), filters[group.name], Snapshot()
        )
        for group in groups
    }


def restore_all(model: nn.Module, optimizer: Optimizer, groups: Groups, snapshots) -> None:
    for group in groups:
        restore_(filter_tensors(model, group, optimizer), snapshots[group.name])


def entries_of(tensors: FilterTensors, filters: Sequence[int]) -> dict[str, Tensor]:
    """Everything of some filters, by name."""
    index = tensors.index(filters)
    return {name: rows.take(index) for name, rows in tensors.everything.items()}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restore_after_suspend_is_bit_identical(name: str, scope: Scope) -> None:
    model, optimizer = trained(OPTIMIZERS[name])
    groups = groups_of(model, scope)
    before = everything(model, optimizer)
    snapshots = suspend_all(model, optimizer, groups, FILTERS)
    assert not same(before, everything(model, optimizer))
    restore_all(model, optimizer, groups, snapshots)
    assert same(before, everything(model, optimizer))


@pytest.mark.parametrize("optimizer_name", ["sgd_nesterov", "adamw"])
@pytest.mark.parametrize(("network", "scope"), KINDS_AND_SCOPES)
def test_restore_after_suspend_is_bit_identical_whatever_silences(
    network: str, scope: Scope, optimizer_name: str
) -> None:
    model, optimizer = trained(OPTIMIZERS[optimizer_name], network)
    groups = groups_of(model, scope)
    filters = draw_filters(groups)
    before = everything(model, optimizer)
    snapshots = suspend_all(model, optimizer, groups, filters)
    suspended = everything(model, optimizer)
    for group in groups:
        tensors = filter_tensors(model, group, optimizer)
        index = tensors.index(filters[group.name])
        for silencer in tensors.silencers:
            assert not tensors.parameters[silencer].take(index).any()
        for rows in tensors.state.values():
            assert not rows.take(index).any()
    assert not same(before, suspended)
    restore_all(model, optimizer, groups, snapshots)
    assert same(before, everything(model, optimizer))


@pytest.mark.parametrize("network", KINDS)
def test_silencers_and_writers_of_every_kind(network: str) -> None:
    kind = KINDS[network]
    groups = {group.name: group for group in groups_of(kind.make(), "coupled")}
    group = groups[kind.group]
    assert group.filters == kind.filters
    assert tuple(writer.tensor for writer in group.writers) == kind.writers
    assert tuple(silencer.tensor for silencer in group.silencers) == kind.silencers


@pytest.mark.parametrize(
    ("network", "shapes_and_fans"),
    [
        ("own_batch_norm", [((8, 3, 3, 3), 27, 72)]),
        ("grouped", [((5, 2, 3, 3, 3), 27, 90)]),  # two rows a filter, of a layer of ten
        ("group_norm", [((5, 2, 3, 3, 3), 27, 90)]),
        ("hidden_linear", [((10, 192), 192, 10)]),
        ("squeeze_and_excite", [((8, 3, 3, 3), 27, 72), ((8, 4, 1, 1), 4, 8)]),
        ("transposed", [((6, 1, 8, 2, 2), 32, 24)]),  # its rows lie along the second dimension
    ],
)
def test_rows_of_a_filter_with_the_fans_of_their_whole_layer(network, shapes_and_fans) -> None:
    """What eq. 1 and 3 measure."""
    kind = KINDS[network]
    model = kind.make()
    groups = {group.name: group for group in groups_of(model, "coupled")}
    rows = filter_tensors(model, groups[kind.group]).filter_rows()
    assert [(tuple(w.rows.shape), w.fan_in, w.fan_out) for w in rows] == shapes_and_fans
    for name, writer in zip(kind.writers, rows, strict=True):
        weight = model.get_parameter(name)
        expected = weight.movedim(1, 0) if network == "transposed" else weight
        assert torch.equal(writer.rows.flatten(), expected.flatten())


@pytest.mark.parametrize("scope", SCOPES)
def test_everything_of_a_filter_comes_back_after_training_went_on(scope: Scope) -> None:
    model, optimizer = trained()
    groups = groups_of(model, scope)
    before = {
        group.name: entries_of(filter_tensors(model, group, optimizer), FILTERS[group.name])
        for group in groups
    }
    assert "depthwise.weight:momentum_buffer" in before["expand"]
    assert "expand_bn.running_var" in before["expand"]
    assert "inner.bias" in before["inner"]
    if scope == "coupled":
        assert "outer.weight:momentum_buffer" in before["stem"]
        assert "shortcut_bn.running_mean" in before["project"]
    snapshots = suspend_all(model, optimizer, groups, FILTERS)
    train_(model, optimizer, side=8, steps=2)
    restore_all(model, optimizer, groups, snapshots)
    for group in groups:
        after = entries_of(filter_tensors(model, group, optimizer), FILTERS[group.name])
        assert same(before[group.name], after), group.name


def test_optimiser_state_that_did_not_exist_yet_counts_as_zero() -> None:
    torch.manual_seed(0)
    model = Small()
    optimizer = sgd(model)
    groups = groups_of(model)
    snapshots = suspend_all(model, optimizer, groups, FILTERS)
    train_(model, optimizer, side=8, steps=1)
    # A filter suspended later has state; the ones suspended before must still come back with zero.
    tensors = filter_tensors(model, groups[0], optimizer)
    momentum = optimizer.state[model.stem.weight]["momentum_buffer"]
    late = momentum[2].clone()
    snapshot = suspend_(tensors, [2], snapshots["stem"])
    train_(model, optimizer, side=8, steps=1)
    restore_(tensors, snapshot.select([3, 0, 2]))
    assert torch.equal(momentum[2], late)
    assert late.any()
    assert not momentum[[0, 3]].any()


def test_state_without_the_parameters_shape_is_not_touched() -> None:
    model, optimizer = trained(OPTIMIZERS["adam"])
    suspend_all(model, optimizer, groups_of(model), FILTERS)
    assert all(state["step"] == 3 for state in optimizer.state.values())


def test_the_state_of_several_optimisers() -> None:
    torch.manual_seed(0)
    model = Small()
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    both = [torch.optim.SGD(weights, 0.1, momentum=0.9), torch.optim.AdamW(others)]
    for optimizer in both:
        train_(model, optimizer, side=8, steps=2)
    groups = groups_of(model)
    before = [everything(model, optimizer) for optimizer in both]
    snapshots = suspend_all(model, both, groups, FILTERS)
    assert not both[0].state[model.inner.weight]["momentum_buffer"][FILTERS["inner"]].any()
    assert not both[1].state[model.inner_bn.weight]["exp_avg"][FILTERS["inner"]].any()
    restore_all(model, both, groups, snapshots)
    for optimizer, earlier in zip(both, before, strict=True):
        assert same(earlier, everything(model, optimizer))


@pytest.mark.parametrize("scope", SCOPES)
def test_suspension_zeroes_the_silencers_and_live_state_only(scope: Scope) -> None:
    model, optimizer = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    suspend_all(model, optimizer, groups_of(model, scope), FILTERS)
    assert not model.depthwise_bn.weight[FILTERS["expand"]].any()
    assert not model.depthwise_bn.bias[FILTERS["expand"]].any()
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)
    }
    norms = {"inner_bn", "depthwise_bn"}
    if scope != "inner":
        norms |= {"stem_bn", "outer_bn", "project_bn"}
    if scope == "coupled":
        norms |= {"shortcut_bn"}
    assert changed == {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")}
    momentum = optimizer.state[model.expand.weight]["momentum_buffer"]
    assert not momentum[FILTERS["expand"]].any()
    assert momentum[1].any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("network", "scope"), SMALL_NETWORKS_AND_SCOPES)
def test_suspended_is_physically_absent(network: str, scope: Scope, training: bool) -> None:
    """Outputs and gradients of the masked network are those of the network without the filters, in float64."""
    model, _ = trained(network=network)
    model.double()
    groups = groups_of(model, scope)
    filters = draw_filters(groups)
    suspend_all(model, (), groups, filters)
    plan = plan_of(model, groups, filters, scope)
    small = export(model, plan)
    losses = []
    for net in (model, small):
        net.train(training)
        net.zero_grad()
        losses.append(loss_on(net, side=8, seed=5))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
    gradients = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, masked in zip(gradients.parameters(), model.parameters(), strict=True):
            parameter.copy_(masked.grad)
    expected = dict(smaller_copy(gradients, groups, plan).named_parameters())
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_gradients_of_what_stays_by_hand() -> None:
    model, _ = trained()
    model.double()
    groups = groups_of(model)
    suspend_all(model, (), groups, FILTERS)
    small = export(model, plan_of(model, groups, FILTERS, "all"))
    for net in (model, small):
        net.train().zero_grad()
        loss_on(net, side=8, seed=5).backward()
    inner = [f for f in range(8) if f not in FILTERS["inner"]]
    stem = [f for f in range(6) if f not in FILTERS["stem"]]
    outer = [f for f in range(6) if f not in FILTERS["outer"]]
    for ours, theirs in [
        (small.linear.weight.grad, model.linear.weight.grad),
        (small.inner.weight.grad, model.inner.weight.grad[inner]),
        (small.outer.weight.grad, model.outer.weight.grad[outer][:, inner]),
        (small.stem.weight.grad, model.stem.weight.grad[stem]),
    ]:
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_filters_are_zero_and_their_weights_stay_zero_by_themselves(name: str) -> None:
    model, optimizer = trained(OPTIMIZERS[name])
    group = groups_of(model)[3]
    tensors = filter_tensors(model, group, optimizer)
    freeze_(tensors, [0, 9])
    parameters_and_state = tensors.parameters | tensors.state
    index = tensors.index([0, 9])
    assert not any(rows.take(index).any() for rows in parameters_and_state.values())
    for _ in range(3):
        optimizer.zero_grad()
        loss_on(model, side=8).backward()
        optimizer.step()
        with torch.no_grad():  # what the pruner's hook does
            for silencer in tensors.silencers:
                tensors.parameters[silencer].zero_(index)
    assert not model.expand.weight[[0, 9]].any()
    assert not model.depthwise.weight[[0, 9]].any()
    assert model.expand.weight[1].any()


@pytest.mark.parametrize(("network", "scope"), SMALL_NETWORKS_AND_SCOPES)
def test_a_mask_keeps_what_it_was_told_at_zero(network: str, scope: Scope) -> None:
    model, _ = trained(network=network)
    groups = groups_of(model, scope)
    tensors = {group.name: filter_tensors(model, group) for group in groups}
    mask = FilterMask(tensors)
    before = copy.deepcopy(model.state_dict())
    mask.hold_()
    assert same(before, model.state_dict())  # none is pruned yet
    assert mask.holds()
    filters = draw_filters(groups)
    mask.set_(filters)
    assert not mask.holds()
    mask.hold_()
    assert mask.holds()
    after = {name: entries_of(group, filters[name]) for name, group in tensors.items()}
    for name, group in tensors.items():
        others = sorted({*range(len(group.parameters[group.writers[0]].index))} - {*filters[name]})
        assert not any(after[name][silencer].any() for silencer in group.silencers)
        for key, now in entries_of(group, others).items():
            rows = group.everything[key]
            assert torch.equal(now, rows.take(group.index(others), before[key])), key
    mask.set_({group.name: [] for group in groups})
    assert mask.holds()


@pytest.mark.parametrize("scope", SCOPES)
def test_apply_silences_a_plan_made_elsewhere(scope: Scope) -> None:
    model, optimizer = trained()
    groups = groups_of(model, scope)
    plan = plan_of(model, groups, FILTERS, scope)
    untouched = copy.deepcopy(model)
    apply_(model, groups, plan, optimizer)
    export(model, plan)  # verifies itself
    live = [f for f in range(8) if f not in FILTERS["inner"]]
    assert torch.equal(model.inner.weight[live], untouched.inner.weight[live])
    assert not optimizer.state[model.inner.weight]["momentum_buffer"][FILTERS["inner"]].any()
