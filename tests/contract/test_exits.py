"""How commands end: one sentence or none, never a traceback, whatever becomes of their output or hits them."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.exits import Unfailing
from tests.helpers import small
from tests.limits import HANG_SECONDS

ROOT = Path(__file__).parents[2]


def command(*words):
    return [sys.executable, "-m", "experiments.train", *words]


def test_what_cannot_be_written_to_stderr_is_dropped():
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    stderr = Unfailing(Full())
    assert stderr.write("epoch 1") == 7
    stderr.flush()


@pytest.mark.long
def test_output_never_ends_a_training(tmp_path):
    """Nobody reads stderr, and stdout has no room."""
    reader, writer = os.pipe()
    os.close(reader)
    with open("/dev/full", "w") as full:
        subprocess.run(
            command(*small(tmp_path, "dense", "epochs=1")), cwd=ROOT, stderr=writer, stdout=full
        )
    os.close(writer)
    (done,) = tmp_path.rglob("done")
    assert done.is_file()


@pytest.mark.long
def test_closed_output_never_ends_a_training(tmp_path):
    words = " ".join(f"'{word}'" for word in command(*small(tmp_path, "dense", "epochs=1")))
    subprocess.run(["sh", "-c", f"{words} >&- 2>&-"], cwd=ROOT)
    (done,) = tmp_path.rglob("done")
    assert done.is_file()


def python(program):
    """As `python -m` begins: its name is all that argv holds while it imports the package."""
    return subprocess.run(
        [sys.executable, "-c", f"import os, signal, sys; sys.argv = ['-m']; {program}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.parametrize("package", ["experiments", "analysis"])
def test_ctrl_c_while_a_command_imports_leaves_no_traceback(package):
    done = python(f"import {package}; os.kill(os.getpid(), signal.SIGINT)")
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("package", ["experiments", "analysis"])
def test_an_environment_without_the_suites_packages_is_refused_in_one_sentence(package):
    done = python(
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'hydra' else find(name, *rest)\n"
        f"import {package}"
    )
    assert done.returncode == 2
    assert re.fullmatch(
        "error: .* after `make setup`, with `source .venv/bin/activate`\n", done.stderr
    )


def test_ctrl_c_before_the_training_is_one_sentence():
    done = python(
        "from experiments.exits import plain_exits\nwith plain_exits(): os.kill(os.getpid(), signal.SIGINT)"
    )
    assert done.returncode == 130
    assert done.stderr == "stopped at once: the same command continues from what is saved\n"


@pytest.mark.long
def test_a_terminal_that_closes_is_a_signal_like_the_others(tmp_path):
    process = subprocess.Popen(
        command(*small(tmp_path, "dense", "epochs=400")),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    while not list(tmp_path.rglob("last.pt")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    said = process.communicate(timeout=HANG_SECONDS)[1]
    assert process.returncode == 75
    assert said.endswith("interrupted: the same command continues this run\n")
