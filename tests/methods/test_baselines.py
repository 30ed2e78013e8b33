"""The peers: what they choose on given weights, computed a second time from their papers, and what training leaves."""

import copy
import json

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import nn

from experiments import models, train
from experiments.methods.fpgm import FPGM, summed_distances
from experiments.methods.one_shot import OneShot
from experiments.methods.registry import entries
from experiments.methods.sfp import SFP
from experiments.methods.uniform import UniformMethod, lowest
from experiments.schema import Fan, ResNetConfig, Shortcut
from psap_core import export, export_error, macs, params
from tests.helpers import METHODS as ALL_METHODS
from tests.helpers import small

RESNET20 = ResNetConfig("resnet20", 0.5, None, Fan("in"), Shortcut.option_a)
METHODS = ("sfp", "fpgm", "l1", "l2", "random")
SCOPES = ("all", "coupled")


def keep(kind: str, epochs_done: int, text: str) -> None:
    """Instead of the run folder."""


def make(method: str, model, optimizer, example, scope: str = "all") -> UniformMethod:
    if method == "sfp":
        return SFP(model, optimizer, example, 0.5, scope, 4, 1, keep)
    if method == "fpgm":
        return FPGM(model, optimizer, example, 0.5, scope, keep)
    return OneShot(model, optimizer, example, 0.5, scope, method, 1, 0, keep)


class Training:
    """A small network in training with a method, three steps old."""

    def __init__(self, method: str, momentum: float = 0.9, scope: str = "all") -> None:
        torch.manual_seed(0)
        self.model = models.build(RESNET20, 1, 10)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            0.1,
            momentum=momentum,
            nesterov=momentum > 0,
            weight_decay=5e-4,
        )
        self.images, self.labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
        self.method = make(method, self.model, self.optimizer, self.images[:1], scope)
        self.steps(3)

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
            self.optimizer.step()
            self.method.after_step()

    def written(self) -> dict[str, list[torch.Tensor]]:
        """The live weights [O, I, kH, kW] that write each group's channels: of all layers that do."""
        writers = {group.name: group.writers for group in self.method.groups}
        return {
            name: [self.model.get_parameter(entries.tensor).detach() for entries in of_group]
            for name, of_group in writers.items()
        }

    def pruned_weights(self) -> list[torch.Tensor]:
        """The weights [n, I, kH, kW] of every group's pruned filters, by layer."""
        pruned = self.method.plan.pruned
        return [w[[*pruned[name]]] for name, weights in self.written().items() for w in weights]


def chosen_by_numpy(method: str, weights: list[torch.Tensor], count: int) -> set[int]:
    joined = 0.0
    for weight in weights:
        filters = weight.double().flatten(1).numpy()
        scores = {
            "sfp": np.sqrt((filters**2).sum(1)),
            "l2": np.sqrt((filters**2).sum(1)),
            "l1": np.abs(filters).sum(1),
            "fpgm": cdist(filters, filters).sum(1),
        }[method]
        joined = joined + (scores / scores.mean()) ** 2
    return set(sorted(range(len(joined)), key=lambda f: (joined[f], f))[:count])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", ["sfp", "fpgm", "l1", "l2"])
def test_the_choice_is_that_of_an_independent_computation(method, scope):
    training = Training(method, scope=scope)
    before = copy.deepcopy(training.written())
    assert max(map(len, before.values())) == (4 if scope == "coupled" else 1)
    counts = training.method.counts(0.5)
    assert min(counts) > 0
    training.method.end_epoch(1)
    for (name, weights), count in zip(before.items(), counts, strict=True):
        found = {*training.method.plan.pruned[name]}
        assert found == chosen_by_numpy(method, weights, count), name


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", ["sfp", "fpgm", "l1", "l2"])
def test_ties_go_to_the_first_filter(method, scope):
    """Half of the filters are copies of the other half, in another order."""
    training = Training(method, scope=scope)
    for weights in training.written().values():
        for weight in weights:
            half = len(weight) // 2
            weight[half:] = weight[:half].flip(0)
    before = copy.deepcopy(training.written())
    training.method.end_epoch(1)
    for (name, weights), count in zip(before.items(), training.method.counts(0.5), strict=True):
        found = {*training.method.plan.pruned[name]}
        assert found == chosen_by_numpy(method, weights, count), name


def test_the_geometric_median_is_found_by_hand():
    """Filters at 0, 1, 2 and 10 on a line: sums of distances 13, 11, 11 and 27."""
    weight = torch.tensor([0.0, 1.0, 2.0, 10.0]).reshape(4, 1, 1, 1)
    assert summed_distances(weight).tolist() == [13, 11, 11, 27]
    assert lowest(summed_distances(weight), 2) == [1, 2]
    assert lowest(summed_distances(weight), 3) == [1, 2, 0]


def test_the_random_choice_comes_from_the_seed_alone():
    def drawn(seed: int, scale: float) -> dict:
        torch.manual_seed(int(scale))
        model = models.build(RESNET20, 1, 10)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= scale
        example = torch.zeros(1, 1, 8, 8)
        optimizer = torch.optim.SGD(model.parameters())
        method = OneShot(model, optimizer, example, 0.5, "all", "random", 1, seed, keep)
        method.end_epoch(1)
        return method.plan.pruned

    assert drawn(0, 1.0) == drawn(0, 3.0) != drawn(1, 1.0)


@pytest.mark.parametrize("scope", SCOPES)
def test_fpgm_masks_gradients_so_that_filters_do_not_come_back(scope):
    training = Training("fpgm", momentum=0.0, scope=scope)
    training.method.end_epoch(1)
    first = training.method.plan.pruned
    training.steps(3)
    assert all(not weight.any() for weight in training.pruned_weights())
    training.method.end_epoch(2)
    assert training.method.plan.pruned == first


@pytest.mark.parametrize("scope", SCOPES)
def test_sfp_does_not_mask_them(scope):
    training = Training("sfp", momentum=0.0, scope=scope)
    training.method.end_epoch(1)
    assert all(not weight.any() for weight in training.pruned_weights())
    training.steps(1)
    assert any(weight.any() for weight in training.pruned_weights())


@pytest.mark.parametrize("method", ["sfp", "fpgm"])
def test_the_export_keeps_the_constants_of_residual_filters_and_drops_those_of_inner_ones(method):
    training = Training(method)
    training.method.end_epoch(1)
    model, plan = training.model.eval(), training.method.plan
    norms = {
        group.name: model.get_submodule(group.name.replace("conv", "bn"))
        for group in training.method.groups
    }
    before = {
        name: norm.bias[[*plan.pruned[name]]].detach().clone() for name, norm in norms.items()
    }
    assert all(beta.any() for beta in before.values() if len(beta))
    training.method.finish()
    for group in training.method.groups:
        assert (group.scattered is not None) == (not group.name.endswith(".conv1"))
        left = norms[group.name].bias[[*plan.pruned[group.name]]]
        assert torch.equal(left, before[group.name] * (group.scattered is not None))
    small = export(model, plan)
    torch.testing.assert_close(small(training.images), model(training.images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_in_scope_coupled_the_budget_is_met_and_the_exported_network_is_the_masked_one(method):
    training = Training(method, scope="coupled")
    model, example = training.model, training.images[:1]
    dense = macs(model, example)
    training.method.end_epoch(1)
    training.steps(2)
    training.method.finish()
    plan = training.method.plan
    assert plan.scope == "coupled"
    assert len(plan.layers) == 12
    small = export(model, plan)
    assert macs(small, example) == plan.macs <= 0.5 * dense
    assert export_error(model, small, plan) < 1e-12
    assert {type(module) for module in small.modules()} == {*map(type, model.modules())}
    width = plan.layers[0].kept
    assert small.conv1.out_channels == small.layer1[2].conv2.out_channels == width < 8


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("method", ["l1", "random"])
def test_one_shot_prunes_once_and_for_good(method, scope):
    training = Training(method, scope=scope)
    training.method.end_epoch(1)
    plan = training.method.plan
    assert plan.macs_cut >= 0.5
    training.steps(3)
    assert training.method.end_epoch(2) == {}
    assert training.method.plan == plan
    assert all(not weight.any() for weight in training.pruned_weights())
    small = export(training.model, plan)  # silent already: no apply_ is needed
    assert macs(small, training.images[:1]) == plan.macs


@pytest.mark.parametrize("scope", SCOPES)
def test_one_shot_goes_on_silencing_after_a_resume(scope):
    first = Training("l1", scope=scope)
    first.method.end_epoch(1)
    training = Training("random", scope=scope)
    training.model.load_state_dict(first.model.state_dict())
    training.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    training.method.load_state_dict(first.method.state_dict())
    for either in (first, training):
        either.steps(2)
    export(training.model, training.method.plan)
    for tensor, other in zip(
        [*training.model.parameters(), *training.model.buffers()],
        [*first.model.parameters(), *first.model.buffers()],
        strict=True,
    ):
        assert torch.equal(tensor, other)


def test_fpgm_goes_on_masking_gradients_after_a_resume():
    training = Training("fpgm")
    training.method.end_epoch(1)
    state = training.method.state_dict()
    training = Training("fpgm")
    training.method.load_state_dict(state)
    training.steps(1)
    pruned = training.method.plan.pruned
    assert any(pruned.values())
    for name, filters in pruned.items():
        gradient = training.model.get_submodule(name).weight.grad
        assert [f for f in range(len(gradient)) if not gradient[f].any()] == list(filters)


def test_a_run_that_began_before_there_was_compaction_continues():
    first = Training("l1")
    first.method.end_epoch(1)
    state = {"plan": first.method.state_dict()["plan"]}
    training = Training("l1")
    training.method.load_state_dict(state)
    assert training.method.plan == first.method.plan
    assert not training.method.is_compact


def test_asfp_asks_for_more_from_epoch_to_epoch():
    training = Training("sfp")
    ramped = SFP(training.model, training.optimizer, training.images[:1], 0.5, "all", 6, 4, keep)
    cuts = [ramped.end_epoch(epoch)["psap/macs_cut"] for epoch in range(1, 7)]
    assert cuts[:4] == sorted(cuts[:4])
    assert len({*cuts[:4]}) > 2
    assert cuts[3] == cuts[4] == cuts[5] == training.method.end_epoch(1)["psap/macs_cut"]


@pytest.mark.parametrize(
    ("start", "epochs", "file"),
    [
        ("run", 2, "epoch_0000.json"),
        pytest.param(None, 4, "epoch_0002.json", marks=pytest.mark.long),
        pytest.param(None, 1, "epoch_0001.json", marks=pytest.mark.long),
    ],
)
def test_one_shot_prunes_a_fresh_network_halfway_and_a_pretrained_one_at_once(
    start, epochs, file, tmp_path
):
    overrides = [f"epochs={epochs}"]
    if start is not None:
        overrides.append(
            f"model.weights={train.run(small(tmp_path / 'start', 'dense', 'epochs=1'))}/export"
        )
    folder = train.run(small(tmp_path / "runs", "l1", *overrides))
    assert [path.name for path in (folder / "plans").iterdir()] == [file]
    start_top1 = json.loads((folder / "summary.json").read_text())["start_top1"]
    assert (start_top1 is None) == (start is None)


@pytest.mark.long
def test_thin_plan_trains_the_architecture_of_another_run_from_fresh_weights(tmp_path, monkeypatch):
    source = train.run(small(tmp_path, "psap", "method.scope=all"))  # whose export has constants
    weights = []
    initialise_ = models.initialise_

    def remember(model: nn.Module, fan: Fan, name: str = "") -> None:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        initialise_(model, fan, name)
        weights.append(
            (before, {name: tensor.clone() for name, tensor in model.state_dict().items()})
        )

    monkeypatch.setattr("experiments.models.initialise_", remember)
    folder = train.run(small(tmp_path, "thin_plan", f"method.run={source}"))
    pruned, thin = (json.loads((run / "summary.json").read_text()) for run in (source, folder))
    assert (thin["macs"], thin["macs_cut"], thin["params"]) == (
        pruned["macs"],
        pruned["macs_cut"],
        pruned["params"],
    )
    assert thin["train_macs"] < pruned["train_macs"]
    network, _ = models.open_exported(folder / "export")
    exported = network.state_dict()
    assert any(name.endswith("constant") for name in exported)
    (before, after) = next(pair for pair in weights if pair[1].keys() == exported.keys())
    for name, tensor in after.items():
        if name.endswith(("bn1.weight", "bn2.weight")):
            assert (tensor == 1).all()
        elif tensor.ndim == 4:
            assert tensor.std() == pytest.approx((2 / tensor[0].numel()) ** 0.5, rel=0.5)
            assert not torch.equal(tensor, before[name])
    assert params(network) == thin["params"]


def test_fresh_weights_leave_no_constant_of_a_residual_filter():
    training = Training("sfp")
    training.method.end_epoch(1)
    training.method.finish()
    thin = export(training.model, training.method.plan)
    constants = [tensor for name, tensor in thin.named_buffers() if name.endswith("constant")]
    assert any(constant.any() for constant in constants)
    models.initialise_(thin, Fan("in"))
    assert not any(constant.any() for constant in constants)


def test_every_method_is_tested():
    """Name a new one in METHODS of tests/helpers.py, and it runs through the tests of all methods."""
    of_their_own = {"thin_plan", "psap_variant", "taylor_one_shot"}
    assert set(entries()) == {*ALL_METHODS, *of_their_own}
