"""Interrupted == uninterrupted, bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest
import torch

from experiments import train
from experiments.configuration import compose
from experiments.data import TensorImages
from experiments.exits import Interrupted
from experiments.methods.base import Callback
from experiments.runs.folder import Record
from experiments.training import run
from experiments.training.signals import StopSignals
from psap_core import InputError
from tests.helpers import small, state_of

KILLS = [("psap coupled", "mid-epoch, compact")]
MORE_KILLS = [
    ("psap all", "half a checkpoint written"),
    ("dense", "export done, summary not"),
    ("sfp", "weights zeroed, plan not saved"),
    ("psap coupled", "logged, no checkpoint yet"),
    ("taylor coupled", "mid-epoch, compact"),
    ("fpgm coupled", "mid-epoch, compact"),
    ("l1 coupled", "mid-epoch, compact"),
    ("psap coupled", "in a pulse"),
    ("psap all", "logged, no checkpoint yet"),
    ("taylor all", "mid-epoch"),
    ("dense", "half a checkpoint written"),
    ("dense", "mid-epoch"),
    ("sfp", "mid-epoch"),
    ("sfp", "half a checkpoint written"),
    ("psap all", "in a pulse"),
    ("psap all", "mid-epoch"),
    ("psap coupled", "mid-epoch"),
    ("sfp coupled", "mid-epoch"),
]


def run_of(folder: Path, method: str) -> list[str]:
    """Overrides of a small run of a method, with its scope if it is given: `psap coupled`."""
    name, *scope = method.split()
    return small(folder, name, *(f"method.scope={each}" for each in scope))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The state of a method's run, trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("uninterrupted")

    @cache
    def state(method):
        return state_of(train.run(run_of(folder, method)))

    return state


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    return kill(KILLS, tmp_path_factory)


@pytest.fixture(scope="module")
def more_killed(tmp_path_factory):
    return kill(MORE_KILLS, tmp_path_factory)


def kill(kills, tmp_path_factory):
    """Folder of runs for each kill, in which a run was killed. One process starts them all."""
    folders = {kill: tmp_path_factory.mktemp("killed") for kill in kills}
    runs = [[point, run_of(folder, method)] for (method, point), folder in folders.items()]
    subprocess.run(
        [sys.executable, "-m", "tests.training.killed_runs", json.dumps(runs)], check=True
    )
    return folders


@pytest.mark.parametrize(("method", "point"), KILLS)
def test_killed_and_continued_equals_uninterrupted(method, point, killed, uninterrupted):
    check_continued(killed[method, point], method, uninterrupted)


@pytest.mark.long
@pytest.mark.parametrize(("method", "point"), MORE_KILLS)
def test_killed_elsewhere_and_continued(method, point, more_killed, uninterrupted):
    check_continued(more_killed[method, point], method, uninterrupted)


def check_continued(runs_dir, method, uninterrupted):
    folder = train.run(run_of(runs_dir, method))
    assert state_of(folder) == uninterrupted(method)
    sessions = json.loads((folder / "manifest.json").read_text())["sessions"]
    assert len(sessions) == 2


@pytest.mark.parametrize(
    ("method", "number"),
    [pytest.param("sfp", signal.SIGTERM, marks=pytest.mark.long), ("psap", signal.SIGINT)],
)
def test_a_signal_stops_after_the_step_and_the_same_command_continues(
    method, number, tmp_path, uninterrupted, monkeypatch
):
    steps = 0

    def after_step(self):
        nonlocal steps
        steps += 1
        if steps == 7:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Callback, "after_step", after_step)
        with pytest.raises(Interrupted):
            train.run(small(tmp_path, method))
    assert steps == 7
    assert state_of(train.run(small(tmp_path, method))) == uninterrupted(method)


def test_a_second_ctrl_c_does_not_wait_for_a_checkpoint():
    received = []

    def keep_pressing():
        with StopSignals() as signals:
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGINT)
                received.append(signals.received)

    with pytest.raises(KeyboardInterrupt):
        keep_pressing()
    assert received == [True]


def test_a_ctrl_c_after_the_last_step_ends_what_comes_next():
    with pytest.raises(KeyboardInterrupt), StopSignals():
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.long
def test_the_default_generators_continue_too(tmp_path, monkeypatch):
    """What draws from torch's default generator in every step draws the same numbers after a resume."""
    steps, stop_at = 0, 7

    def after_step(self):
        nonlocal steps
        steps += 1
        torch.rand(3)
        if steps == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Callback, "after_step", after_step)
    with pytest.raises(Interrupted):
        train.run(small(tmp_path / "stopped", "dense"))
    continued = state_of(train.run(small(tmp_path / "stopped", "dense")))
    stop_at = 0
    assert continued == state_of(train.run(small(tmp_path / "whole", "dense")))


def test_same_command_again_returns_the_done_run(tmp_path, capsys, monkeypatch):
    folder = train.run(small(tmp_path, "dense", "epochs=1"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["train", *small(tmp_path, "dense", "epochs=1"), "--json"])
    train.main()
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "summary.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_second_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.runs.folder.LOCK_SECONDS", 0.1)
    cfg = compose("train", small(tmp_path, "dense"))
    first, second = Record(cfg), Record(cfg)
    first.begin(cfg, {})
    with pytest.raises(InputError, match="another process"):
        second.begin(cfg, {})
    monkeypatch.setattr(
        run, "Tracker", lambda *_: pytest.fail("tracked before the folder was locked")
    )
    with pytest.raises(InputError, match="another process"):
        train.run(small(tmp_path, "dense"))


def test_the_manifest_names_every_device_of_a_run(tmp_path):
    record = Record(cfg := compose("train", small(tmp_path, "dense")))
    for device in ("a GPU", "x86_64 CPU, 2 cores", "a GPU"):
        record.begin(cfg, {"device": device})
        record.close()
    assert (
        json.loads((record.folder / "manifest.json").read_text())["device"]
        == "a GPU; x86_64 CPU, 2 cores"
    )


def started(runs_dir, method):
    """A process that trains, whose first epoch is done."""
    command = [sys.executable, "-m", "experiments.train", *run_of(runs_dir, method)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:
        if "epoch 1/4" in line:
            return process
    pytest.fail(f"it left with exit code {process.wait()} before its first epoch was done")


def killed_after(seconds, runs_dir, method):
    """Was the run still going, so long after its first epoch, when SIGKILL came?"""
    process = started(runs_dir, method)
    time.sleep(seconds)
    process.kill()
    return process.wait() == -signal.SIGKILL


RANDOMLY_KILLED = ("dense", "sfp", "psap all", "psap coupled")


@pytest.fixture(scope="module")
def seconds_left(tmp_path_factory):
    """Method to the seconds from its first epoch's end to its process's, undisturbed."""
    seconds = {}
    for method in RANDOMLY_KILLED:
        process = started(tmp_path_factory.mktemp("undisturbed"), method)
        began = time.perf_counter()
        process.communicate()
        seconds[method] = time.perf_counter() - began
    return seconds


@pytest.mark.long
@pytest.mark.parametrize("number", range(20))
def test_random_kills(number, tmp_path, uninterrupted, seconds_left):
    """SIGKILL at a random moment after the first epoch; then the run is continued to its end."""
    method = RANDOMLY_KILLED[number % len(RANDOMLY_KILLED)]
    seconds = random.Random(number).uniform(0, 0.7) * seconds_left[method]
    attempt = 0
    while not killed_after(seconds, tmp_path / str(attempt), method):
        seconds /= 2  # the machine is less busy than it was
        attempt += 1
    assert state_of(train.run(run_of(tmp_path / str(attempt), method))) == uninterrupted(method)


def test_another_number_of_threads_is_recorded_and_said(tmp_path, monkeypatch, capsys):
    overrides = small(tmp_path, "dense")
    with monkeypatch.context() as patch:
        patch.setattr(
            StopSignals, "received", property(lambda self: True, lambda *_: None), raising=False
        )
        with pytest.raises(Interrupted):
            train.run(overrides)
    capsys.readouterr()
    folder = train.run([*overrides, "runtime.threads=2"])
    said = capsys.readouterr().err
    assert "1 CPU threads before, 2 now" in said
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [session["threads"] for session in manifest["sessions"]] == [1, 2]


def test_a_run_that_begins_anew_says_nothing_of_threads(tmp_path, monkeypatch, capsys):
    overrides = small(tmp_path, "dense", "epochs=1")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "_all_epochs", killed)
        with pytest.raises(KeyboardInterrupt):
            train.run(overrides)
    train.run([*overrides, "runtime.threads=2"])
    assert "CPU threads" not in capsys.readouterr().err


def test_a_finished_run_is_not_answered_for_other_data(tmp_path, monkeypatch):
    overrides = small(tmp_path, "dense", "epochs=1")
    folder = train.run(overrides)
    assert train.run(overrides) == folder
    monkeypatch.setattr(TensorImages, "digest", "another")
    with pytest.raises(
        InputError, match=r"belongs to the data of SHA-256 .*, and another is what lies there"
    ):
        train.run(overrides)
