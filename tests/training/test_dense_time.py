"""A run's training time stands beside that of the network without any pruning."""

import json
import math

import pytest
import torch

from experiments import train
from experiments.configuration import compose
from experiments.schema import Fast
from experiments.training import dense_time
from experiments.training.dense_time import dense_epoch_seconds
from experiments.training.distributed import World
from experiments.training.setup import set_up
from psap_core import macs
from tests.helpers import bits, small


@pytest.fixture
def timed(monkeypatch):
    """However short a run is."""
    monkeypatch.setattr(dense_time, "LARGEST_SHARE", math.inf)


def set_up_for(tmp_path, method):
    cfg = compose("train", small(tmp_path, method))
    return set_up(cfg, torch.device("cpu"), World())


@pytest.mark.parametrize("method", ["psap", "thin"])
def test_timing_dense_steps_changes_nothing(method, tmp_path, timed):
    setup = set_up_for(tmp_path, method)
    before = bits(setup.model.state_dict())
    generator = torch.get_rng_state()
    seconds = dense_epoch_seconds(setup)
    assert 0 < seconds < math.inf
    assert bits(setup.model.state_dict()) == before
    assert setup.optimizer.state_dict()["state"] == {}
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_thin_network_is_timed_beside_the_whole_one(tmp_path):
    thin, whole = (set_up_for(tmp_path, method) for method in ("thin", "dense"))
    beside = dense_time._dense_network(thin)
    assert macs(beside, thin.example) == macs(whole.model, whole.example)
    assert macs(beside, thin.example) > macs(thin.model, thin.example)


def test_an_epoch_takes_its_images_times_what_one_took(tmp_path, timed, monkeypatch):
    monkeypatch.setattr(dense_time, "_dense_seconds_per_image", lambda *_: 0.5)
    setup = set_up_for(tmp_path, "dense")
    assert dense_epoch_seconds(setup) == 0.5 * len(setup.images)


def test_a_dense_network_that_does_not_fit_is_not_timed(tmp_path, timed, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(dense_time, "_dense_seconds_per_image", full)
    assert dense_epoch_seconds(set_up_for(tmp_path, "thin")) is None


def test_no_dense_network_is_compiled_to_be_timed(tmp_path, timed):
    setup = set_up_for(tmp_path, "dense")
    setup.fast = Fast.compiled
    assert dense_epoch_seconds(setup) is None


@pytest.mark.parametrize("method", ["dense", "thin", "psap"])
def test_every_run_says_its_share_of_the_dense_networks_time(method, tmp_path, timed):
    folder = train.run(small(tmp_path, method))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    dense_seconds = sum(row["train/dense_seconds"] for row in rows)
    assert summary["train_seconds_dense_ratio"] == summary["train_seconds"] / dense_seconds


def test_a_short_run_spends_nothing_on_timing_the_dense_network(tmp_path):
    folder = train.run(small(tmp_path, "l1", "epochs=2"))
    assert json.loads((folder / "summary.json").read_text())["train_seconds_dense_ratio"] is None
    assert "train/dense_seconds" not in (folder / "metrics.jsonl").read_text()
