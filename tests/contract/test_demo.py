"""The demo's report, from tiny runs, and its sentences, from made-up figures."""

import json

import pytest
import torch
from torch import nn

from experiments import demo
from experiments.demo import (
    BATCH,
    METHODS,
    Facts,
    MethodResult,
    convolution_share,
    noise,
    why_not_faster,
)
from experiments.training import latency

REPORTED = {
    "method": str,
    "test_images": int,
    "top1": float,
    "top1_noise": float,
    "macs": int,
    "macs_cut": float,
    "params": int,
    "latency_ms": float,
    "latency_batch_ms": float,
    "train_seconds": float,
    "export_max_relative_error": float,
}


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> list[str]:
    """Overrides of a demo of seconds."""
    monkeypatch.setattr(demo, "BATCH", 4)
    monkeypatch.setattr(demo, "ROUNDS", 2)
    monkeypatch.setattr(latency, "ROUNDS", 2)
    return [
        f"runs_dir={tmp_path}",
        "epochs=1",
        "model.width=0.25",
        "data.train_images=320",
        "tracking.mode=disabled",
    ]


def test_report_has_one_row_per_method(tiny, capsys):
    out = demo.run_demo(tiny)
    rows = json.loads((out / "report.json").read_text())
    assert [row["method"] for row in rows] == list(METHODS)
    for row in rows:
        assert {key: type(value) for key, value in row.items()} == REPORTED
        assert row["export_max_relative_error"] <= 1e-9
        assert row["latency_ms"] > 0
        assert row["macs_cut"] == 0 if row["method"] == "dense" else row["macs_cut"] >= 0.6
    assert (out / "what_happened.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"{row['macs'] / 1e6:.2f} M" in printed for row in rows)
    assert "one method after the other" in printed
    (export,) = [
        line for line in printed.splitlines() if line.startswith("PSAP's exported network: ")
    ]
    assert "demo_digits" in export


@pytest.mark.long
def test_a_second_demo_trains_nothing(tiny):
    first, second = (
        json.loads((demo.run_demo(tiny) / "report.json").read_text()) for _ in range(2)
    )
    assert [row["train_seconds"] for row in first] == [row["train_seconds"] for row in second]


def row(method: str, macs_cut: float, latency_ms: float, latency_batch_ms: float) -> MethodResult:
    macs = round(2_500_000 * (1 - macs_cut))
    latencies = latency_ms, latency_batch_ms
    return MethodResult(method, 360, 97.0, 1.8, macs, macs_cut, 1, *latencies, 1.0, 0.0)


@pytest.mark.parametrize("right", [0.99, 0.9, 0.5])
def test_equal_networks_differ_by_more_than_the_noise_in_one_of_twenty_cases(right):
    images, draw = 360, torch.Generator().manual_seed(0)
    share = torch.full((2, 100_000), right)
    one, other = 100 * torch.binomial(share * 0 + images, share, generator=draw) / images
    beyond = (one - other).abs() > noise(100 * right, images)
    assert 0.03 < beyond.float().mean() < 0.07


def test_a_perfect_network_has_noise_too():
    assert 0 < noise(100.0, 360) < noise(99.0, 360)


def test_a_slow_network_gets_its_reason_with_the_measured_figures_and_a_fast_one_none():
    dense = row("dense", 0.0, 2.0, 50.0)
    thin, psap = row("thin", 0.6, 2.1, 20.0), row("psap", 0.6, 2.5, 60.0)
    facts = {
        "dense": Facts((0.5, 0.9), (16, 16), 0),
        "thin": Facts((0.4, 0.8), (8, 8), 0),
        "psap": Facts((0.4, 0.8), (9, 8), 1),
    }
    sentences = why_not_faster([dense, thin, psap], facts)
    assert [sentence.split(":")[0] for sentence in sentences] == [
        "thin, one image",
        "psap, one image",
        f"psap, {BATCH} images",
    ]
    assert sentences[0].endswith(
        "everything else 1.26 (dense 1.00): it starts as many convolutions (2)."
    )
    assert "2.50 ms, dense 2.00 ms, with 40% of the MACs" in sentences[1]
    assert (
        "Convolutions take 48.00 ms (dense 45.00), everything else 12.00 (dense 5.00)"
        in sentences[2]
    )
    assert (
        "1 of them with a number of filters that is no multiple of 8, 1 residual outputs"
        in sentences[2]
    )
    assert why_not_faster([dense, row("psap", 0.6, 1.0, 30.0)], facts) == []


def test_convolution_share_is_that_of_the_convolutions():
    images = torch.zeros(2, 3, 16, 16)
    assert convolution_share(nn.ReLU(), images) == 0
    network = nn.Sequential(nn.Conv2d(3, 64, 5), nn.ReLU())
    assert 0.5 < convolution_share(network, images) < 1
    assert not network[0]._forward_hooks
