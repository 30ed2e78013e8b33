"""Methods in training: what SFP does to a network, and what the summary says of masked and exported ones."""

import json
from dataclasses import fields

import pytest
import torch

from experiments import data, models, train
from experiments.configuration import compose
from experiments.data.base import Normalisation
from experiments.methods.registry import entries, register
from experiments.methods.sfp import SFP
from experiments.schema import Fan, ResNetConfig, Shortcut, UniformConfig
from experiments.suites.method_styles import chooses_filters
from experiments.training import checkpoint
from experiments.training.distributed import World
from experiments.training.loop import evaluate
from tests.helpers import bits, small

RESNET20 = ResNetConfig("resnet20", 0.5, None, Fan("in"), Shortcut.option_a)


@pytest.fixture
def trained():
    """A network after three steps, its optimiser with momentum, its SFP, and a function that does one step."""
    torch.manual_seed(0)
    model = models.build(RESNET20, 1, 10)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    images, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 10

    def step():
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    for _ in range(3):
        step()
    return (
        model,
        optimizer,
        SFP(model, optimizer, images[:1], 0.5, "all", 4, 1, lambda *_: None),
        step,
    )


def test_sfp_zeroes_the_filters_of_lowest_norm_and_nothing_else(trained):
    model, optimizer, sfp, _ = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    momentum = bits(optimizer.state_dict())
    sfp.end_epoch(1)
    after = model.state_dict()
    convolutions = {f"{group.name}.weight" for group in sfp.groups}
    counts = {
        f"{group.name}.weight": count
        for group, count in zip(sfp.groups, sfp.counts(0.5), strict=True)
    }
    assert min(counts.values()) > 0
    for name, weight in before.items():
        if name in convolutions:
            norms = weight.double().pow(2).sum((1, 2, 3)).sqrt().tolist()
            lowest = sorted(range(len(norms)), key=norms.__getitem__)[: counts[name]]
            assert sfp.plan.pruned[name.removesuffix(".weight")] == tuple(sorted(lowest))
            weight[lowest] = 0.0
    assert bits(dict(after)) == bits(before)
    assert bits(optimizer.state_dict()) == momentum


def test_a_filter_that_sfp_zeroed_comes_back_at_the_next_step(trained):
    model, _, sfp, step = trained
    sfp.end_epoch(1)
    step()
    for name, filters in sfp.plan.pruned.items():
        assert (model.get_submodule(name).weight[list(filters)].flatten(1).abs().amax(1) > 0).all()


def test_masked_top1_is_of_the_network_before_its_plan_is_applied(tmp_path, monkeypatch):
    """SFP leaves the betas of pruned filters alone; here inner ones are large, and the export is another network."""
    end_epoch = SFP.end_epoch

    def with_large_betas(self, epochs_done):
        metrics = end_epoch(self, epochs_done)
        with torch.no_grad():
            inner = [group for group in self.groups if group.scattered is None]
            for group in inner if epochs_done == 4 else ():
                pruned = list(self.plan.pruned[group.name])
                norm = group.name.replace("conv", "bn")
                self.model.get_submodule(norm).bias[pruned] = 3.0
        return metrics

    monkeypatch.setattr(SFP, "end_epoch", with_large_betas)
    overrides = small(tmp_path, "sfp")
    folder = train.run(overrides)
    summary = json.loads((folder / "summary.json").read_text())
    cfg = compose("train", overrides)
    model = models.build(cfg.model, 1, 10)
    model.load_state_dict(checkpoint.load_checkpoint(folder / "checkpoint" / "last.pt")["model"])
    normalisation, cpu = (
        Normalisation(tuple(cfg.data.mean), tuple(cfg.data.std)),
        torch.device("cpu"),
    )
    batches = data.load_resident(cfg.data).evaluation("test", 0, 1, normalisation, cpu, 0)
    assert summary["masked_top1"] == evaluate(model, batches, World()).top1 != summary["top1"]


def test_a_method_is_made_in_one_place():
    entries()
    with pytest.raises(ValueError, match=r"experiments\.methods\.sfp both make the method 'sfp'"):
        register(UniformConfig, "sfp")(lambda context: None)


def test_those_methods_are_asked_for_a_plan_that_have_a_scope():
    for name, entry in entries().items():
        assert chooses_filters(name) == ("scope" in {field.name for field in fields(entry.config)})
