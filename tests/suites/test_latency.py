"""Latency of exported networks."""

import json

import pytest
import torch
from torch import nn

from experiments import suite, train
from experiments.suites.runs import runs_of
from experiments.training import latency
from experiments.training.latency import latencies_ms
from tests.helpers import SMALL, refusal

FILE = """
title: One
seeds: [0, 1]
cells: [{name: a thin one, recipe: digits_resnet20, overrides: [method=thin]}]
"""


def test_latency_is_the_median_and_networks_take_turns(monkeypatch):
    clock, order = [0.0], []

    class Slow(nn.Module):
        def __init__(self, name: str, seconds: float) -> None:
            super().__init__()
            self.name, self.seconds = name, seconds

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            order.append(self.name)
            outlier = 50 if len(order) % 11 == 0 else 0
            clock[0] += self.seconds + outlier
            return images

    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock[0])
    measured = latencies_ms({"a": Slow("a", 0.002), "b": Slow("b", 0.001)}, torch.zeros(1))
    assert measured == {"a": pytest.approx(2), "b": pytest.approx(1)}
    assert order[:4] in (["a", "b", "b", "a"], ["b", "a", "a", "b"])


@pytest.mark.long
def test_finished_runs_of_a_suite_are_measured(tmp_path, monkeypatch, capsys):
    (tmp_path / "one.yaml").write_text(FILE)
    words = ["latency", str(tmp_path / "one.yaml"), *SMALL[1:], "epochs=1", f"runs_dir={tmp_path}"]
    assert "no run of one is done" in refusal(suite.main, words, monkeypatch)
    train.run(runs_of(words[1], words[2:])[1].overrides)
    monkeypatch.setattr("sys.argv", ["command", *words])
    suite.main()
    said = json.loads(capsys.readouterr().out)
    assert {"device", "threads", "commit", "rounds"} <= said.keys()
    ((cell, seeds),) = said["latency_ms"].items()
    assert cell == "a thin one"
    ((seed, ms),) = seeds.items()
    assert seed == "1"
    assert ms > 0
