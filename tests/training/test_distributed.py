"""Two processes train as one: the same decisions, one stop, loud failures, and resumes that are equal bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments import train
from experiments.data.base import Sharing
from experiments.runs.folder import State
from psap_core import InputError
from tests.helpers import small, state_of
from tests.limits import HANG_SECONDS

OVERRIDES = [
    "method.scope=coupled",
    "epochs=8",
    "method.start=1",
    "method.ramp_end=4",
    "method.freeze=6",
]  # psap steps after epochs 1 to 6; the last two epochs train the small network


def torchrun(runs_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "experiments.train", *small(runs_dir, "psap", *OVERRIDES)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(
        command, **pipes, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return
    raise AssertionError("".join(lines))


def workers(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the ranks that torchrun started."""
    return [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


def ended(process: subprocess.Popen[str]) -> str:
    """What a process still says until it ends; a hang fails here."""
    said, _ = process.communicate(timeout=HANG_SECONDS)
    return said


def folder_of(runs_dir: Path) -> Path:
    (folder,) = runs_dir.glob("*/*/seed0")
    return folder


def state_word(runs_dir: Path) -> State:
    from experiments.configuration import compose
    from experiments.runs.folder import Record

    return Record(compose("train", small(runs_dir, "psap", *OVERRIDES))).state


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    runs_dir = tmp_path_factory.mktemp("uninterrupted")
    process = torchrun(runs_dir)
    said = ended(process)
    assert process.returncode == 0, said
    assert said.count("  top-1 ") == 1  # the first rank speaks
    assert said.count("epoch 8/8") == 1
    manifest = json.loads((folder_of(runs_dir) / "manifest.json").read_text())
    assert manifest["world_size"] == 2
    return state_of(folder_of(runs_dir))


@pytest.mark.long
def test_every_rank_has_generators_of_its_own(uninterrupted) -> None:
    first, second = uninterrupted["ranks"]
    assert first["generators"] != second["generators"]


@pytest.mark.long
def test_a_killed_rank_is_one_sentence_and_the_same_command_continues(
    tmp_path, uninterrupted
) -> None:
    process = torchrun(tmp_path)
    wait_for(process, "epoch 2/8")
    os.kill(workers(process)[1], signal.SIGKILL)
    said = ended(process)
    assert "error: another process of the training was killed: the same command continues" in said
    assert said.count("Traceback") <= 1  # torchrun's own
    assert ended(torchrun(tmp_path)).count("  top-1 ") == 1
    assert state_of(folder_of(tmp_path)) == uninterrupted


@pytest.mark.long
def test_a_signal_to_one_rank_stops_all_and_the_same_command_continues(
    tmp_path, uninterrupted
) -> None:
    process = torchrun(tmp_path)
    wait_for(process, "epoch 2/8")
    os.kill(workers(process)[1], signal.SIGUSR1)
    said = ended(process)
    assert process.returncode != 0
    assert said.count("interrupted: the same command continues this run") == 2
    assert state_word(tmp_path) is State.interrupted
    with pytest.raises(InputError, match="began with a number of processes of 2, here it is 1"):
        train.run(small(tmp_path, "psap", *OVERRIDES))
    assert ended(torchrun(tmp_path)).count("  top-1 ") == 1
    assert state_of(folder_of(tmp_path)) == uninterrupted


def kill_one(runs_dir: Path, draw: random.Random) -> None:
    process = torchrun(runs_dir)
    wait_for(process, "epoch 1/8")
    time.sleep(draw.uniform(0, 0.5))
    os.kill(draw.choice(workers(process)), signal.SIGKILL)
    assert "Signal 9 (SIGKILL)" in ended(process)
    assert process.returncode != 0
    assert state_word(runs_dir) in (State.failed, State.incomplete)


def kill_all(runs_dir: Path, draw: random.Random) -> None:
    process = torchrun(runs_dir)
    wait_for(process, "epoch ")
    time.sleep(draw.uniform(0, 0.5))
    for pid in [process.pid, *workers(process)]:
        os.kill(pid, signal.SIGKILL)
    process.wait()


def continue_to_the_end(runs_dir: Path, uninterrupted: dict) -> None:
    ended(torchrun(runs_dir))
    assert state_word(runs_dir) is State.done
    assert state_of(folder_of(runs_dir)) == uninterrupted


@pytest.mark.long
def test_a_killed_rank(tmp_path, uninterrupted) -> None:
    kill_one(tmp_path, random.Random(0))
    continue_to_the_end(tmp_path, uninterrupted)


@pytest.mark.long
@pytest.mark.parametrize("number", range(1, 11))
def test_random_killed_ranks(number: int, tmp_path, uninterrupted) -> None:
    draw = random.Random(number)
    kill_one(tmp_path, draw)
    kill_all(tmp_path, draw)
    continue_to_the_end(tmp_path, uninterrupted)


TWO_EQUAL_STEPS = """
import torch
from experiments.benchmarks import cifar_resnet
from experiments.training.distributed import join
with join() as world:
    torch.manual_seed(0)
    net = world.wrap(cifar_resnet(20).eval())
    images, gradients = torch.randn(world.size, 8, 3, 16, 16)[world.rank], []
    world.settle(net, images)
    for _ in range(2):
        net.zero_grad()
        net(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(map(torch.equal, *gradients))
"""


@pytest.mark.long
def test_four_ranks_sum_a_first_step_as_they_sum_later_ones(tmp_path) -> None:
    """Or a continued run, whose first step it is, would differ from one that was never stopped."""
    (tmp_path / "steps.py").write_text(TWO_EQUAL_STEPS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    subprocess.run(
        [*command, str(tmp_path / "steps.py")], check=True, timeout=HANG_SECONDS, env=environment
    )


SMALL_IN_TRAINING = """
import json, sys
import torch
from experiments.configuration import compose
from experiments.methods.registry import make_method
from experiments.training.compaction import Compaction
from experiments.training.distributed import join
from experiments.training.setup import set_up
from experiments.training.steps import Steps
with join() as world:
    setup = set_up(compose("train", json.loads(sys.argv[1])), torch.device("cpu"), world)
    method = make_method(setup.method_context(lambda *_: None))
    steps = Steps(setup.net, setup.optimizer, setup.images, world, setup.device, None, lambda: None)
    compaction = Compaction(method, setup, steps)
    for epoch in range(4):
        assert method.is_compact == (epoch == 3)
        setup.model.train()
        assert sum(steps.epoch(epoch, 0)) == 160
        world.share_buffers_(setup.model)
        compaction.end_epoch(epoch + 1)
    weights = [p.detach().double().sum().item() for p in setup.model.parameters()]
    assert weights == world.gather(weights)[0]
"""


@pytest.mark.long
def test_ranks_average_the_gradients_of_the_small_network(tmp_path) -> None:
    (tmp_path / "small.py").write_text(SMALL_IN_TRAINING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    overrides = small(tmp_path, "psap", "method.scope=coupled")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    subprocess.run(
        [*command, str(tmp_path / "small.py"), json.dumps(overrides)],
        check=True,
        timeout=HANG_SECONDS,
        env=environment,
    )


@pytest.fixture(scope="module")
def digests() -> dict[str, list[list[str]]]:
    """Plan digests and utilities of every rank in five pruning steps; see tests/training/ranks.py."""
    command = [sys.executable, "-m", "tests.training.ranks"]
    return json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=HANG_SECONDS).stdout
    )


@pytest.mark.long
def test_one_and_two_ranks_make_the_same_plans(digests) -> None:
    """The same global batches, float64, BatchNorm in evaluation mode: five pruning steps.

    Scope coupled: the ranks average the gradients of constants, too, which silence channels of a stream.
    """
    (alone,) = digests["one rank, fixed statistics"]
    assert len(alone) == 5
    assert len(set(alone)) > 1
    assert digests["two ranks, fixed statistics"] == [alone, alone]
    assert digests["two micro-batches, fixed statistics"] == [alone]


@pytest.mark.long
def test_ordinary_batchnorm_is_equal_over_the_ranks(digests) -> None:
    first, second = digests["two ranks, batch statistics"]
    assert len(first) == 5
    assert first == second


@pytest.mark.parametrize("images", [256, 250, 7])
@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_every_image_of_a_batch_belongs_to_one_part_of_one_rank(
    images: int, ranks: int, accumulate: int
) -> None:
    parts = [
        part
        for rank in range(ranks)
        for part in Sharing(256, rank, ranks, accumulate).parts(images)
    ]
    assert len(parts) == ranks * accumulate
    assert [i for part in parts for i in range(images)[part]] == list(range(images))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("batch_size", "ranks", "accumulate", "images", "sentence"),
    [
        (
            256,
            3,
            1,
            1000,
            "batch_size=256 cannot be divided over 3 processes with optim.accumulate=1: choose a mult",
        ),
        (256, 2, 3, 1000, "choose a multiple of 6"),
        (0, 1, 1, 1000, "must be at least 1"),
        (4, 1, 0, 1000, "must be at least 1"),
        (4, 4, 1, 1000, "training images: change optim.batch_size or data.train_images$"),
        (16, 1, 1, 1, "training images: change optim.batch_size or data.train_images$"),
        (16, 1, 1, 161, "add data.train_images=160, or change optim.batch_size$"),
        (256, 2, 2, 519, "leaves a part of fewer than two images.* add data.train_images=512, or"),
    ],
)
def test_batches_that_cannot_be_divided(batch_size, ranks, accumulate, images, sentence) -> None:
    with pytest.raises(InputError, match=sentence):
        Sharing(batch_size, 0, ranks, accumulate).batches(images)


def test_the_world_of_one_process_is_free() -> None:
    from experiments.training.distributed import World

    alone = World()
    net = torch.nn.Linear(1, 1)
    assert alone.wrap(net) is net
    assert alone.gather("x") == ["x"]
    assert [alone.any(flag) for flag in (False, True)] == [False, True]
