"""The peers: what they choose on given weights, computed a second time from their papers, and what training leaves."""

import json

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import nn

from experiments import train
from experiments.baselines.fpgm import FPGM, summed_distances
from experiments.baselines.one_shot import OneShot
from experiments.baselines.sfp import SFP
from experiments.baselines.uniform import UniformMethod, lowest
from experiments.harness import models
from experiments.methods import CONFIGS
from experiments.schema import Fan, ResNetConfig, Shortcut
from psap_core import export, macs, params
from tests.harness.helpers import small

RESNET20 = ResNetConfig("resnet20", 0.5, None, Fan("in"), Shortcut.option_a)
MAKERS = {
    "sfp": lambda model, optimizer, example: SFP(model, example, 0.5, 4, 1, keep),
    "fpgm": lambda model, optimizer, example: FPGM(model, optimizer, example, 0.5, keep),
    "l1": lambda model, optimizer, example: OneShot(
        model, optimizer, example, 0.5, "l1", 1, 0, keep
    ),
    "l2": lambda model, optimizer, example: OneShot(
        model, optimizer, example, 0.5, "l2", 1, 0, keep
    ),
    "random": lambda model, optimizer, example: OneShot(
        model, optimizer, example, 0.5, "random", 1, 0, keep
    ),
}


def keep(kind: str, epochs_done: int, text: str) -> None:
    """Instead of the run folder."""


class Training:
    """A small network in training with a method, three steps old."""

    def __init__(self, method: str, momentum: float = 0.9) -> None:
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
        self.method: UniformMethod = MAKERS[method](self.model, self.optimizer, self.images[:1])
        self.steps(3)

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
            self.optimizer.step()
            self.method.after_step()

    def pruned_weights(self) -> dict[str, torch.Tensor]:
        """The weights [n, I, kH, kW] of every layer's pruned filters."""
        return {
            name: self.method.weights[name][list(f)].detach()
            for name, f in self.method.plan.pruned.items()
        }


def chosen_by_numpy(method: str, weight: torch.Tensor, count: int) -> set[int]:
    filters = weight.detach().double().flatten(1).numpy()
    scores = {
        "sfp": np.sqrt((filters**2).sum(1)),
        "l2": np.sqrt((filters**2).sum(1)),
        "l1": np.abs(filters).sum(1),
        "fpgm": cdist(filters, filters).sum(1),
    }[method]
    return set(sorted(range(len(scores)), key=lambda f: (scores[f], f))[:count])


@pytest.mark.parametrize("method", ["sfp", "fpgm", "l1", "l2"])
def test_the_choice_is_that_of_an_independent_computation(method):
    training = Training(method)
    before = {name: weight.detach().clone() for name, weight in training.method.weights.items()}
    counts = training.method.counts(0.5)
    assert min(counts) > 0
    training.method.end_epoch(1)
    for (name, weight), count in zip(before.items(), counts, strict=True):
        assert set(training.method.plan.pruned[name]) == chosen_by_numpy(method, weight, count), (
            name
        )


@pytest.mark.parametrize("method", ["sfp", "fpgm", "l1", "l2"])
def test_ties_go_to_the_first_filter(method):
    """Half of the filters are copies of the other half, in another order."""
    training = Training(method)
    with torch.no_grad():
        for weight in training.method.weights.values():
            half = len(weight) // 2
            weight[half:] = weight[:half].flip(0)
    before = {name: weight.detach().clone() for name, weight in training.method.weights.items()}
    training.method.end_epoch(1)
    for (name, weight), count in zip(before.items(), training.method.counts(0.5), strict=True):
        assert set(training.method.plan.pruned[name]) == chosen_by_numpy(method, weight, count), (
            name
        )


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
        method = OneShot(
            model, torch.optim.SGD(model.parameters()), example, 0.5, "random", 1, seed, keep
        )
        method.end_epoch(1)
        return method.plan.pruned

    assert drawn(0, 1.0) == drawn(0, 3.0) != drawn(1, 1.0)


def test_fpgm_masks_gradients_so_that_filters_do_not_come_back():
    training = Training("fpgm", momentum=0.0)
    training.method.end_epoch(1)
    first = training.method.plan.pruned
    training.steps(3)
    assert all(not weight.any() for weight in training.pruned_weights().values())
    training.method.end_epoch(2)
    assert training.method.plan.pruned == first


def test_sfp_does_not_mask_them():
    training = Training("sfp", momentum=0.0)
    training.method.end_epoch(1)
    training.steps(1)
    assert any(weight.any() for weight in training.pruned_weights().values())


@pytest.mark.parametrize("method", ["sfp", "fpgm"])
def test_the_export_keeps_the_constants_of_residual_filters_and_drops_those_of_inner_ones(method):
    training = Training(method)
    training.method.end_epoch(1)
    model, plan = training.model.eval(), training.method.plan
    affines = {layer.name: model.get_submodule(layer.affine) for layer in training.method.layers}
    before = {
        name: norm.bias[[*plan.pruned[name]]].detach().clone() for name, norm in affines.items()
    }
    assert all(beta.any() for beta in before.values() if len(beta))
    training.method.finish()
    for layer in training.method.layers:
        left = affines[layer.name].bias[[*plan.pruned[layer.name]]]
        assert torch.equal(left, before[layer.name] * (layer.role == "residual"))
    small = export(model, plan)
    torch.testing.assert_close(small(training.images), model(training.images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["l1", "random"])
def test_one_shot_prunes_once_and_for_good(method):
    training = Training(method)
    training.method.end_epoch(1)
    plan = training.method.plan
    assert plan.macs_cut >= 0.5
    training.steps(3)
    assert training.method.end_epoch(2) == {}
    assert training.method.plan == plan
    assert all(not weight.any() for weight in training.pruned_weights().values())
    small = export(training.model, plan)  # silent already: no apply_ is needed
    assert macs(small, training.images[:1]) == plan.macs


def test_one_shot_goes_on_silencing_after_a_resume():
    training = Training("l1")
    training.method.end_epoch(1)
    state = training.method.state_dict()
    model, optimizer = training.model, training.optimizer
    training.method = MAKERS["l1"](model, optimizer, training.images[:1])
    training.method.load_state_dict(state)
    training.steps(2)
    export(model, training.method.plan)


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


def test_asfp_asks_for_more_from_epoch_to_epoch():
    training = Training("sfp")
    ramped = SFP(training.model, training.images[:1], 0.5, 6, 4, keep)
    cuts = [ramped.end_epoch(epoch)["psap/macs_cut"] for epoch in range(1, 7)]
    assert cuts[:4] == sorted(cuts[:4])
    assert len({*cuts[:4]}) > 2
    assert cuts[3] == cuts[4] == cuts[5] == training.method.end_epoch(1)["psap/macs_cut"]


@pytest.mark.parametrize(
    ("start", "epochs", "file"),
    [(None, 4, "epoch_0002.json"), (None, 1, "epoch_0001.json"), ("run", 2, "epoch_0000.json")],
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


def test_thin_plan_trains_the_architecture_of_another_run_from_fresh_weights(tmp_path, monkeypatch):
    source = train.run(small(tmp_path, "psap"))
    weights = []
    initialise_ = models.initialise_

    def remember(model: nn.Module, fan: Fan, name: str = "") -> None:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        initialise_(model, fan, name)
        weights.append(
            (before, {name: tensor.clone() for name, tensor in model.state_dict().items()})
        )

    monkeypatch.setattr("experiments.harness.models.initialise_", remember)
    folder = train.run(small(tmp_path, "thin_plan", f"method.run={source}"))
    pruned, thin = (json.loads((run / "summary.json").read_text()) for run in (source, folder))
    assert (thin["macs"], thin["macs_cut"], thin["params"]) == (
        pruned["macs"],
        pruned["macs_cut"],
        pruned["params"],
    )
    assert thin["train_macs"] < pruned["train_macs"]
    before, after = weights[-1]
    for name, tensor in after.items():
        if name.endswith(("bn1.weight", "bn2.weight")):
            assert (tensor == 1).all()
        elif tensor.ndim == 4:
            assert tensor.std() == pytest.approx((2 / tensor[0].numel()) ** 0.5, rel=0.5)
            assert not torch.equal(tensor, before[name])
    network, _ = models.open_exported(folder / "export")
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
    assert set(CONFIGS) == {*MAKERS, "dense", "thin", "thin_plan", "psap", "psap_variant"}
