"""Taylor importance: what the loss would change by, to first order, squared, ranked over the whole network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.methods.taylor import Taylor, importance
from psap_core import macs
from psap_core.groups import SCOPES
from psap_core.schedule import make_schedule

BATCH = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, width in ((3, 8), (8, 12)):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers.append(nn.ReLU())
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return model


def taylor(model: nn.Module, target: float, epochs: int = 1, saved: list | None = None) -> Taylor:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = make_schedule(epochs, 1, epochs, epochs)
    save = (lambda *_: None) if saved is None else (lambda *step: saved.append(step))
    example = BATCH[0][:1].to(model[0].weight.dtype)
    return Taylor(model, optimizer, example, target, "all", schedule, save)


def train(model: nn.Module, method: Taylor, steps: int = 1) -> None:
    images, labels = BATCH
    for _ in range(steps):
        method.optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        method.optimizer.step()


def test_importance_is_the_square_of_the_first_order_change_of_the_loss():
    """(L(1) - L(1 - t)) / t of a filter whose affine shrinks, in float64."""
    model = network().double()
    method = taylor(model, 0.5)
    images, labels = BATCH[0].double(), BATCH[1]
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    norm, t = model[4], 1e-6
    found = importance(method.tensors["3"])
    for f in range(12):
        with torch.no_grad():
            before = norm.weight[f].clone(), norm.bias[f].clone()
            norm.weight[f] *= 1 - t
            norm.bias[f] *= 1 - t
            change = (loss - F.cross_entropy(model(images), labels)) / t
            norm.weight[f], norm.bias[f] = before
        assert found[f].item() == pytest.approx(change.item() ** 2, rel=1e-3, abs=1e-12)


def test_batches_are_summed_squares_not_the_square_of_a_sum():
    model = network()
    method = taylor(model, 0.5)
    squares = torch.zeros(8, dtype=torch.float64)

    def observe(*_: object) -> None:
        squares.add_(importance(method.tensors["0"]))

    handle = method.optimizer.register_step_pre_hook(observe)
    train(model, method, steps=3)
    handle.remove()
    assert torch.equal(method.sums["0"], squares)
    assert (squares > 0).all()


def test_the_least_important_of_the_whole_network_go_whatever_their_layer():
    model = network()
    method = taylor(model, 0.3)
    method.sums["0"].copy_(torch.arange(8, 0, -1) + 100.0)
    method.sums["3"].copy_(torch.arange(12.0))
    pruned = method.least_important(0.3)
    assert pruned["0"] == []
    assert pruned["3"] == list(range(len(pruned["3"])))
    method.sums["3"] += 1000.0
    pruned = method.least_important(0.3)
    assert pruned["3"] == []
    assert pruned["0"] == list(range(8 - len(pruned["0"]), 8))


def cost_with(method: Taylor, name: str) -> float:
    """Of the network with one filter of a group more."""
    kept = {part.name: part.kept for part in method.plan.layers}
    return method._cost({**kept, name: kept[name] + 1})


def test_the_budget_is_met_and_none_goes_in_vain():
    for target in (0.2, 0.5, 0.8):
        model = network()
        method = taylor(model, target)
        train(model, method)
        budget = (1 - target) * macs(model, BATCH[0][:1])
        method.end_epoch(1)
        assert method.plan.macs <= budget
        for part in method.plan.layers:
            assert not part.pruned or cost_with(method, part.name) > budget


def test_in_many_small_steps_nothing_comes_back():
    """A step may be met already, where a large filter overshot the one before."""
    model = network()
    method = taylor(model, 0.8, epochs=70)
    draw = torch.Generator().manual_seed(0)
    before: dict[str, set[int]] = {name: set() for name in method.sums}
    dense = macs(model, BATCH[0][:1])
    for epoch in range(1, 71):
        for sums in method.sums.values():
            sums.copy_(torch.rand(len(sums), generator=draw))
        method.end_epoch(epoch)
        for name, filters in method.plan.pruned.items():
            assert before[name] <= {*filters}
            before[name] = {*filters}
        cut = 0.8 * method.schedule.ramp(epoch)
        assert method.plan.macs <= (1 - cut) * dense


def test_observation_ends_with_the_last_step():
    model = network()
    method = taylor(model, 0.5)
    train(model, method)
    method.end_epoch(1)
    train(model, method)
    assert not any(sums.any() for sums in method.sums.values())


def test_what_is_pruned_stays_pruned_and_silent_while_the_cut_grows():
    model, saved = network(), []
    method = taylor(model, 0.6, epochs=3, saved=saved)
    before: dict[str, set[int]] = {name: set() for name in method.sums}
    for epoch in (1, 2, 3):
        train(model, method, steps=2)
        method.end_epoch(epoch)
        for name, filters in method.plan.pruned.items():
            assert before[name] <= {*filters}
            before[name] = {*filters}
        train(model, method)
        for index, name in ((1, "0"), (4, "3")):
            gone = [*method.plan.pruned[name]]
            assert not model[index].weight[gone].any()
            assert not model[index].bias[gone].any()
    assert [epoch for kind, epoch, _ in saved if kind == "plans"] == [1, 2, 3]


@pytest.mark.parametrize("scope", SCOPES)
def test_a_target_that_no_network_reaches_is_refused_before_training(scope):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    schedule = make_schedule(1, 1, 1, 1)
    with pytest.raises(ValueError, match="unreachable"):
        Taylor(model, optimizer, BATCH[0][:1], 0.999, scope, schedule, lambda *_: None)
