"""The check of eq. 5 measures what it says and leaves no trace."""

import copy
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from experiments import utility_check
from experiments.harness import models
from experiments.harness.entry import compose
from experiments.schema import Fan, ResNetConfig, Shortcut
from psap_core import Snapshot, filter_tensors, find_layers, suspend_

DIGITS = ["experiment=digits_small", "method=psap", "data.train_images=128", "optim.batch_size=64"]


@pytest.fixture
def network():
    """A network in training, its layers' tensors, and batches."""
    torch.manual_seed(0)
    model = models.build(ResNetConfig("resnet20", 0.5, None, Fan("in"), Shortcut.option_a), 1, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(10, (16,))) for _ in range(3)]
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    layers = find_layers(model, batches[0][0][:1])
    return model, {layer.name: filter_tensors(model, layer, optimizer) for layer in layers}, batches, layers


def test_the_reduction_is_that_of_the_loss_with_one_filter_more(network):
    model, tensors, batches, layers = network
    chosen = {layer.name: [1, 3] for layer in layers}
    rows = utility_check.check(model, tensors, chosen, batches)
    assert [(row["layer"], row["filter"]) for row in rows] == [(name, f) for name in chosen for f in (1, 3)]

    def loss_without(suspended):
        other = copy.deepcopy(model)
        for layer in layers:
            suspend_(filter_tensors(other, layer), suspended[layer.name], Snapshot())
        return sum(F.cross_entropy(other(images), labels).item() for images, labels in batches) / len(batches)

    for row in rows[::7]:
        name, f = row["layer"], row["filter"]
        more = chosen | {name: [other for other in (1, 3) if other != f]}
        assert row["reduction"] == pytest.approx(loss_without(chosen) - loss_without(more), abs=1e-6)
        assert row["norm"] == pytest.approx(tensors[name].parameters[f"{name}.weight"][f].norm().item())
        assert row["gamma"] == abs(tensors[name].gamma[f].item())


def test_the_network_and_its_optimiser_come_out_as_they_were(network):
    model, tensors, batches, _ = network
    everything = [t for layer in tensors.values() for part in (layer.parameters, layer.buffers, layer.state)
                  for t in part.values()]  # fmt: skip
    before = [tensor.clone() for tensor in everything]
    utility_check.check(model, tensors, {name: [0, 2] for name in tensors}, batches)
    assert all(torch.equal(tensor, saved) for tensor, saved in zip(everything, before, strict=True))
    assert model.training


def test_a_check_changes_nothing_of_the_training_and_takes_live_filters_only(monkeypatch):
    seen = []
    original = utility_check.check

    def spied(model, tensors, chosen, batches):
        seen.append([(name, f) for name, filters in chosen.items() for f in filters if tensors[name].gamma[f] == 0])
        return original(model, tensors, chosen, batches)

    monkeypatch.setattr(utility_check, "check", spied)
    cfg = compose("train", DIGITS)
    several, one = (utility_check.train_and_check(cfg, after, 2) for after in ([0, 2, 3], [3]))
    assert seen == [[]] * 4
    assert {row["epoch"] for row in several} == {0, 2, 3}
    assert [row for row in several if row["epoch"] == 3] == one


def test_the_command_writes_every_seeds_filters(tmp_path):
    command = [sys.executable, "-m", "experiments.utility_check", *DIGITS, "--seeds", "0", "1", "--after", "0"]
    done = subprocess.run([*command, "--out", str(tmp_path / "new" / "out.json")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "new" / "out.json").read_text())
    assert report["recipe"] == DIGITS
    assert {row["seed"] for row in report["filters"]} == {0, 1}
    assert f"{len(report['filters'])} filters" in done.stderr


def test_photographs_are_refused():
    cfg = compose("train", ["experiment=imagenette_resnet18"])
    with pytest.raises(utility_check.InputError, match="the check needs the digits or CIFAR-10"):
        utility_check.train_and_check(cfg, [0], 2)
