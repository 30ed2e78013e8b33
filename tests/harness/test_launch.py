"""Launching suites: what is trained, what is left alone, what becomes of runs that are stopped, killed or refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments import launch, suite
from experiments.harness.entry import EXIT_INTERRUPTED
from experiments.harness.record import State
from tests.harness.helpers import refusal

CELLS = """
title: Small runs
seeds: [0]
cells:
  - {name: thin plan, recipe: digits_resnet20, overrides: [method=thin_plan], plan_of: psap}
  - {name: psap, recipe: digits_resnet20, overrides: [method=psap]}
  - {name: dense, recipe: digits_resnet20, overrides: [method=dense]}
"""
REFUSED = "  - {name: too much, recipe: digits_resnet20, overrides: [method=l1, target_macs_cut=0.9999]}\n"
SMALL = ["model.width=0.25", "data.train_images=320", "optim.batch_size=64", "tracking.mode=disabled"]


@pytest.fixture
def read(tmp_path) -> Callable[..., suite.Suite]:
    """The suite of some cells, with runs below tmp_path."""

    def read(cells: str = CELLS, *extra: str) -> suite.Suite:
        (tmp_path / "small.yaml").write_text(cells)
        return suite.read_suite(str(tmp_path / "small.yaml"), [*SMALL, f"runs_dir={tmp_path / 'runs'}", *extra])

    return read


def states(runs: suite.Suite) -> dict[str, State]:
    return {run.cell.name: run.record.state for run in runs.runs}


def sessions(run: suite.SuiteRun) -> int:
    return len(json.loads((run.record.folder / "manifest.json").read_text())["sessions"])


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.long
def test_ctrl_c_then_a_killed_worker_then_every_run_is_done_once(read, tmp_path):
    runs = read(CELLS, "epochs=12")
    thin_plan, psap, dense = runs.runs
    command = [sys.executable, "-m", "experiments.suite", "launch", runs.source, "--jobs", "2", *runs.extra]

    def start() -> subprocess.Popen[str]:
        root = Path(__file__).parents[2]
        return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def trains(run: suite.SuiteRun, epochs: int) -> bool:
        metrics = run.record.metrics
        return metrics.exists() and metrics.read_bytes().count(b"\n") >= epochs

    launched = start()
    wait_until(lambda: trains(psap, 1) and trains(dense, 1))
    assert states(runs)["psap"] in (State.running, State.done)
    launched.send_signal(signal.SIGINT)
    said, _ = launched.communicate(timeout=120)
    assert (launched.returncode, said) == (EXIT_INTERRUPTED, "interrupted: the same command continues this run\n")
    assert set(states(runs).values()) <= {State.interrupted, State.done, State.not_launched}
    assert states(runs)["thin plan"] is State.not_launched

    launched = start()
    wait_until(lambda: sessions(psap) == 2)
    trained = subprocess.run(["pgrep", "-f", "cell='psap'.*" + str(tmp_path)], capture_output=True, text=True)
    for process in trained.stdout.split():
        os.kill(int(process), signal.SIGKILL)
    said, _ = launched.communicate(timeout=240)
    assert launched.returncode == 1
    assert "psap, seed 0: killed by SIGKILL; launched again, it continues" in said
    assert states(runs) == {"thin plan": State.not_launched, "psap": State.incomplete, "dense": State.done}

    assert launch.local(runs, 2, []) == 0
    assert set(states(runs).values()) == {State.done}
    assert [sessions(run) for run in (thin_plan, psap, dense)] == [1, 3, 2]
    assert launch.local(runs, 2, []) == 0
    assert [sessions(run) for run in (thin_plan, psap, dense)] == [1, 3, 2]
    summary = json.loads((thin_plan.record.folder / "summary.json").read_text())
    assert summary["params"] == json.loads((psap.record.folder / "summary.json").read_text())["params"]


def test_a_failed_run_does_not_hide_and_keeps_no_other_from_training(read, capfd):
    cells = CELLS.split("  - {name: psap")[0] + REFUSED.replace("too much", "psap")
    runs = read(cells, "epochs=1")
    assert launch.local(runs, 1, []) == 1
    assert states(runs) == {"thin plan": State.not_launched, "psap": State.failed}
    suite.print_status(runs)
    said = capfd.readouterr().out
    assert said.count("target_macs_cut=0.9999 is unreachable with one rate for all layers") == 3
    assert said.endswith("small: 1 failed, 1 not launched\n")


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Callable[[], list[str]]:
    """A stand-in for sbatch that answers with job ids; returns its calls so far."""
    calls = tmp_path / "calls"
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$*" >> {calls}\nwc -l < {calls}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return lambda: calls.read_text().splitlines()


def test_slurm_gets_one_array_and_behind_it_the_runs_that_take_a_plan(read, sbatch):
    runs = read()
    launch.slurm(runs)
    rest = f"slurm/cifar10_table.sh {runs.source} {' '.join(runs.extra)}"
    assert sbatch() == [f"--parsable --array=1,2 {rest}", f"--parsable --dependency=afterany:1 --array=0 {rest}"]


def test_printed_commands_train_what_is_not_done(read, capsys):
    runs = read()
    runs.runs[1].record.folder.mkdir(parents=True)
    (runs.runs[1].record.folder / "done").touch()
    launch.to_print(runs)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(
        "python -m experiments.train experiment=digits_resnet20 method=thin_plan seed=0 method.run="
    )
    assert "method=dense" in second


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--jobs", "0"], "--jobs=0 must be at least 1"),
        (["--launcher", "slurm"], "there is no sbatch here"),
        (["method=nothing"], "nothing"),
    ],
)
def test_refusals(arguments, sentence, read, monkeypatch, tmp_path):
    read()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sentence in refusal(suite.main, ["launch", str(tmp_path / "small.yaml"), *arguments], monkeypatch)
