"""The job scripts on a real Slurm: done, continued, refused, cancelled."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torchvision.models import resnet18

from experiments.suites.spec import read_suite
from tests.data.photographs import sample_folder
from tests.slurm.cluster import PROGRAMS, Cluster, running_cluster, wait_until

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
QUICK = ["runtime.threads=1", "runtime.workers=0"]
TINY = [
    "runtime.device=cpu",
    "data.image_size=32",
    "epochs=2",
    "optim.batch_size=16",
    *QUICK,
]
PHOTOGRAPHS = ["data.root=photographs", *TINY]
DIGITS = ["model.width=0.25", "data.train_images=320", "optim.batch_size=64", *QUICK]
FILLED_IN = {  # the lines of the site file that every cluster has to fill in
    "export SBATCH_ACCOUNT=FILL_IN.*": "",
    "export SBATCH_PARTITION=FILL_IN.*": "",
    "export PSAP_DATA=FILL_IN": "",
}
COPY_A_SPLIT = """\
stage_data() {
  mkdir -p "$PSAP_NODE_DATA/imagenet"
  if [ "$SLURM_NODEID" = 0 ]; then
    cp -r photographs/train "$PSAP_NODE_DATA/imagenet"
  else
    sleep 3
    cp -r photographs/val "$PSAP_NODE_DATA/imagenet"
  fi
}"""
FAIL_ON_A_NODE = """\
stage_data() {
  if [ "$SLURM_NODEID" = 1 ]; then no_such_program; fi
  echo staged
}"""
PSAP = ["method=psap", *DIGITS, "epochs=30"]  # long enough to be stopped


class Checkout:
    """A working copy of the repository with a site file, and what its user does there."""

    def __init__(self, root: Path, cluster: Cluster) -> None:
        self.root = root
        self.cluster = cluster
        for package in ("experiments", "psap_core"):
            (root / package).symlink_to(ROOT / package)
        (root / "slurm" / "logs").mkdir(parents=True)
        for script in (ROOT / "slurm").glob("*.sh"):
            if script.name != "site.sh":
                shutil.copy(script, root / "slurm")
        first_port = 20000 + os.getpid() % 120 * 100  # other tests may run beside these
        self.ports = f"PSAP_PORTS={first_port}-{first_port + 99}"
        self.write_site({})

    def write_site(self, changes: dict[str, str]) -> None:
        """slurm/site.sh from its template, for the Python that runs the tests unless its line is changed, too."""
        text = (ROOT / "slurm" / "site.example.sh").read_text()
        changes = {
            **FILLED_IN,
            "# venv, as .*": f"PATH={Path(sys.executable).parent}:$PATH",
            "PSAP_PORTS=.*": self.ports,
            **changes,
        }
        for pattern, line in changes.items():
            text, found = re.subn(rf"^{pattern}$", line, text, flags=re.MULTILINE)
            assert found == 1, pattern
        (self.root / "slurm" / "site.sh").write_text(text)

    def submit(self, *arguments: str) -> str:
        """sbatch; returns the job's id."""
        return self.cluster.ask("sbatch", "--parsable", *arguments, cwd=self.root).strip()

    def suite(self, cells: dict[str, list[str]]) -> str:
        """Write a suite of small networks on digits, of the cells' overrides; returns what it is asked for by."""
        rows = [
            {"name": name, "recipe": "digits_resnet20", "overrides": own}
            for name, own in cells.items()
        ]
        (self.root / "suite.yaml").write_text(
            json.dumps({"title": "Digits", "seeds": [0], "cells": rows})
        )
        return "suite.yaml"

    def submit_psap(self, *options: str) -> str:
        """sbatch the run of `uninterrupted`; returns the task's id."""
        array = self.submit(
            "--array=0", *options, "slurm/cifar10_table.sh", self.suite({"psap": PSAP})
        )
        return f"{array}_0"

    def log(self, job: str) -> str:
        path = Path(self.cluster.job(job)["StdOut"])
        return path.read_text() if path.exists() else ""

    def program(self, name: str, command: str) -> Path:
        """A program that notes where it is used and then runs a shell's command."""
        path = self.root / "programs" / name
        path.parent.mkdir()
        note = f'echo "step ${{SLURM_STEP_ID:-none}} node $SLURM_NODEID" >>{path}.uses'
        path.write_text(f"#!/bin/sh\n{note}\n{command}\n")
        path.chmod(0o755)
        return path

    def uses(self, program: Path) -> set[str]:
        """Who has used it: step none is the job's script itself."""
        return set(Path(f"{program}.uses").read_text().splitlines())

    def signal_shell_on_node(self, job: str) -> None:
        """SIGUSR1 to the process that Slurm itself started on the node, and to none of its children."""
        shown = self.cluster.job(job)
        step = f"{shown['JobId']}.0"
        pids = self.cluster.ask("scontrol", "listpids", step, shown["BatchHost"])
        (pid,) = re.findall(rf"^(\d+) +{shown['JobId']} +0 +0 ", pids, re.MULTILINE)
        os.kill(int(pid), signal.SIGUSR1)

    def finish(self, job: str) -> str:
        """Wait for the job's end; returns its exit code."""
        self.cluster.wait_for(job, *ENDS)
        return self.cluster.job(job)["ExitCode"].split(":")[0]

    def done(self, job: str) -> None:
        """Wait for the job, which must do what it was asked to."""
        code = self.finish(job)
        assert (self.cluster.state(job), code) == ("COMPLETED", "0"), self.log(job)
        assert self.log(job).splitlines()[-1].endswith(": done")

    def run_folder(self, runs: str) -> Path:
        """The only run of a folder."""
        return _only_run(self.root / runs)

    def wait_for_epoch(self, job: str, runs: str) -> None:
        """Wait until the job has a checkpoint of an epoch."""

        def saved() -> bool:
            assert self.cluster.state(job) not in ENDS, self.log(job)
            return any((self.root / runs).glob("*/*/*/checkpoint/last.pt"))

        wait_until(saved, f"an epoch in {runs}")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: the packages slurm-wlm and munge")
    with running_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def checkout(tmp_path, cluster) -> Checkout:
    return Checkout(tmp_path, cluster)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, cluster) -> Path:
    """The run folder of PSAP that nobody stopped, and no Slurm started."""
    runs = tmp_path_factory.mktemp("uninterrupted")
    command = [
        sys.executable,
        "-m",
        "experiments.train",
        "experiment=digits_resnet20",
        *PSAP,
        f"runs_dir={runs}",
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return _only_run(runs)


def test_an_imagenet_job_trains_exports_and_is_done(checkout):
    """On some hundred photographs of Imagenette, where there are some."""
    images = _photographs(checkout.root / "photographs")
    command = ["slurm/imagenet_resnet50.sh", *PHOTOGRAPHS, "data.image_size=64"]
    job = checkout.submit(*command)
    checkout.done(job)
    assert (checkout.root / "slurm" / "logs" / f"imagenet_resnet50-{job}.log").exists()
    folder = checkout.run_folder("runs")
    assert folder.parents[1].name == "imagenet_resnet50"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["model"], summary["method"], summary["train_images"]) == (
        "resnet50",
        "psap",
        images,
    )
    assert (folder / "export" / "weights.safetensors").exists()
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
    again = checkout.submit(*command, "suite=mine", "cell=psap")
    assert checkout.finish(again) == "0"
    assert checkout.log(again).endswith("done already\n")
    assert json.loads((folder / "summary.json").read_text())["suite"] == "mine"


def test_a_job_trains_one_run_of_any_recipe(checkout):
    words = ["experiment=digits_resnet20", "method=dense", "epochs=1", *DIGITS]
    job = checkout.submit("slurm/train.sh", *words)
    checkout.done(job)
    assert (checkout.root / "slurm" / "logs" / f"psap_train-{job}.log").exists()
    folder = checkout.run_folder("runs")
    assert folder.parents[1].name == "digits_resnet20"
    assert json.loads((folder / "summary.json").read_text())["method"] == "dense"

    no_recipe = checkout.submit("slurm/train.sh", "seed=1")
    assert checkout.finish(no_recipe) == "2"
    assert "no recipe is chosen: add experiment=" in checkout.log(no_recipe)


def test_a_job_starts_from_given_weights(checkout):
    sample_folder(checkout.root / "photographs", train=16, val=4, size=(48, 40))
    given = resnet18(num_classes=2).state_dict()
    save_file(given, checkout.root / "given.safetensors")
    standing_still = [
        "method=dense",
        "optim.lr=1e-30",
        "epochs=1",
        "model.weights=given.safetensors",
    ]
    checkout.done(
        checkout.submit("slurm/imagenet_resnet18.sh", "pretrained", *PHOTOGRAPHS, *standing_still)
    )
    folder = checkout.run_folder("runs")
    assert folder.parents[1].name == "imagenet_resnet18_pretrained"
    exported = load_file(folder / "export" / "weights.safetensors")
    moved = [
        (exported[name] - tensor).abs().max().item()
        for name, tensor in given.items()
        if name.endswith("weight")
    ]
    assert max(moved) < 1e-25  # a step changes nothing but weights that are exactly 0


def test_an_array_trains_its_cells_and_requeues_only_the_task_that_is_signalled(
    checkout, uninterrupted
):
    """The signal goes to the shell that started torchrun, and to no other process."""
    cells = {
        "dense": ["method=dense", "epochs=2"],
        "thin": ["method=thin", "target_macs_cut=0.5", "epochs=2"],
        "psap": [*PSAP, f"runs_dir={checkout.root / 'stopped'}"],
    }
    array = checkout.submit("--array=0-2", "slurm/cifar10_table.sh", checkout.suite(cells), *DIGITS)
    last = f"{array}_2"  # the task that has the id of the whole array
    checkout.wait_for_epoch(last, "stopped")
    checkout.signal_shell_on_node(last)
    for index in range(3):
        checkout.done(f"{array}_{index}")
    restarts = [checkout.cluster.job(f"{array}_{index}")["Restarts"] for index in range(3)]
    assert restarts == ["0", "0", "1"], checkout.log(last)
    assert "interrupted with a checkpoint, requeued" in checkout.log(last)
    runs = (checkout.root / "runs").glob("*/*/*/summary.json")
    assert {json.loads(path.read_text())["method"] for path in runs} == {"dense", "thin"}
    _equal(checkout.run_folder("stopped"), uninterrupted)


def test_a_preempted_job_makes_room_and_continues(checkout, uninterrupted):
    job = checkout.submit_psap("--exclusive", "--nodelist=localhost")
    checkout.wait_for_epoch(job, "runs")
    urgent = checkout.submit(
        "--partition=urgent", "--exclusive", "--nodelist=localhost", "--wrap=exit 0"
    )
    assert (
        checkout.finish(urgent) == "0"
    )  # SIGTERM has stopped the other one before its grace of a minute was over
    checkout.done(job)
    assert checkout.cluster.job(job)["Restarts"] == "1", checkout.log(job)
    _equal(checkout.run_folder("runs"), uninterrupted)


def test_a_job_whose_node_fails_continues_on_another_one(checkout, uninterrupted):
    job = checkout.submit_psap()
    checkout.wait_for_epoch(job, "runs")
    first_epoch = _first_epoch(checkout.run_folder("runs"))
    failing = checkout.cluster.job(job)["BatchHost"]
    node = ["scontrol", "update", f"nodename={failing}"]
    checkout.cluster.ask(*node, "state=down", "reason=test")
    try:
        checkout.done(job)
    finally:
        checkout.cluster.ask(*node, "state=resume")
    after = checkout.cluster.job(job)
    assert after["Restarts"] == "1", checkout.log(job)
    assert after["BatchHost"] != failing
    assert (
        _first_epoch(checkout.run_folder("runs")) == first_epoch
    )  # with its speed: it was trained once
    _equal(checkout.run_folder("runs"), uninterrupted)


def test_two_nodes_are_stopped_and_continued_and_equal_two_gpus_of_one_node(checkout):
    sample_folder(checkout.root / "photographs", train=64, val=4, size=(48, 40))
    script = ["slurm/imagenet_resnet34.sh", *PHOTOGRAPHS, "epochs=6", "runtime.workers=1"]
    nodes = checkout.submit("--nodes=2", *script, "runs_dir=stopped")
    checkout.wait_for_epoch(nodes, "stopped")
    checkout.cluster.ask(
        "scancel", "--batch", "--signal=USR1", nodes
    )  # to the shell, which passes it on
    wait_until(lambda: checkout.cluster.job(nodes)["Restarts"] == "1", "the requeued job")
    gpus = checkout.submit("--gres=gpu:2", *script, "runs_dir=whole")
    checkout.done(nodes)
    checkout.done(gpus)
    for runs in ("stopped", "whole"):
        manifest = json.loads((checkout.run_folder(runs) / "manifest.json").read_text())
        assert manifest["world_size"] == 2
    _equal(checkout.run_folder("stopped"), checkout.run_folder("whole"))


def test_a_conda_environment_is_activated_for_the_job_and_on_its_node(checkout):
    """A stand-in that prepares itself as conda's scripts do: with a variable that is not set."""
    python = checkout.program("python", f'exec {sys.executable} "$@"')
    profile = checkout.root / "conda.sh"
    profile.write_text(
        f'conda() {{ [ "$1 $2$UNSET" = "activate psap" ] && PATH={python.parent}:$PATH; }}\n'
    )
    checkout.write_site(
        {
            "# venv, as .*": "",
            '# source "[$]HOME/miniconda3/etc/profile.d/conda.sh"': f"source {profile}",
            "# conda activate psap": "conda activate psap",
        }
    )
    cells = {"dense": ["method=dense", "epochs=1"]}
    array = checkout.submit("--array=0", "slurm/cifar10_table.sh", checkout.suite(cells), *DIGITS)
    checkout.done(f"{array}_0")
    assert checkout.uses(python) == {"step none node 0", "step 0 node 0"}


def test_every_node_gets_its_copy_of_the_data_before_any_trains(checkout):
    """The nodes are one machine: each copies another split, and training, in a stand-in's container, needs both."""
    sample_folder(checkout.root / "photographs", train=16, val=4, size=(48, 40))
    container = checkout.program("container", 'exec "$@"')
    site = {
        "# PSAP_CONTAINER=.*": f"PSAP_CONTAINER=({container})",
        "# PSAP_NODE_DATA=.*": f"PSAP_NODE_DATA={checkout.root}/copy",
    }
    block = r"# stage_data\(\) {(\n# .*)+"
    checkout.write_site({**site, block: COPY_A_SPLIT})
    script = ["--nodes=2", "slurm/imagenet_resnet18.sh", *TINY, "method=dense", "epochs=1"]
    checkout.done(checkout.submit(*script))
    config = (checkout.run_folder("runs") / "config.yaml").read_text()
    assert f"root: {checkout.root}/copy/imagenet\n" in config
    assert checkout.uses(container) == {"step none node 0", "step 1 node 0", "step 1 node 1"}

    checkout.write_site({**site, block: FAIL_ON_A_NODE})
    failing = checkout.submit(*script, "seed=1")
    assert checkout.finish(failing) == "2"
    assert "no_such_program: command not found" in checkout.log(failing)
    assert checkout.log(failing).splitlines()[-1] == (
        "error: stage_data of slurm/site.sh failed: the reason is above"
    )


def test_a_cancelled_job_stays_cancelled_and_continues_when_submitted_again(checkout):
    job = checkout.submit_psap()
    checkout.wait_for_epoch(job, "runs")
    checkout.cluster.ask("scancel", job)
    assert (
        checkout.finish(job) == "75"
    )  # it has left by itself before Slurm's patience, KillWait, was over
    assert "interrupted with a checkpoint, not requeued" in checkout.log(job)
    assert checkout.cluster.state(job) == "CANCELLED"
    assert checkout.cluster.job(job)["Restarts"] == "0"
    assert not (checkout.run_folder("runs") / "done").exists()
    checkout.done(checkout.submit_psap())
    assert (
        len(json.loads((checkout.run_folder("runs") / "manifest.json").read_text())["sessions"])
        == 2
    )


def test_refusals_are_one_sentence_and_exit_code_2(checkout, tmp_path):
    log = tmp_path / "log"

    def refusal(*arguments: str, cwd: Path = checkout.root) -> str:
        log.unlink(missing_ok=True)
        submitted = checkout.cluster.ask(
            "sbatch", "--parsable", f"--output={log}", *arguments, cwd=cwd
        ).strip()
        job = f"{submitted}_7" if "--array=7" in arguments else submitted
        code = checkout.finish(job)
        assert (checkout.cluster.state(job), code) == ("FAILED", "2"), log.read_text()
        (sentence,) = log.read_text().splitlines()
        return sentence.removeprefix("error: ")

    script = "slurm/imagenet_resnet50.sh"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    wrong_folder = refusal(str(checkout.root / script), cwd=elsewhere)
    assert wrong_folder == f"{elsewhere} is not the repository's root: submit from there"
    assert "epochz" in refusal(script, "epochz=3")
    assert "it must be one of" in refusal("--array=7", "slurm/cifar10_table.sh", "no_such_suite")
    assert "run 7 does not exist" in refusal(
        "--array=7", "slurm/cifar10_table.sh", checkout.suite({"psap": PSAP})
    )
    assert "--array" in refusal("slurm/cifar10_table.sh")

    port = checkout.cluster.controller_port
    checkout.write_site({"PSAP_PORTS=.*": f"PSAP_PORTS={port}-{port}"})
    assert refusal(script).startswith("no free port on ")
    checkout.write_site({"PSAP_PORTS=.*": "PSAP_PORTS=any"})
    assert refusal(script).startswith("PSAP_PORTS in slurm/site.sh must be a range")
    checkout.write_site({"export PSAP_DATA=FILL_IN": "export PSAP_DATA=FILL_IN"})
    assert refusal(script) == "slurm/site.sh: fill in PSAP_DATA"
    (checkout.root / "slurm" / "site.sh").unlink()
    assert refusal(script).startswith("slurm/site.sh is missing: copy slurm/site.example.sh")

    by_hand = checkout.cluster.call("bash", script, cwd=checkout.root)
    assert (by_hand.returncode, by_hand.stderr) == (
        2,
        "error: this is a job script: submit it with sbatch\n",
    )


def test_what_training_refuses_is_one_sentence_in_the_log(checkout):
    """Of two processes, and of four on two nodes."""
    script = "slurm/imagenet_resnet50.sh"
    suite = ["suite=mine", "cell=psap"]
    no_photographs = checkout.submit("--gpus-per-node=2", script, *PHOTOGRAPHS, *suite)
    no_gpu = checkout.submit("--gpus-per-node=2", "--nodes=2", script, "data.root=photographs")
    for job, words in ((no_photographs, "photographs is no folder"), (no_gpu, "needs a GPU")):
        assert checkout.finish(job) == "2", checkout.log(job)
        log = checkout.log(job)
        (sentence,) = re.findall(r"^error.*", log, re.MULTILINE)
        assert words in sentence
        assert not re.search("Traceback|FAILED", log), log
        assert log.endswith(": refused: the error is above\n")


def test_every_sbatch_command_of_the_guide_is_accepted(checkout):
    guide = (ROOT / "docs" / "slurm.md").read_text()
    commands = re.findall(r"^sbatch (.*?)(?:  +#.*)?$", guide, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        tested = checkout.cluster.call("sbatch", "--test-only", *command.split(), cwd=checkout.root)
        assert tested.returncode == 0, f"sbatch {command}: {tested.stderr}"
    arrays = [
        re.search(r"--array=0-(\d+).* slurm/cifar10_table\.sh ?(\w*)", command)
        for command in commands
    ]
    indices = {found[2] or "cifar10_table": int(found[1]) for found in arrays if found}
    for name, last in indices.items():
        suite = read_suite(name)
        assert last == len(suite.cells) * len(suite.seeds) - 1
    assert "cifar10_table" in indices


def _photographs(root: Path) -> int:
    """Make an ImageNet-like folder, of Imagenette where it is; returns its training images."""
    imagenette = Path(os.environ.get("PSAP_DATA", "data")) / "imagenette"
    if not imagenette.is_dir():
        sample_folder(root, train=150, val=4, size=(80, 70))
        return 300
    for split, images in (("train", 30), ("val", 4)):
        for wnid in sorted((imagenette / split).iterdir()):
            here = root / split / wnid.name
            here.mkdir(parents=True)
            for image in sorted(wnid.iterdir())[:images]:
                (here / image.name).symlink_to(image.resolve())
    return len(list(root.glob("train/*/*")))


def _first_epoch(folder: Path) -> str:
    return (folder / "metrics.jsonl").read_text().splitlines()[0]


def _only_run(runs: Path) -> Path:
    (manifest,) = runs.glob("*/*/*/manifest.json")
    return manifest.parent


def _equal(stopped: Path, whole: Path) -> None:
    """The run that was stopped took two sessions, and its network is that of the other one, bit for bit."""
    folders = [stopped, whole]
    sessions = [
        len(json.loads((folder / "manifest.json").read_text())["sessions"]) for folder in folders
    ]
    assert sessions == [2, 1]
    weights = [(folder / "export" / "weights.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
