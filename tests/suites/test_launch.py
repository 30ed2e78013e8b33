"""Launching suites: what is trained, what is left alone, what becomes of runs that are stopped, killed or refused."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments import suite, train
from experiments.exits import EXIT_INTERRUPTED
from experiments.runs.folder import Record, State
from experiments.runs.summary import RunSummary, read_summary
from experiments.suites import launch, overview
from experiments.suites.runs import SuiteRun, SuiteRuns, runs_of
from psap_core import InputError
from tests.helpers import refusal
from tests.limits import HANG_SECONDS

CELLS = """
title: Small runs
seeds: [0]
cells:
  - {name: thin plan, recipe: digits_resnet20, overrides: [method=thin_plan], plan_of: psap}
  - {name: psap, recipe: digits_resnet20, overrides: [method=psap]}
  - {name: dense, recipe: digits_resnet20, overrides: [method=dense]}
"""
REFUSED = "  - {name: too much, recipe: digits_resnet20, overrides: [method=l1, target_macs_cut=0.9999]}\n"
SMALL = [
    "model.width=0.25",
    "data.train_images=320",
    "optim.batch_size=64",
    "tracking.mode=disabled",
]


@pytest.fixture
def read(tmp_path) -> Callable[..., SuiteRuns]:
    """The suite of some cells, with runs below tmp_path."""

    def read(cells: str = CELLS, *extra: str) -> SuiteRuns:
        (tmp_path / "small.yaml").write_text(cells)
        return runs_of(
            str(tmp_path / "small.yaml"), [*SMALL, f"runs_dir={tmp_path / 'runs'}", *extra]
        )

    return read


def summary_of(suite: str, cell: str) -> RunSummary:
    """Of a run that was never trained."""
    values = dict.fromkeys(RunSummary.__dataclass_fields__, 1)
    texts = dict.fromkeys(("dataset", "model", "method", "config_hash"), "x")
    return RunSummary(**values | texts | {"suite": suite, "cell": cell, "start_top1": None})


def states(runs: SuiteRuns) -> dict[str, State]:
    return {run.cell.name: run.record.state for run in runs.all}


def sessions(run: SuiteRun) -> int:
    return len(json.loads((run.record.folder / "manifest.json").read_text())["sessions"])


def wait_until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.long
def test_ctrl_c_then_a_killed_worker_then_every_run_is_done_once(read, tmp_path):
    runs = read(CELLS, "epochs=12")
    thin_plan, psap, dense = runs.all
    command = [
        sys.executable,
        "-m",
        "experiments.suite",
        "launch",
        runs.source,
        "--jobs",
        "2",
        *runs.extra,
    ]

    def start() -> subprocess.Popen[str]:
        root = Path(__file__).parents[2]
        return subprocess.Popen(
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def trains(run: SuiteRun, epochs: int) -> bool:
        metrics = run.record.metrics
        return metrics.exists() and metrics.read_bytes().count(b"\n") >= epochs

    launched = start()
    wait_until(lambda: trains(psap, 1) and trains(dense, 1))
    assert states(runs)["psap"] in (State.running, State.done)
    launched.send_signal(signal.SIGINT)
    said, _ = launched.communicate(timeout=HANG_SECONDS)
    assert (launched.returncode, said) == (
        EXIT_INTERRUPTED,
        "interrupted: the same command continues this run\n",
    )
    assert set(states(runs).values()) <= {State.interrupted, State.done, State.not_launched}
    assert states(runs)["thin plan"] is State.not_launched

    launched = start()
    wait_until(lambda: sessions(psap) == 2)
    trained = subprocess.run(
        ["pgrep", "-f", "cell='psap'.*" + str(tmp_path)], capture_output=True, text=True
    )
    for process in trained.stdout.split():
        os.kill(int(process), signal.SIGKILL)
    said, _ = launched.communicate(timeout=HANG_SECONDS)
    assert launched.returncode == 1
    assert "psap, seed 0: killed by SIGKILL; launched again, it continues" in said
    assert states(runs) == {
        "thin plan": State.not_launched,
        "psap": State.incomplete,
        "dense": State.done,
    }

    assert launch.local(runs, 2, []) == 0
    assert set(states(runs).values()) == {State.done}
    assert [sessions(run) for run in (thin_plan, psap, dense)] == [1, 3, 2]
    assert launch.local(runs, 2, []) == 0
    assert [sessions(run) for run in (thin_plan, psap, dense)] == [1, 3, 2]
    summary = json.loads((thin_plan.record.folder / "summary.json").read_text())
    assert (
        summary["params"] == json.loads((psap.record.folder / "summary.json").read_text())["params"]
    )


def test_a_second_ctrl_c_kills_what_does_not_stop():
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    deaf = [sys.executable, "-c", program]
    processes = [subprocess.Popen(deaf, stdout=subprocess.PIPE) for _ in range(2)]
    for process in processes:
        process.stdout.readline()  # it is deaf now
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    with launch._Stops() as stops:
        timer.start()
        launch._stop(processes, stops)
    assert [process.wait(HANG_SECONDS) for process in processes] == [-signal.SIGKILL] * 2


@pytest.mark.long
def test_a_failed_run_does_not_hide_and_keeps_no_other_from_training(read, capfd):
    cells = CELLS.split("  - {name: psap")[0] + REFUSED.replace("too much", "psap")
    runs = read(cells, "epochs=1")
    assert launch.local(runs, 1, []) == 1
    assert states(runs) == {"thin plan": State.not_launched, "psap": State.rejected}
    overview.print_status(runs)
    said = capfd.readouterr().out
    assert said.count("a cut of 0.9999 is unreachable") == 3
    assert said.endswith("small: 1 rejected, 1 not launched\n")
    assert "thin plan, seed 0: waits for psap, seed 0, which is not done" in said


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Callable[[], list[str]]:
    """A stand-in for sbatch, that answers with job ids, and for squeue; returns the calls of sbatch so far."""
    calls = tmp_path / "calls"
    (tmp_path / "bin").mkdir()
    for name, lines in (
        ("sbatch", f'echo "$*" >> {calls}\nwc -l < {calls}'),
        ("squeue", f"seq $(wc -l < {calls})"),
    ):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\n{lines}\n")
        program.chmod(0o755)
    calls.touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return lambda: calls.read_text().splitlines()


def test_slurm_gets_one_array_and_behind_it_the_runs_that_take_a_plan(read, sbatch):
    runs = read()
    launch.slurm(runs)
    rest = f"slurm/cifar10_table.sh {runs.source} {' '.join(runs.extra)}"
    options = "--parsable --job-name=psap-small"
    submitted = [
        f"{options} --array=1,2 {rest}",
        f"{options} --dependency=afterany:1 --array=0 {rest}",
    ]
    assert sbatch() == submitted
    with pytest.raises(
        InputError, match="jobs of small are queued or running: wait for them, or scancel 1 2"
    ):
        launch.slurm(runs)
    assert sbatch() == submitted


def test_printed_commands_train_what_is_not_done_and_plans_before_those_who_take_them(read, capsys):
    runs = read()
    thin_plan, psap, dense = runs.all
    launch.to_print(runs)
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("method=")[1].split()[0] for line in printed] == [
        "psap",
        "dense",
        "thin_plan",
    ]
    assert printed[2].startswith(
        "python -m experiments.train experiment=digits_resnet20 method=thin_plan seed=0 method.run="
    )
    dense.record.folder.mkdir(parents=True)
    (dense.record.folder / "done").touch()
    summary = json.dumps(asdict(summary_of("small", "dense")))
    (dense.record.folder / "summary.json").write_text(summary)
    assert launch.pending(runs) == [psap, thin_plan]
    with pytest.raises(
        InputError, match="thin plan, seed 0 takes the plan of psap, seed 0, which is not done"
    ):
        launch.pending(runs.choose("thin *", None))


@pytest.mark.long
def test_a_run_that_was_trained_by_hand_counts_for_the_suite_that_launches_it(read, monkeypatch):
    (dense,) = read(CELLS.split("  - {name: thin")[0] + CELLS.split("\n")[-2], "epochs=1").all
    train.run([word for word in dense.overrides if not word.startswith(("suite=", "cell="))])
    summary = read_summary(dense.record.folder)
    assert (summary.suite, dense.counts) == (None, False)
    assert launch.local(dense.runs, 1, []) == 0
    assert read_summary(dense.record.folder) == replace(summary, suite="small", cell="dense")
    config = OmegaConf.load(dense.record.folder / "config.yaml")
    assert (config.suite, config.cell) == ("small", "dense")
    assert (dense.counts, sessions(dense)) == (True, 1)


def test_how_a_run_ended_that_another_launcher_trains_or_has_done(read, tmp_path):
    run = read("".join(CELLS.partition("  - {name: psap")[1:]).join([CELLS.split("  - ")[0], ""]))[
        0
    ]
    launch.log_file(run).parent.mkdir(parents=True)
    launch.log_file(run).touch()
    other = Record(run.config)
    other.begin(run.config, {})
    assert launch._ended(run, 2) == "running"
    other.finish()
    other.close()
    assert launch._ended(run, 2) == "done"
    with pytest.raises(InputError, match="another process has just finished the run"):
        Record(run.config).begin(run.config, {})
    (run.record.folder / "done").unlink()
    assert launch._ended(run, 3).startswith("failed: it left with exit code 3 (")


def test_one_job_on_each_device_unless_said(read, monkeypatch, tmp_path):
    read()
    monkeypatch.setattr(launch, "local", lambda suite, jobs, devices: given.append((jobs, devices)))
    given = []
    for options in ([], ["--devices", "2,3"], ["--jobs", "4", "--devices", "2,3"]):
        monkeypatch.setattr("sys.argv", ["suite", "launch", str(tmp_path / "small.yaml"), *options])
        with pytest.raises(SystemExit):
            suite.main()
    assert given == [(1, []), (2, ["2", "3"]), (4, ["2", "3"])]


@pytest.mark.parametrize("option", [["--jobs", "2"], ["--devices", "0"]])
def test_options_of_this_machine_are_refused_elsewhere(option, read, monkeypatch, tmp_path, capsys):
    read()
    monkeypatch.setattr(
        "sys.argv",
        ["suite", "launch", str(tmp_path / "small.yaml"), "--launcher", "print", *option],
    )
    with pytest.raises(SystemExit, match="2"):
        suite.main()
    assert "--jobs and --devices are of this machine's processes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--jobs", "0"], "--jobs=0 must be at least 1"),
        (["--launcher", "slurm"], "there is no squeue here"),
        (["method=nothing"], "nothing"),
    ],
)
def test_refusals(arguments, sentence, read, monkeypatch, tmp_path):
    read()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert sentence in refusal(
        suite.main, ["launch", str(tmp_path / "small.yaml"), *arguments], monkeypatch
    )
