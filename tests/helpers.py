"""A run that takes a second: a quarter-width ResNet-20 on some of the digits."""

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from hydra.core.global_hydra import GlobalHydra

from experiments import entry
from experiments.configuration import compose
from experiments.training.checkpoint import load_checkpoint

# What two equal runs may differ in.
TIMING_KEYS = ("train/images_per_second", "train/dense_seconds", "psap/step_seconds")
TIMING_FIELDS = ("train_seconds", "train_seconds_dense_ratio", "prune_seconds")
METHODS = ("dense", "thin", "sfp", "fpgm", "l1", "l2", "random", "taylor", "psap")
SMALL = [
    "experiment=digits_resnet20",
    "model.width=0.25",
    "data.train_images=320",
    "optim.batch_size=64",
    "epochs=4",
    "runtime.threads=1",
    "tracking.mode=disabled",
]


def small(runs_dir: Path, method: str, *overrides: str) -> list[str]:
    """Overrides of a small run; `psap` steps after epochs 1, 2 and 3 of 4, the last one freezes."""
    schedule = ["method.start=1", "method.ramp_end=2", "method.freeze=3", "method.pulse_batches=2"]
    extra = schedule if method == "psap" else []
    return [*SMALL, f"method={method}", f"runs_dir={runs_dir}", *extra, *overrides]


def refusal(main: Any, arguments: list[str], monkeypatch: Any) -> str:
    """Run a command in this process; it must leave with exit code 2 and one sentence, which is returned.

    Its configuration is composed as everywhere but on a command line: with the same result, in a tenth of the time.
    """
    GlobalHydra.instance().clear()
    monkeypatch.setattr(entry, "_from_command_line", lambda name: [compose(name, sys.argv[1:])])
    monkeypatch.setattr("sys.argv", ["command", *arguments])
    out, err = io.StringIO(), io.StringIO()
    code = None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as exit:
            code = exit.code
    assert code == 2, (code, err.getvalue())
    *before, sentence = err.getvalue().splitlines()
    assert not any(line.startswith(("error", "Traceback")) for line in before), before
    assert sentence.startswith("error: ")
    return sentence.removeprefix("error: ")


def state_of(folder: Path) -> dict[str, Any]:
    """All that must be equal, bit for bit, in two runs that are equal: timing fields are left out."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    checkpoint = load_checkpoint(folder / "checkpoint" / "last.pt")
    return {
        "metrics": [
            {key: value for key, value in row.items() if key not in TIMING_KEYS} for row in rows
        ],
        "summary": {key: value for key, value in summary.items() if key not in TIMING_FIELDS},
        "plans": {path.name: path.read_text() for path in sorted(folder.glob("p*s/epoch_*.json"))},
        "spec": (folder / "export" / "spec.json").read_text(),
        "weights": (folder / "export" / "weights.safetensors").read_bytes(),
        **{key: bits(checkpoint[key]) for key in ("model", "optimizer", "method", "ranks")},
    }


def bits(state: Any) -> Any:
    """A nested state with every tensor as its bytes, so that == compares bit for bit."""
    if isinstance(state, torch.Tensor):
        return (
            str(state.dtype),
            tuple(state.shape),
            state.contiguous().view(-1).cpu().numpy().tobytes(),
        )
    if isinstance(state, dict):
        return {key: bits(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [bits(value) for value in state]
    return state
