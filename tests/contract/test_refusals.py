"""Bad input to the ImageNet jobs: one clear sentence and exit code 2, each."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from experiments import suite, train
from experiments.training import run
from experiments.training.distributed import World
from tests.data.photographs import sample_folder
from tests.helpers import refusal

ROOT = Path(__file__).parents[2]
PALACE, DAISY = "n03877845", "n11939491"
Said = Callable[..., str]


@pytest.fixture
def trained_on(tmp_path, monkeypatch) -> Callable[[Path], str]:
    """What training says that refuses a data root."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def said(root: Path, *overrides: str) -> str:
        small = [
            "data.image_size=32",
            "epochs=1",
            "optim.batch_size=8",
            "runtime.device=cpu",
            "runtime.threads=1",
            "runtime.workers=0",
        ]
        places = [f"data.root={root}", f"runs_dir={tmp_path / 'runs'}", "tracking.mode=disabled"]
        arguments = ["experiment=imagenet_resnet18", "method=dense", *small, *places, *overrides]
        return refusal(train.main, arguments, monkeypatch)

    return said


@pytest.fixture
def photographs(tmp_path) -> Path:
    return sample_folder(tmp_path / "photographs", train=8, val=4, size=(60, 48))


class Agreeing(World):
    """The first of several processes, of which the others always say the same."""

    def sum(self, values: Tensor) -> Tensor:
        return values

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.size


def pretend(monkeypatch, size: int) -> None:
    monkeypatch.setattr(
        "experiments.training.distributed.join", lambda: nullcontext(Agreeing(0, size, 0))
    )


def no_images(photographs, trained_on, **_) -> str:
    for image in photographs.rglob(f"train/{DAISY}/*"):
        image.unlink()
    return trained_on(photographs)


def one_class(photographs, trained_on, **_) -> str:
    for split in ("train", "val"):
        shutil.rmtree(photographs / split / DAISY)
    return trained_on(photographs)


def classes_differ(photographs, trained_on, **_) -> str:
    (photographs / "val" / DAISY).rename(photographs / "val" / "n01440764")
    return trained_on(photographs)


def flat_validation(photographs, trained_on, **_) -> str:
    for number, image in enumerate(sorted(photographs.rglob("val/*/*"))):
        image.rename(photographs / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    for wnid in (PALACE, DAISY):
        (photographs / "val" / wnid).rmdir()
    return trained_on(photographs)


def unreadable_file(photographs, trained_on, **_) -> str:
    image = sorted(photographs.rglob(f"train/{PALACE}/*"))[0]
    image.write_bytes(image.read_bytes()[:200])
    said = trained_on(photographs)
    assert str(image) in said
    return said


def wrong_wnid(photographs, trained_on, **_) -> str:
    for split in ("train", "val"):
        (photographs / split / DAISY).rename(photographs / split / "daisy")
    return trained_on(photographs)


def world_size_that_does_not_divide(photographs, trained_on, monkeypatch, **_) -> str:
    pretend(monkeypatch, 3)
    return trained_on(photographs)


def resume_under_another_world_size(photographs, trained_on, monkeypatch, **_) -> str:
    with monkeypatch.context() as patch:
        patch.setattr(
            run, "learning_rate", lambda cfg, epoch, epochs: float("inf") if epoch else 0.1
        )
        assert "in epoch 2" in trained_on(photographs, "epochs=2")
    pretend(monkeypatch, 2)
    monkeypatch.setattr(World, "wrap", lambda self, net: net)
    return trained_on(photographs, "epochs=2")


def no_gpu(tmp_path, trained_on, monkeypatch, **_) -> str:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return trained_on(tmp_path / "no photographs either", "runtime.device=auto")


def job(folder: Path, site: str | None, command: list[str]) -> str:
    """What a job script says in a copy of slurm/ with this site file."""
    shutil.copytree(
        ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("site.sh", "logs")
    )
    if site is not None:
        (folder / "slurm" / "site.sh").write_text(site)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": str(folder)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    (sentence,) = done.stderr.splitlines()
    return sentence.removeprefix("error: ")


def no_free_port(tmp_path, **_) -> str:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        choose = "source slurm/common.sh; head_node=127.0.0.1; choose_port"
        return job(tmp_path / "job", f"PSAP_PORTS={port}-{port}", ["bash", "-c", choose])


def missing_site_file(tmp_path, **_) -> str:
    return job(tmp_path / "job", None, ["bash", "slurm/imagenet_resnet50.sh"])


def staged_nowhere(tmp_path, **_) -> str:
    stage = "source slurm/common.sh; stage"
    return job(tmp_path / "job", "stage_data() { true; }", ["bash", "-c", stage])


def array_index_out_of_range(monkeypatch, **_) -> str:
    return refusal(suite.main, ["show", "cifar10_table", "1000"], monkeypatch)


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (no_images, f"train/{DAISY} holds no images"),
        (one_class, f"holds a single class, {PALACE}"),
        (classes_differ, "they must hold the same"),
        (flat_validation, "holds its images directly: move them into a folder per class"),
        (unreadable_file, "is damaged"),
        (wrong_wnid, "is named after no WordNet id"),
        (world_size_that_does_not_divide, "cannot be divided over 3 processes"),
        (resume_under_another_world_size, "began with a number of processes of 1, here it is 2"),
        (no_gpu, "training on ImageNet needs a GPU, and torch finds none on "),
        (no_free_port, "no free port on 127.0.0.1 in PSAP_PORTS="),
        (missing_site_file, "slurm/site.sh is missing: copy slurm/site.example.sh"),
        (staged_nowhere, "slurm/site.sh has stage_data, but no PSAP_NODE_DATA"),
        (array_index_out_of_range, "run 1000 does not exist: the suite has runs 0 to "),
    ],
)
def test_refused_in_one_sentence(
    case: Said, sentence: str, photographs, trained_on, tmp_path, monkeypatch
) -> None:
    given = {
        "photographs": photographs,
        "trained_on": trained_on,
        "tmp_path": tmp_path,
        "monkeypatch": monkeypatch,
    }
    assert sentence in case(**given)


def test_a_job_names_the_lines_of_its_site_file_that_are_not_filled_in(tmp_path) -> None:
    script = ["bash", "slurm/imagenet_resnet50.sh"]
    site = (ROOT / "slurm" / "site.example.sh").read_text()
    names = re.findall(r"(\w+)=FILL_IN", site)
    assert "PSAP_DATA" in names
    while names:
        said = job(tmp_path / names[0], site, script)
        assert said == f"slurm/site.sh: fill in {', '.join(names)}"
        filled_in = names.pop(0)
        site = site.replace(f"{filled_in}=FILL_IN", f"{filled_in}=ours")
    site += "python() { false; }"  # one without torch
    assert job(tmp_path / "filled in", site, script).startswith("slurm/site.sh activates no env")
