"""The benchmark's command and its report; what it measures is no business of a test."""

import json

import pytest

from experiments import benchmark
from experiments.benchmarks import figure, gpu
from experiments.benchmarks.latency import RESNET50, ROUNDS, latency_table


def test_a_section_ends_in_the_report_with_its_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "experiments.benchmarks.pruning.pruning", lambda: {"step_ms": figure([3.0, 1.0, 2.0])}
    )
    out = tmp_path / "deep" / "report.json"
    monkeypatch.setattr("sys.argv", ["benchmark", "pruning", "--out", str(out)])
    benchmark.main()
    report = json.loads(out.read_text())
    assert report["figures"] == {"step_ms": {"median": 2.0, "spread": [1.0, 3.0], "n": 3}}
    assert {"device", "threads", "torch", "python", "commit"} <= report["machine"].keys()
    assert capsys.readouterr().out.split() == ["step_ms", "2.000", "[1.000,", "3.000]", "n=3"]


def test_an_unknown_section_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", "nothing"])
    with pytest.raises(SystemExit) as exit:
        benchmark.main()
    assert exit.value.code == 2
    assert (
        "there is no section 'nothing': choose from pruning, training, files"
        in capsys.readouterr().err
    )


@pytest.mark.long
def test_concurrent_runs_train_in_processes_of_their_own():
    assert gpu.images_per_second(2, "cpu", images=160) > 0


def test_the_gpu_section_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["benchmark", "gpu"])
    with pytest.raises(SystemExit) as exit:
        benchmark.main()
    assert exit.value.code == 2
    assert capsys.readouterr().err.endswith("error: the section gpu needs a CUDA device\n")


def test_an_out_that_cannot_be_written_is_refused_before_the_work(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    for out in (tmp_path, tmp_path / "file" / "report.json"):
        monkeypatch.setattr("sys.argv", ["benchmark", "pruning", "--out", str(out)])
        with pytest.raises(SystemExit) as exit:
            benchmark.main()
        assert exit.value.code == 2
        assert f"--out={out} cannot be written" in capsys.readouterr().err


def test_the_latency_table_has_a_row_for_every_network_batch_and_backend():
    figures = {f"macs_ratio_{name}": figure([2.0]) for name in RESNET50}
    for name in RESNET50:
        for batch in ROUNDS:
            for backend in ("eager", "compiled", "onnx"):
                key = f"{name}_b{batch}_{backend}"
                figures |= {
                    f"latency_ms_{key}_dense": figure([3.0]),
                    f"latency_ms_{key}_pruned": figure([2.0]),
                }
                figures[f"latency_speedup_{key}"] = figure([1.5, 1.25, 2.0])
    rows = latency_table(figures).splitlines()[2:]
    assert len(rows) == len(RESNET50) * len(ROUNDS) * 3
    assert rows[0] == "| resnet50 | 2.00x fewer | 1 | eager | 3.0 | 2.0 | 1.50x [1.25, 2.00] |"
