"""Eq. 5: what the pulse measures is the loss reduction of giving a filter back, and it leaves no trace."""

import pytest
import torch

from psap_core import (
    InputError,
    Snapshot,
    Supervision,
    filter_tensors,
    find_layers,
    pulse,
    suspend_,
)
from tests.core.networks import Small, loss_on, sgd, small_example, train_
from tests.core.test_suspension import everything

# One inner, one residual, the stem, one whose affine comes behind a depthwise convolution.
ONE_OF_EACH = {"inner": 1, "outer": 3, "stem": 2, "expand": 4}
SUSPENDED = {"stem": [2], "inner": [1, 5], "outer": [3], "expand": [4], "project": [], "last": []}


def suspended_network(dtype=torch.float64, suspended=SUSPENDED):
    torch.manual_seed(0)
    model = Small()
    optimizer = sgd(model)
    train_(model, optimizer, side=8, steps=10)
    model.to(dtype)
    layers = find_layers(model, small_example().to(dtype))
    tensors = {layer.name: filter_tensors(model, layer, optimizer) for layer in layers}
    snapshots = {
        name: suspend_(tensors[name], filters, Snapshot()) for name, filters in suspended.items()
    }
    return model, optimizer, tensors, snapshots


def supervise(model, tensors, snapshots, batches=2, losses=None) -> Supervision:
    make_losses = losses or (
        lambda: (loss_on(model, side=8, batch=64, seed=seed) for seed in range(batches))
    )
    return pulse(model, tensors, snapshots, make_losses, batches)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "f"), ONE_OF_EACH.items())
def test_utility_is_the_loss_reduction_of_giving_a_filter_back(
    name: str, f: int, training: bool
) -> None:
    """u_f equals (L(0) - L(t * saved)) / t for small t, to 1 %, in float64; it is not zero."""
    suspended = dict.fromkeys(SUSPENDED, ()) | {name: (f,)}
    model, _, tensors, snapshots = suspended_network(suspended=suspended)
    model.train(training)
    seen = supervise(model, tensors, snapshots)
    t, layer = 1e-4, tensors[name]
    reductions = []
    for seed in range(2):
        with torch.no_grad():
            without = loss_on(model, side=8, batch=64, seed=seed)
            for key in layer.affine:
                layer.parameters[key][f] = t * snapshots[name].rows[key][0]
            back = loss_on(model, side=8, batch=64, seed=seed)
            layer.gamma[f] = layer.beta[f] = 0.0
        reductions.append(((without - back) / t).item())
    mean, error = seen.utility[name][f]
    expected = torch.tensor(reductions)
    assert abs(mean) > 1e-4
    close = {"abs": 1e-2 * expected.abs().max().item()}
    assert mean == pytest.approx(expected.mean().item(), **close)
    assert error == pytest.approx((expected.std() / 2**0.5).item(), **close)


def test_gradient_norms_are_those_of_the_affine() -> None:
    model, _, tensors, snapshots = suspended_network()
    seen = supervise(model, tensors, snapshots)
    assert seen.grad_norm_live.keys() == SUSPENDED.keys()
    assert seen.grad_norm_suspended.keys() == {
        name for name, filters in SUSPENDED.items() if filters
    }
    norms = []
    for seed in range(2):
        model.zero_grad()
        loss_on(model, side=8, batch=64, seed=seed).backward()
        norms.append(torch.hypot(model.last_bn.weight.grad, model.last_bn.bias.grad).mean())
    assert seen.grad_norm_live["last"] == pytest.approx(torch.stack(norms).mean().item(), rel=1e-2)


def test_the_pulse_leaves_no_trace() -> None:
    model, optimizer, tensors, snapshots = suspended_network(torch.float32)
    model.last_bn.eval()
    before, generator = everything(model, optimizer), torch.get_rng_state()
    modes = [module.training for module in model.modules()]

    def losses():
        for _ in range(3):
            yield loss_on(model, side=8) + 0 * torch.rand(())

    supervise(model, tensors, snapshots, 3, losses)
    after = everything(model, optimizer)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(generator, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_do_not_add_up_over_batches() -> None:
    model, _, tensors, snapshots = suspended_network()
    loss_on(model, side=8).backward()  # left over from training
    one = supervise(
        model, tensors, snapshots, 2, lambda: (loss_on(model, side=8, seed=7) for _ in range(2))
    )
    mean, error = one.utility["stem"][2]
    many = supervise(
        model, tensors, snapshots, 6, lambda: (loss_on(model, side=8, seed=7) for _ in range(6))
    )
    assert many.utility["stem"][2][0] == pytest.approx(mean, rel=1e-9)
    assert error == pytest.approx(0, abs=1e-12)


def test_no_more_batches_are_made_than_asked_for() -> None:
    model, _, tensors, snapshots = suspended_network()
    made = []

    def losses():
        for seed in range(100):
            made.append(seed)
            yield loss_on(model, side=8, seed=seed)

    supervise(model, tensors, snapshots, 4, losses)
    assert made == [0, 1, 2, 3]


@pytest.mark.parametrize("batches", [0, 1])
def test_fewer_than_two_losses(batches: int) -> None:
    model, optimizer, tensors, snapshots = suspended_network()
    before = everything(model, optimizer)
    with pytest.raises(InputError, match=f"at least 2 losses .* made {batches}"):
        supervise(
            model, tensors, snapshots, 5, lambda: (loss_on(model, side=8) for _ in range(batches))
        )
    assert all(torch.equal(before[key], now) for key, now in everything(model, optimizer).items())


def test_a_loss_that_is_not_finite() -> None:
    model, _, tensors, snapshots = suspended_network()
    with pytest.raises(InputError, match="not finite"):
        supervise(
            model,
            tensors,
            snapshots,
            2,
            lambda: (loss_on(model, side=8) * float("nan") for _ in range(2)),
        )


def test_a_layer_without_a_gradient() -> None:
    model, optimizer, tensors, snapshots = suspended_network()
    before = everything(model, optimizer)
    other, *_ = suspended_network()
    with pytest.raises(InputError, match="'stem' got no gradient"):
        supervise(model, tensors, snapshots, 2, lambda: (loss_on(other, side=8) for _ in range(2)))
    model.inner_bn.bias.requires_grad_(False)
    with pytest.raises(InputError, match="'inner' got no gradient: it is frozen"):
        supervise(model, tensors, snapshots)
    assert all(torch.equal(before[key], now) for key, now in everything(model, optimizer).items())


def test_an_interrupted_pulse_is_undone() -> None:
    model, optimizer, tensors, snapshots = suspended_network()
    before = everything(model, optimizer)

    def losses():
        yield loss_on(model, side=8)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise(model, tensors, snapshots, 5, losses)
    assert all(torch.equal(before[key], now) for key, now in everything(model, optimizer).items())


def test_the_pulse_runs_without_autocast_and_with_gradients() -> None:
    model, _, tensors, snapshots = suspended_network(torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = supervise(model, tensors, snapshots)
    assert inside == supervise(model, tensors, snapshots)
