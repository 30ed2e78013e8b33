"""The W&B mirror, read back from the offline run's file, equals metrics.jsonl."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import pytest
import yaml

from experiments import train
from experiments.configuration import CONF, compose
from experiments.runs.folder import Record
from experiments.runs.identity import config_hash
from experiments.training import tracking
from psap_core import InputError
from tests.helpers import refusal, small, state_of
from tests.training.wandb_server import WandbServer, serving

ROOT = Path(__file__).parents[2]
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


def recorded(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def mirrored(folder: Path) -> list[dict]:
    """The epochs in the one offline run, without wandb's own values."""
    return [
        {key: value for key, value in record["history"]["item"].items() if not key.startswith("_")}
        for record in records(folder)
        if record["type"] == "history"
    ]


def kill(point: str, overrides: list[str]) -> None:
    """Train until the point of killed_runs.POINTS, where the run dies."""
    command = [sys.executable, "-m", "tests.training.killed_runs", json.dumps([[point, overrides]])]
    own_service = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    subprocess.run(command, check=True, cwd=ROOT, env=own_service)


@pytest.mark.long
@needs_wandb
@pytest.mark.parametrize(
    "method", ["psap", *(pytest.param(m, marks=pytest.mark.long) for m in ("dense", "sfp", "l1"))]
)
def test_the_mirror_equals_metrics_jsonl(method, tmp_path):
    folder = train.run(small(tmp_path, method, "tracking.mode=offline"))
    log = records(folder)
    rows = recorded(folder)
    assert mirrored(folder) == rows
    if method == "psap":
        assert set().union(*rows) >= KEYS

    (run,) = (record["run"] for record in log if record["type"] == "run")
    recipe, hash8, _ = folder.parts[-3:]
    assert run["run_id"] == f"{hash8}-s0"
    assert run["display_name"] == f"{recipe}/{method}/s0"
    assert run["job_type"] == method
    assert run["tags"] == [recipe, "digits", "resnet20"]
    config = run["config"]["update"]
    assert config["method"]["name"] == method
    manifest = json.loads((folder / "manifest.json").read_text())
    provenance = config["provenance"]
    assert manifest["sessions"][-1]["commit"].startswith(provenance["commit"].rstrip("+"))
    assert provenance["versions"] == manifest["versions"]
    assert provenance["versions"].keys() >= {"psap-core", "torch", "torchvision"}
    assert provenance["device"] == manifest["device"]
    assert any(record["type"] == "stats" for record in log)  # of the system

    summary = json.loads((folder / "summary.json").read_text())
    said = {}
    for record in log:
        said |= record.get("summary", {}).get("update", {})
    assert {key: said[key] for key in summary} == summary
    assert said["latency_ms"] > 0


@needs_wandb
@pytest.mark.long
def test_a_killed_run_leaves_a_mirror_and_continued_it_is_whole(tmp_path):
    """Killed with wandb's own process: nothing gets the time to close a file."""
    overrides = small(tmp_path, "dense", "tracking.mode=offline")
    kill("fourth epoch not logged, all processes", overrides)
    (folder,) = tmp_path.glob("*/*/seed0")
    before = recorded(folder)
    assert mirrored(folder) == before
    assert [row["epoch"] for row in before] == [1, 2, 3]

    train.run(overrides)
    assert mirrored(folder) == recorded(folder)
    assert recorded(folder)[:3] == before


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
            self.starting_step = 0

        def define_metric(self, *_, **__):
            pass

        def log(self, row, step, commit):
            assert (step, commit) == (row["epoch"], True)
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


@pytest.mark.long
@needs_wandb
def test_a_run_tells_whose_it_is_what_it_is_about_and_gives_its_network(tmp_path):
    asked = ["tracking.entity=lab", "tracking.tags=[paper,digits]", "tracking.notes='a try'"]
    overrides = small(tmp_path, "dense", "epochs=1", "tracking.mode=offline")
    folder = train.run([*overrides, *asked, "tracking.artifact=true"])
    assert folder == Record(compose("train", overrides)).folder
    log = records(folder)
    (run,) = (record["run"] for record in log if record["type"] == "run")
    assert run["entity"] == "lab"
    assert run["notes"] == "a try"
    assert run["tags"] == ["digits_resnet20", "digits", "resnet20", "paper"]
    (artifact,) = (record["artifact"] for record in log if record["type"] == "artifact")
    assert (artifact["name"], artifact["type"]) == (run["run_id"], "model")
    contents = {entry["path"]: entry["local_path"] for entry in artifact["manifest"]["contents"]}
    assert contents == {path.name: str(path) for path in (folder / "export").iterdir()}


def test_a_tag_that_wandb_would_refuse_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    for tag in ("''", "x" * 65):
        said = refusal(train.main, small(tmp_path, "dense", f"tracking.tags=[{tag}]"), monkeypatch)
        assert said.startswith("tracking.tags: ")
        assert said.endswith(" must have 1 to 64 characters")
    assert list(tmp_path.iterdir()) == []


@needs_wandb
@pytest.mark.long
def test_tracking_changes_no_result(tmp_path):
    states = []
    for mode in ("disabled", "offline"):
        folder = train.run(small(tmp_path / mode, "psap", f"tracking.mode={mode}"))
        states.append(state_of(folder))
    assert states[0] == states[1]


@needs_wandb
def test_a_mirror_that_breaks_ends_no_training(tmp_path, monkeypatch, capsys):
    import wandb

    def log(*_, **__):
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(wandb.Run, "log", log)
    folder = train.run(small(tmp_path, "dense", "epochs=2", "tracking.mode=offline"))
    assert (folder / "done").exists()
    assert capsys.readouterr().err.count("ConnectionResetError Connection lost") == 1


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[WandbServer]:
    """A stand-in for W&B's server, with a login at it."""
    import wandb

    with serving() as server:
        environment = {
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": "0" * 40,
            "WANDB_INIT_TIMEOUT": "5",
            **{
                f"WANDB_{name}_DIR": str(tmp_path / "wandb") for name in ("CONFIG", "CACHE", "DATA")
            },
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        wandb.teardown()  # it reads the environment once
        yield server
        wandb.teardown()


def sync(*arguments: str | Path) -> None:
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run([wandb, "sync", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_wandb
@pytest.mark.long
def test_an_online_run_arrives_and_goes_on_where_the_server_stands(server, tmp_path):
    overrides = small(tmp_path, "dense", "tracking.mode=online", "tracking.notes=mine")
    kill("logged, no checkpoint yet", overrides)  # two epochs are logged, one has a checkpoint
    folder = train.run(overrides)
    (run_id,) = server.created
    assert run_id == f"{folder.parent.name}-s0"
    created = server.created[run_id]
    assert created["notes"] == "mine"
    assert created["tags"] == ["digits_resnet20", "digits", "resnet20"]
    assert json.loads(created["config"])["provenance"]["value"]["versions"]["torch"]
    arrived = {row["epoch"]: row["train/loss"] for row in server.rows(run_id)}
    assert arrived == {row["epoch"]: row["train/loss"] for row in recorded(folder)}
    assert (
        server.summary[run_id]["top1"] == json.loads((folder / "summary.json").read_text())["top1"]
    )
    assert server.exit_codes[run_id] == 0


@needs_wandb
@pytest.mark.long
def test_a_run_that_was_deleted_on_the_server_is_logged_under_another_id(server, tmp_path, capsys):
    overrides = small(tmp_path, "dense", "tracking.mode=online")
    kill("half a checkpoint written", overrides)
    (deleted,) = server.created
    server.deleted.add(deleted)
    folder = train.run(overrides)
    assert f"trying {deleted}-2" in capsys.readouterr().err
    assert server.rows(f"{deleted}-2") == recorded(folder)


@needs_wandb
@pytest.mark.long
def test_a_run_of_a_sweep_has_the_id_that_the_agent_gave_it(server, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    folder = train.run(small(tmp_path, "dense", "epochs=1", "tracking.mode=online"))
    assert server.created["given"]["sweep"] == "abc"
    assert server.rows("given") == recorded(folder)


@needs_wandb
@pytest.mark.long
def test_the_mirror_of_a_killed_run_is_synced_and_again_when_it_is_done(server, tmp_path):
    overrides = small(tmp_path, "dense", "tracking.mode=offline")
    kill("fourth epoch not logged, all processes", overrides)
    (folder,) = tmp_path.glob("*/*/seed0")
    sync(*folder.glob("wandb/offline-run-*"))
    (run_id,) = server.created
    assert server.rows(run_id) == recorded(folder)
    train.run(overrides)
    sync(*folder.glob("wandb/offline-run-*"))
    assert server.rows(run_id) == recorded(folder)
    assert len(server.rows(run_id)) == 4

    server.deleted.add(run_id)
    sync("--include-synced", "--id", f"{run_id}-2", *folder.glob("wandb/offline-run-*"))
    assert server.rows(f"{run_id}-2") == recorded(folder)


@needs_wandb
def test_the_example_of_a_sweep_starts_runs_that_can_be(monkeypatch):
    """As wandb's agent fills in the command, for every point of the grid."""
    from wandb.sdk.launch.sweeps import utils

    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    sweep = yaml.safe_load((Path(CONF) / "sweep" / "psap_digits.yaml").read_text())
    names, values = zip(*sweep["parameters"].items(), strict=True)
    hashes = set()
    for point in product(*(each["values"] for each in values)):
        chosen = {name: {"value": value} for name, value in zip(names, point, strict=True)}
        arguments = utils.create_sweep_command_args({"args": chosen})["args_no_hyphens"]
        *command, last = utils.create_sweep_command(list(sweep["command"]))
        assert (command[1:4], last) == (["python", "-m", "experiments.train"], "${args_no_hyphens}")
        cfg = compose("train", [*command[4:], *arguments])
        assert (cfg.runs_dir, cfg.tracking.mode) == ("runs/sweeps/abc", "online")
        assert cfg.data.validation_images > 0
        hashes.add((config_hash(cfg), cfg.seed))
    assert len(hashes) == 3 * 3 * 2


def test_wandb_is_imported_in_one_module_only():
    package = Path(train.__file__).parent
    importing = [path for path in package.rglob("*.py") if "import wandb" in path.read_text()]
    assert importing == [Path(tracking.__file__)]
