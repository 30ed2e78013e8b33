"""From the final plan on the network in training is the small one, and trains as the masked one would."""

import json
import math

import pytest
import torch
from torch import nn

from analysis.results import read_run
from experiments import train
from experiments.configuration import compose
from experiments.runs.identity import config_hash
from experiments.training import dense_time
from experiments.training.checkpoint import load_checkpoint
from experiments.training.compaction import Compaction
from experiments.training.distributed import World
from experiments.training.setup import set_up
from psap_core import load_exported
from tests.helpers import small

FINAL_AT = {"psap": 3, "l1": 2, "taylor": 2, "fpgm": 2}  # of four epochs
IMAGES = 320


def run_of(tmp_path, method, *overrides):
    folder = train.run(small(tmp_path, method, "method.scope=coupled", *overrides))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    state = load_checkpoint(folder / "checkpoint" / "last.pt")
    return folder, rows, summary, state


@pytest.mark.parametrize(
    "method", ["psap", *(pytest.param(m, marks=pytest.mark.long) for m in ("l1", "taylor", "fpgm"))]
)
def test_what_is_trained_is_what_is_exported(method, tmp_path, monkeypatch):
    monkeypatch.setattr(dense_time, "LARGEST_SHARE", math.inf)
    folder, rows, summary, state = run_of(tmp_path, method)
    assert read_run(folder).summary.macs == summary["macs"]  # analysis takes it
    assert sum(tensor.numel() for tensor in state["model"].values()) >= summary["params"]
    momenta = state["optimizer"]["state"].values()
    assert sum(each["momentum_buffer"].numel() for each in momenta) == summary["params"]
    assert summary["masked_top1"] == summary["top1"]
    assert summary["export_max_relative_error"] <= 1e-9
    dense_macs = round(summary["macs"] / (1 - summary["macs_cut"]))
    expected = [dense_macs] * FINAL_AT[method] + [summary["macs"]] * (4 - FINAL_AT[method])
    assert [row["train/macs"] for row in rows] == [IMAGES * each for each in expected]
    assert summary["train_macs"] == IMAGES * sum(expected)
    dense_seconds = sum(row["train/dense_seconds"] for row in rows)
    assert summary["train_seconds_dense_ratio"] == summary["train_seconds"] / dense_seconds


@pytest.mark.parametrize(
    "method", ["psap", *(pytest.param(m, marks=pytest.mark.long) for m in ("l1", "taylor"))]
)
def test_the_small_network_trains_as_the_masked_one(method, tmp_path):
    """Bit for bit before; afterwards but for rounding, which a small learning rate does not amplify."""
    slow = "optim.lr=0.01"
    folder, compact, summary, _ = run_of(tmp_path, method, slow)
    masked_folder, masked, masked_summary, _ = run_of(
        tmp_path, method, slow, "method.compact=false"
    )
    for epoch, (small_row, masked_row) in enumerate(zip(compact, masked, strict=True), 1):
        rel = 0 if epoch <= FINAL_AT[method] else 1e-4
        assert small_row["train/loss"] == pytest.approx(masked_row["train/loss"], rel=rel, abs=0)
    for path in sorted(folder.glob("plans/*.json")):
        assert path.read_text() == (masked_folder / "plans" / path.name).read_text()
    assert summary["macs"] == masked_summary["macs"]
    assert masked_summary["train_macs"] > summary["train_macs"]
    cfg = compose("train", small(tmp_path, method))
    exported = [
        load_exported(each / "export", set_up(cfg, torch.device("cpu"), World()).model)
        for each in (folder, masked_folder)
    ]
    for ours, theirs in zip(*(each.parameters() for each in exported), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_in_scope_coupled_it_is_the_default_and_else_no_part_of_a_run():
    def hash_of(*overrides):
        return config_hash(compose("train", ["experiment=digits_resnet20", *overrides]))

    for method in ("psap", "l1", "fpgm", "taylor"):
        for scope, default in (("coupled", "true"), ("all", "false")):
            words = [f"method={method}", f"method.scope={scope}"]
            hashes = {
                value: hash_of(*words, f"method.compact={value}")
                for value in ("null", "true", "false")
            }
            assert hashes["null"] == hashes[default]
            assert hashes["true"] != hashes["false"]


class Final:
    """A method whose plan is final at once, and which says when it was made compact."""

    is_compact = False
    plan = None

    def plan_is_final(self, epochs_done):
        return True

    def before_train(self):
        pass


def test_the_wrapper_is_made_anew_and_the_steps_take_it(tmp_path, monkeypatch):
    cfg = compose("train", small(tmp_path, "psap"))
    setup = set_up(cfg, torch.device("cpu"), World())
    made = []

    def wrapped(model, fast, world):
        made.append(nn.Sequential(model))
        return made[-1]

    class Steps:
        def use(self, net):
            self.net = net

    method, steps = Final(), Steps()
    method.compact_ = lambda: setattr(method, "is_compact", True)
    monkeypatch.setattr("experiments.training.setup.wrapped", wrapped)
    monkeypatch.setattr("experiments.training.compaction.export_error", lambda *_: 0.0)
    Compaction(method, setup, steps).before_train()
    assert made == [setup.net]
    assert steps.net is setup.net
