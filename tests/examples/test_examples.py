"""Every example runs and does what it says."""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from psap_core import macs
from tests.helpers import bits
from tests.limits import HANG_SECONDS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "examples.md").read_text()
FILES = sorted((ROOT / "examples").glob("*.py"))


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(words: list[str]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def assert_half_is_cut_exactly(model, small, pruner, images) -> None:
    """Half of the MACs, counted anew, and the outputs of the masked network."""
    assert macs(small, images[:1]) == pruner.plan.macs <= 0.5 * macs(model, images[:1])
    assert pruner.plan.macs_cut < 0.55
    with torch.no_grad():
        torch.testing.assert_close(small.eval()(images), model.eval()(images))


# ---------------------------------------------------------------------------- the page


def test_the_page_lists_every_example_with_the_command_of_its_docstring():
    rows = dict(
        re.findall(
            r"^\| \[(\w+\.py)\]\(\.\./examples/\1\) \|.*\| `([^`]+)` \|$", PAGE, re.MULTILINE
        )
    )
    assert {*rows} == {path.name for path in FILES}
    for path in FILES:
        assert f"\n    {rows[path.name]}\n" in path.read_text()


@pytest.mark.long
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_command_of_an_example_runs(path, tmp_path):
    pytest.importorskip("lightning")
    commands = re.findall(r"^    python (.+)$", path.read_text(), re.MULTILINE)
    assert commands
    for command in commands:
        words = shlex.split(command.replace("runs/", f"{tmp_path}/"))
        run = start(words)
        said, _ = run.communicate(timeout=HANG_SECONDS)
        assert run.returncode == 0
        assert re.search(r"5\d\.\d% of the MACs cut", said)


# ---------------------------------------------------------------------------- plain_loop.py


class Killed(Exception):
    pass


def plain_loop(folder: Path, kept_epochs: int | None = None, amp: bool = False):
    """The example's result; ended when one more epoch than is kept has been trained."""
    module = example("plain_loop")
    module.AMP = amp
    save = module.save

    def end_or_save(path: Path, parts) -> None:
        if parts["pruner"].epochs_done - 1 == kept_epochs:
            raise Killed
        save(path, parts)

    module.save = end_or_save
    return module.main(folder, epochs=5)


@pytest.mark.long
@pytest.mark.parametrize("amp", [False, True])
def test_the_plain_loop_ends_the_same_after_a_kill(tmp_path, amp):
    """Killed before the freeze, when filters are suspended and may come back."""
    model, small, pruner = plain_loop(tmp_path / "whole", amp=amp)
    with pytest.raises(Killed):
        plain_loop(tmp_path / "killed", kept_epochs=2, amp=amp)
    again = plain_loop(tmp_path / "killed", amp=amp)
    assert [bits(part.state_dict()) for part in again] == [
        bits(part.state_dict()) for part in (model, small, pruner)
    ]
    images = example("plain_loop").digits()[1].tensors[0]
    assert_half_is_cut_exactly(model, small, pruner, images)


@pytest.mark.long
def test_the_plain_loop_bears_a_real_kill(tmp_path):
    whole = start(["examples/plain_loop.py", str(tmp_path / "whole")])
    said, _ = whole.communicate(timeout=HANG_SECONDS)
    words = ["examples/plain_loop.py", str(tmp_path / "killed")]
    run = start(words)
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=HANG_SECONDS)
    kept = torch.load(tmp_path / "killed" / "checkpoint.pt")["pruner"]["epochs_done"]
    after, _ = start(words).communicate(timeout=HANG_SECONDS)
    assert 1 <= kept < 20
    assert after.splitlines() == said.splitlines()[kept:]
    states = [torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed")]
    assert bits(states[0]) == bits(states[1])


# ---------------------------------------------------------------------------- the others


@pytest.mark.long
def test_the_unet_loses_half_of_its_macs_and_finds_the_discs():
    module = example("unet_masks")
    model, small, pruner = module.main(epochs=8)
    test = module.discs(64, seed=1)
    assert_half_is_cut_exactly(model, small, pruner, test.tensors[0])
    assert module.overlap(small, test) > 0.5


@pytest.mark.long
def test_the_averaged_network_of_timm_is_what_is_exported():
    module = example("timm_training")
    average, small, pruner = module.main()
    _, test = module.digits(32)
    assert_half_is_cut_exactly(average, small, pruner, test.tensors[0])
    assert module.accuracy(small, test) > 0.7


@pytest.mark.long
def test_every_form_of_the_small_network_computes_the_same(tmp_path):
    module = example("after_pruning")
    pruner, logits = module.main(tmp_path)
    assert 0.5 <= pruner.plan.macs_cut < 0.55
    assert pruner.is_compact
    assert torch.equal(logits["loaded"], logits["small"])
    torch.testing.assert_close(logits["ONNX"], logits["small"], rtol=1e-4, atol=1e-4)
    same = logits["quantised"].argmax(1) == logits["small"].argmax(1)
    assert same.float().mean() > 0.95
    assert not torch.equal(logits["quantised"], logits["small"])


@pytest.mark.long
def test_lightning_goes_on_from_its_checkpoint(tmp_path):
    pytest.importorskip("lightning")
    module = example("lightning_callback")
    save = module.Pruning.state_dict

    def end_or_save(pruning):
        if pruning.pruner.epochs_done == 3:
            raise Killed
        return save(pruning)

    module.Pruning.state_dict = end_or_save
    with pytest.raises(Killed):
        module.main(tmp_path, epochs=6)
    kept = torch.load(tmp_path / "last.ckpt", weights_only=False)["callbacks"]["Pruning"]
    assert kept["epochs_done"] == 2
    module.Pruning.state_dict = save
    model, small, pruner = module.main(tmp_path, epochs=6)
    assert pruner.epochs_done == 6
    assert_half_is_cut_exactly(model, small, pruner, module.Digits().images[1437:])


@pytest.mark.long
def test_two_processes_of_lightning_make_the_same_plan(tmp_path):
    pytest.importorskip("lightning")
    run = start(["examples/lightning_callback.py", str(tmp_path), "--processes", "2"])
    said, _ = run.communicate(timeout=HANG_SECONDS)
    assert run.returncode == 0
    plans = re.findall(r"process (\d): (5\d\.\d%) of the MACs cut, .*, plan (\w{8})", said)
    assert {process for process, _, _ in plans} == {"0", "1"}
    assert plans[0][1:] == plans[1][1:]
