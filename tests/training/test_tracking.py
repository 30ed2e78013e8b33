"""The W&B mirror, read back from the offline run's file, equals metrics.jsonl."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments import train
from experiments.training import tracking
from psap_core import InputError
from tests.helpers import refusal, small

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
KEYS = {
    "epoch",
    "train/loss",
    "train/lr",
    "train/images_per_second",
    "eval/top1",
    *(
        f"psap/{key}"
        for key in (
            "macs_cut",
            "macs_cut_target",
            "mask_churn",
            "proposed",
            "suspended",
            "restored",
        )
    ),
    "psap/step_seconds",
    *(
        f"layer/{key}/layer2.0.conv1"
        for key in (
            "weight_sparsity_ratio",
            "prune_ratio",
            "kept",
            "grad_norm_live",
            "grad_norm_suspended",
            "utility",
        )
    ),
}


def records(folder: Path) -> list[dict]:
    """The transaction log of the one offline run in a run folder."""
    (run,) = folder.glob("wandb/offline-run-*")
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run(
        [wandb, "leet", "inspect", run, "--json"], capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_wandb
@pytest.mark.parametrize(
    "method", ["psap", *(pytest.param(m, marks=pytest.mark.long) for m in ("dense", "sfp", "l1"))]
)
def test_the_mirror_equals_metrics_jsonl(method, tmp_path):
    folder = train.run(small(tmp_path, method, "tracking.mode=offline"))
    log = records(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    history = [record["history"]["item"] for record in log if record["type"] == "history"]
    mirrored = [
        {key: value for key, value in items.items() if not key.startswith("_")} for items in history
    ]
    assert mirrored == rows
    if method == "psap":
        assert set().union(*rows) >= KEYS

    (run,) = (record["run"] for record in log if record["type"] == "run")
    recipe, hash8, _ = folder.parts[-3:]
    assert run["run_id"] == f"{hash8}-s0"
    assert run["display_name"] == f"{recipe}/{method}/s0"
    assert run["job_type"] == method
    assert run["tags"] == [recipe, "digits", "resnet20"]
    assert run["config"]["update"]["method"]["name"] == method

    summary = json.loads((folder / "summary.json").read_text())
    said = {}
    for record in log:
        said |= record.get("summary", {}).get("update", {})
    assert {key: said[key] for key in summary} == summary


@needs_wandb
def test_a_mirror_that_was_interrupted_is_written_anew(tmp_path, monkeypatch):
    overrides = small(tmp_path, "dense", "epochs=1", "tracking.mode=offline")
    with monkeypatch.context() as patch:
        patch.setattr("experiments.runs.folder.Record.finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.run(overrides)
    folder = train.run(overrides)
    assert len(list(folder.glob("wandb/offline-run-*"))) == 1
    assert (folder / "done").exists()


def test_without_wandb_an_offline_run_works_and_an_online_run_is_refused(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    train.run(small(tmp_path, "dense", "epochs=1", "tracking.mode=offline"))
    assert "wandb is not installed" in capsys.readouterr().err
    with pytest.raises(InputError, match="needs wandb"):
        train.run(small(tmp_path, "dense", "epochs=2", "tracking.mode=online"))


@needs_wandb
def test_what_wandbs_server_refuses_is_one_sentence(tmp_path, monkeypatch):
    import wandb

    def init(**_):
        raise wandb.errors.UsageError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    said = refusal(
        train.main, small(tmp_path, "dense", "epochs=1", "tracking.mode=online"), monkeypatch
    )
    assert (
        said
        == "tracking.mode=online: wandb says: No API key configured. Use `wandb login` to log in"
    )


def test_online_runs_are_logged_live_under_an_id_that_resumes(tmp_path, monkeypatch):
    class FakeRun:
        def __init__(self, options):
            self.options, self.rows, self.summary = options, [], {}

        def define_metric(self, *_, **__):
            pass

        def log(self, row, step):
            assert step == row["epoch"]
            self.rows.append(row)

        def finish(self):
            self.finished = True

    class FakeWandb:
        Settings = dict
        Error = ValueError

        @staticmethod
        def init(**options):
            runs.append(FakeRun(options))
            return runs[-1]

    runs: list[FakeRun] = []
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb)
    folder = train.run(small(tmp_path, "dense", "epochs=2", "tracking.mode=online"))
    (run,) = runs
    assert run.options["resume"] == "allow"
    assert run.options["id"] == f"{folder.parent.name}-s0"
    assert [row["epoch"] for row in run.rows] == [1, 2]
    assert run.summary["epochs"] == 2
    assert run.finished


def test_wandb_is_imported_in_one_module_only():
    package = Path(train.__file__).parent
    importing = [path for path in package.rglob("*.py") if "import wandb" in path.read_text()]
    assert importing == [Path(tracking.__file__)]
