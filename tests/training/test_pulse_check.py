"""The check of eq. 5 measures what it says and leaves no trace."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiments import models, pulse_check
from experiments.configuration import compose
from experiments.schema import Fan, ResNetConfig, Shortcut
from psap_core.groups import find_groups
from psap_core.suspension import Snapshot, filter_tensors, suspend_

DIGITS = [
    "experiment=digits_small",
    "method=psap",
    "model.width=0.25",
    "data.train_images=80",
    "optim.batch_size=16",
]


@pytest.fixture(params=["all", "coupled"])
def network(request):
    """A network in training, its groups' tensors, batches, and the groups."""
    torch.manual_seed(0)
    model = models.build(ResNetConfig("resnet20", 0.5, None, Fan("in"), Shortcut.option_a), 1, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    batches = [(torch.randn(16, 1, 8, 8), torch.randint(10, (16,))) for _ in range(4)]
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    groups = find_groups(model, batches[0][0][:1], scope=request.param)
    tensors = {group.name: filter_tensors(model, group, optimizer) for group in groups}
    return model, tensors, batches, groups


def test_the_reduction_is_that_of_the_loss_with_one_filter_more(network):
    model, tensors, batches, groups = network
    chosen = {group.name: [1, 3] for group in groups}
    rows = pulse_check.check_filters(model, tensors, chosen, batches[:2], batches[2:])
    assert [(row["layer"], row["filter"]) for row in rows] == [
        (name, f) for name in chosen for f in (1, 3)
    ]

    def loss_without(suspended):
        other = copy.deepcopy(model)
        for group in groups:
            suspend_(filter_tensors(other, group), suspended[group.name], Snapshot())
        return (
            sum(F.cross_entropy(other(images), labels).item() for images, labels in batches[2:]) / 2
        )

    for row in rows[::7]:
        name, f = row["layer"], row["filter"]
        more = chosen | {name: [other for other in (1, 3) if other != f]}
        assert row["reduction"] == pytest.approx(
            loss_without(chosen) - loss_without(more), abs=1e-6
        )
        weight = model.get_submodule(name).weight
        if len(tensors[name].writers) == 1:
            assert row["norm"] == pytest.approx(weight[f].norm().item())
        gammas = [
            model.get_parameter(silencer)[f].item()
            for silencer in tensors[name].silencers
            if ".bn" in f".{silencer}" and silencer.endswith("weight")
        ]
        assert row["gamma"] == pytest.approx(sum(gamma**2 for gamma in gammas) ** 0.5)


def test_the_network_and_its_optimiser_come_out_as_they_were(network):
    model, tensors, batches, _ = network
    everything = [rows.tensor for group in tensors.values() for rows in group.everything.values()]
    before = [tensor.clone() for tensor in everything]
    pulse_check.check_filters(
        model, tensors, {name: [0, 2] for name in tensors}, batches[:2], batches[2:]
    )
    assert all(torch.equal(tensor, saved) for tensor, saved in zip(everything, before, strict=True))
    assert model.training


@pytest.mark.long
def test_every_live_filter_is_looked_at_once_and_the_training_does_not_notice(monkeypatch):
    silent = []
    original = pulse_check.check_filters

    def spied(model, tensors, chosen, *batches):
        silent.extend(
            (name, f)
            for name, filters in chosen.items()
            for f in filters
            if all(
                not tensors[name].parameters[silencer].take(tensors[name].index([f])).any()
                for silencer in tensors[name].silencers
            )
        )
        return original(model, tensors, chosen, *batches)

    monkeypatch.setattr(pulse_check, "check_filters", spied)
    cfg = compose("train", DIGITS)
    several, one = (pulse_check.train_and_check(cfg, after, 2) for after in ([0, 2], [2]))
    assert silent == []
    assert [row for row in several if row["epoch"] == 2] == one
    filters = [(row["layer"], row["filter"]) for row in several if row["epoch"] == 0]
    assert len(filters) == len({*filters}) == 172  # all of a quarter of a ResNet-20
    assert 20 < len(one) < 172


def test_the_command_writes_after_every_seed(tmp_path, monkeypatch, capsys):
    out, written = tmp_path / "new" / "out.json", []

    def checked(cfg, after, batches):
        written.append(out.exists() and len(json.loads(out.read_text())["filters"]))
        return [{"seed": cfg.seed, "epoch": epoch, "utility": batches / 3} for epoch in after]

    monkeypatch.setattr(pulse_check, "train_and_check", checked)
    arguments = [
        *DIGITS,
        "--seeds",
        "0",
        "4",
        "--after",
        "1",
        "2",
        "--batches",
        "2",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(sys, "argv", ["pulse_check", *arguments])
    pulse_check.main()
    report = json.loads(out.read_text())
    assert (report["recipe"], report["batches"]) == (DIGITS, 2)
    assert report["machine"].keys() >= {"device", "threads", "torch", "commit", "dirty_diff_sha256"}
    assert [(row["seed"], row["epoch"], row["utility"]) for row in report["filters"]] == [
        (0, 1, 0.66667),
        (0, 2, 0.66667),
        (4, 1, 0.66667),
        (4, 2, 0.66667),
    ]
    assert written == [False, 2]
    assert "out.json: 4 filters" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("recipe", "how", "sentence"),
    [
        (
            ["experiment=imagenette_resnet18"],
            {},
            "the check needs the digits or CIFAR-10, and method=psap",
        ),
        (
            ["experiment=digits_small", "method=thin"],
            {},
            "the check needs the digits or CIFAR-10, and method=psap",
        ),
        (DIGITS, {"batches": 3}, "--batches=3 needs 6 batches, an epoch has 5"),
        (DIGITS, {"batches": 1}, "--batches=1 must be at least 2"),
        (DIGITS, {"after": [2, 9]}, "--after must be completed epochs, from 0 to 8"),
        (DIGITS, {"after": [-1]}, "--after must be completed epochs, from 0 to 8"),
        ([*DIGITS, "seed=3"], {}, "seeds stand behind --seeds, each once"),
        (DIGITS, {"seeds": [1, 1]}, "seeds stand behind --seeds, each once"),
        (DIGITS, {"out": Path(__file__).parent}, "is a folder"),
    ],
)
def test_refusals_before_anything_is_trained(recipe, how, sentence, tmp_path):
    arguments = {"seeds": [0], "after": [1], "batches": 2, "out": tmp_path / "out.json"} | how
    with pytest.raises(pulse_check.InputError, match=sentence):
        pulse_check.check_seeds(recipe, **arguments)
    assert not (tmp_path / "out.json").exists()


def test_dropout_is_refused(monkeypatch):
    monkeypatch.setattr(
        models, "start", lambda *_, **__: (torch.nn.Sequential(torch.nn.Dropout()), None)
    )
    with pytest.raises(pulse_check.InputError, match="the check needs a network without dropout"):
        pulse_check.train_and_check(compose("train", DIGITS), [1], 2)
