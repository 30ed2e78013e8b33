"""Eq. 4, 6, 7: suspended filters are absent, come back bit for bit, and stay away when frozen."""

import copy

import pytest
import torch
from torch import nn

from psap_core import apply_, export, find_layers, macs_cost_model, make_plan
from psap_core.suspension import Snapshot, filter_tensors, freeze_, restore_, suspend_
from tests.core.networks import Small, loss_on, sgd, small_example, train_

OPTIMIZERS = {
    "sgd_nesterov": sgd,
    "sgd_plain": lambda model: torch.optim.SGD(model.parameters(), 0.1),
    "adam": lambda model: torch.optim.Adam(model.parameters()),
    "adamw_amsgrad": lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), momentum=0.5, centered=True),
}
FILTERS = {
    "stem": [0, 3],
    "inner": [1, 2, 7],
    "outer": [5],
    "expand": [0, 4, 9],
    "project": [6],
    "last": [],
}


def trained(make_optimizer=sgd, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Small()
    optimizer = make_optimizer(model)
    train_(model, optimizer, side=8, steps=steps)
    return model, optimizer


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{index}.{k}": v.clone()
            for k, v in state.items()
            if isinstance(v, torch.Tensor)
        }
    return tensors


def suspend_all(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, filters=FILTERS
) -> dict[str, Snapshot]:
    layers = find_layers(model, small_example().to(next(model.parameters())))
    return {
        x.name: suspend_(filter_tensors(model, x, optimizer), filters[x.name], Snapshot())
        for x in layers
    }


def restore_all(model, optimizer, snapshots) -> None:
    for layer in find_layers(model, small_example()):
        restore_(filter_tensors(model, layer, optimizer), snapshots[layer.name])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restore_after_suspend_is_bit_identical(name: str) -> None:
    model, optimizer = trained(OPTIMIZERS[name])
    before = everything(model, optimizer)
    snapshots = suspend_all(model, optimizer)
    assert any(
        not torch.equal(before[key], now) for key, now in everything(model, optimizer).items()
    )
    restore_all(model, optimizer, snapshots)
    after = everything(model, optimizer)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_everything_of_a_filter_comes_back_after_training_went_on() -> None:
    model, optimizer = trained()
    layers = {layer.name: layer for layer in find_layers(model, small_example())}
    rows = {
        (layer, name): tensor[FILTERS[layer]].clone()
        for layer, unit in layers.items()
        for part in (filter_tensors(model, unit, optimizer),)
        for name, tensor in (part.parameters | part.buffers | part.state).items()
    }
    assert ("expand", "depthwise.weight:momentum_buffer") in rows
    assert ("expand", "expand_bn.running_var") in rows
    assert ("inner", "inner.bias") in rows
    snapshots = suspend_all(model, optimizer)
    train_(model, optimizer, side=8, steps=2)
    restore_all(model, optimizer, snapshots)
    for layer, unit in layers.items():
        part = filter_tensors(model, unit, optimizer)
        for name, tensor in (part.parameters | part.buffers | part.state).items():
            assert torch.equal(tensor[FILTERS[layer]], rows[layer, name]), (layer, name)


def test_optimiser_state_that_did_not_exist_yet_counts_as_zero() -> None:
    torch.manual_seed(0)
    model = Small()
    optimizer = sgd(model)
    snapshots = suspend_all(model, optimizer)
    train_(model, optimizer, side=8, steps=1)
    # A filter suspended later has state; the ones suspended before must still come back with zero.
    late = {name: [2] if name == "stem" else [] for name in FILTERS}
    stem = find_layers(model, small_example())[0]
    tensors = filter_tensors(model, stem, optimizer)
    momentum = tensors.state["stem.weight:momentum_buffer"][2].clone()
    snapshot = suspend_(tensors, late["stem"], snapshots["stem"])
    train_(model, optimizer, side=8, steps=1)
    restore_(tensors, snapshot.select([3, 0, 2]))
    assert torch.equal(tensors.state["stem.weight:momentum_buffer"][2], momentum)
    assert not tensors.state["stem.weight:momentum_buffer"][[0, 3]].any()


def test_state_without_the_parameters_shape_is_not_touched() -> None:
    model, optimizer = trained(OPTIMIZERS["adam"])
    suspend_all(model, optimizer)
    assert all(state["step"] == 3 for state in optimizer.state.values())


def test_suspension_zeroes_the_last_affine_and_live_state_only() -> None:
    model, optimizer = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    suspend_all(model, optimizer)
    assert not model.depthwise_bn.weight[FILTERS["expand"]].any()
    assert not model.depthwise_bn.bias[FILTERS["expand"]].any()
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(before[name], tensor)
    }
    affines = {"stem_bn", "inner_bn", "outer_bn", "depthwise_bn", "project_bn"}
    assert changed == {f"{bn}.{part}" for bn in affines for part in ("weight", "bias")}
    momentum = optimizer.state[model.expand.weight]["momentum_buffer"]
    assert not momentum[FILTERS["expand"]].any()
    assert momentum[1].any()


@pytest.mark.parametrize("training", [True, False])
def test_suspended_is_physically_absent(training: bool) -> None:
    """Outputs and gradients of the masked network are those of the network without the filters, in float64."""
    torch.manual_seed(0)
    model = Small()
    train_(model, sgd(model), side=8, steps=3)
    model.double()
    suspend_all(model, None)
    example = small_example().double()
    layers = find_layers(model, example)
    small = export(
        model, make_plan(layers, FILTERS, macs_cost_model(model, layers, example), (3, 8, 8))
    )
    model.train(training)
    small.train(training)
    model.zero_grad()
    loss, small_loss = (loss_on(net, side=8, seed=5) for net in (model, small))
    torch.testing.assert_close(small_loss, loss, rtol=1e-12, atol=1e-12)
    loss.backward()
    small_loss.backward()
    torch.testing.assert_close(
        small.linear.weight.grad, model.linear.weight.grad, rtol=1e-9, atol=1e-12
    )
    kept = [f for f in range(8) if f not in FILTERS["inner"]]
    stem = [f for f in range(6) if f not in FILTERS["stem"]]
    torch.testing.assert_close(
        small.inner.weight.grad, model.inner.weight.grad[kept], rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        small.stem.weight.grad, model.stem.weight.grad[stem], rtol=1e-9, atol=1e-12
    )


def test_frozen_filters_are_zero_and_their_weights_stay_zero_by_themselves() -> None:
    model, optimizer = trained()
    layer = find_layers(model, small_example())[3]
    tensors = filter_tensors(model, layer, optimizer)
    freeze_(tensors, [0, 9])
    assert not any(tensor[[0, 9]].any() for tensor in (tensors.parameters | tensors.state).values())
    for _ in range(3):
        optimizer.zero_grad()
        loss_on(model, side=8).backward()
        optimizer.step()
        with torch.no_grad():  # what the pruner's hook does
            tensors.gamma[[0, 9]] = 0.0
            tensors.beta[[0, 9]] = 0.0
    assert not model.expand.weight[[0, 9]].any()
    assert not model.depthwise.weight[[0, 9]].any()
    assert model.expand.weight[1].any()


def test_apply_silences_a_plan_made_elsewhere() -> None:
    model, optimizer = trained()
    layers = find_layers(model, small_example())
    plan = make_plan(layers, FILTERS, macs_cost_model(model, layers, small_example()), (3, 8, 8))
    untouched = copy.deepcopy(model)
    apply_(model, layers, plan, optimizer)
    export(model, plan)  # verifies itself
    live = [f for f in range(8) if f not in FILTERS["inner"]]
    assert torch.equal(model.inner.weight[live], untouched.inner.weight[live])
    assert not optimizer.state[model.inner.weight]["momentum_buffer"][FILTERS["inner"]].any()
