"""Whatever is damaged, moved or planted in a run's folder: it is named, or the run goes on as it would have."""

import errno
import io
import json
import os
import random
import shutil
import stat

import pytest
import torch

from analysis.results import read_run
from experiments import evaluate, export, train
from experiments.configuration import compose
from experiments.data import TensorImages
from experiments.runs.done import read_done
from experiments.runs.folder import Record
from experiments.training import checkpoint, run
from experiments.training.checkpoint import load_checkpoint
from psap_core import InputError
from psap_core.files import sha256, write_atomically
from tests.helpers import refusal, small, state_of


def torch_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def run_of(runs_dir, *extra):
    return small(runs_dir, "psap", "method.scope=coupled", *extra)


def stop_after(saves):
    """Something that a run's `save_checkpoint` does instead: it ends the training at a later call."""
    original, calls = Record.save_checkpoint, 0

    def counted(record, data):
        nonlocal calls
        calls += 1
        if calls > saves:
            raise KeyboardInterrupt
        original(record, data)

    return counted


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train.run(run_of(tmp_path_factory.mktemp("finished")))


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """The runs_dir of a run that was killed when three of four epochs were done."""
    runs_dir = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "save_checkpoint", stop_after(3))
        with pytest.raises(KeyboardInterrupt):
            train.run(run_of(runs_dir))
    return runs_dir


def flip(data, draw):
    place = draw.randrange(8 * len(data))
    changed = bytearray(data)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


def change_digit(data, draw):
    places = [place for place, byte in enumerate(data) if byte in b"0123456789"]
    changed = bytearray(data)
    place = draw.choice(places)
    changed[place] = draw.choice([digit for digit in b"0123456789" if digit != changed[place]])
    return bytes(changed)


def truncate(data, draw):
    return data[: draw.randrange(len(data))]


DAMAGES = [flip, change_digit, truncate]
few = pytest.mark.parametrize(
    ("damage", "times"),
    [
        *((damage, 1) for damage in DAMAGES),
        *(pytest.param(damage, 100, marks=pytest.mark.long) for damage in DAMAGES),
    ],
)


@few
def test_no_damage_of_a_finished_run_is_silent(damage, times, finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "run")
    draw = random.Random(f"finished {damage.__name__} {times}")
    names = ["done", *read_done(folder)]
    for _ in range(times):
        path = folder / draw.choice(names)
        whole = path.read_bytes()
        path.write_bytes(damage(whole, draw))
        with pytest.raises(InputError, match=path.name):
            read_run(folder)
        main = draw.choice([evaluate.main, export.main])
        assert path.name in refusal(main, [f"run={folder}"], monkeypatch)
        path.write_bytes(whole)
    read_run(folder)


def outcome(overrides):
    """The folder of the run that these overrides describe, and an empty sentence; or None, and why it was refused."""
    try:
        return train.run(overrides), ""
    except InputError as error:
        return None, str(error)


@few
def test_no_damage_of_an_unfinished_run_is_silent(
    damage, times, unfinished, finished, tmp_path, monkeypatch
):
    """It is refused by name, or what was damaged is written anew: the run ends as without the damage."""
    draw = random.Random(f"unfinished {damage.__name__} {times}")
    expected = state_of(finished)
    paths = [path.relative_to(unfinished) for path in unfinished.rglob("*") if path.is_file()]
    named = [path for path in sorted(paths) if path.name not in (".lock", "failed")]
    for number in range(times):
        runs_dir = shutil.copytree(unfinished, tmp_path / str(number))
        path = runs_dir / draw.choice(named)
        path.write_bytes(damage(path.read_bytes(), draw))
        folder, sentence = outcome(run_of(runs_dir))
        assert path.name in sentence or state_of(folder) == expected
        shutil.rmtree(runs_dir)


@pytest.mark.parametrize("name", ["metrics.jsonl", "manifest.json", "epoch_0001.json"])
def test_a_changed_file_of_an_unfinished_run_is_refused_by_name(
    name, unfinished, tmp_path, monkeypatch
):
    runs_dir = shutil.copytree(unfinished, tmp_path / "runs")
    path, *_ = runs_dir.rglob(name)
    path.write_bytes(change_digit(path.read_bytes(), random.Random(0)))
    assert f"{path} is damaged" in refusal(train.main, run_of(runs_dir), monkeypatch)


def test_the_checkpoint_before_takes_a_damaged_ones_place(
    unfinished, finished, tmp_path, monkeypatch, capsys
):
    runs_dir = shutil.copytree(unfinished, tmp_path / "runs")
    (last,) = runs_dir.rglob("last.pt")
    last.write_bytes(last.read_bytes()[:-1])
    folder = train.run(run_of(runs_dir))
    said = capsys.readouterr().err
    assert f"{last} is damaged" in said
    assert "continuing in epoch 3 of 4" in said
    for path in (last, last.with_name("previous.pt")):
        load_checkpoint(path)  # the damaged one has not taken a whole one's place
    assert state_of(folder) == state_of(finished)


def test_a_kill_between_two_names_continues_with_the_checkpoint_before(
    unfinished, finished, tmp_path
):
    runs_dir = shutil.copytree(unfinished, tmp_path / "runs")
    (last,) = runs_dir.rglob("last.pt")
    last.unlink()
    assert state_of(train.run(run_of(runs_dir))) == state_of(finished)


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_whole_one(unfinished, tmp_path):
    """Killed at the first checkpoint after the run went back to the one before."""
    runs_dir = shutil.copytree(unfinished, tmp_path / "runs")
    (last,) = runs_dir.rglob("last.pt")
    last.write_bytes(b"damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "save_checkpoint", stop_after(0))
        with pytest.raises(KeyboardInterrupt):
            train.run(run_of(runs_dir))
    assert not last.exists()
    load_checkpoint(last.with_name("previous.pt"))


def test_two_damaged_checkpoints_are_refused(unfinished, tmp_path, monkeypatch):
    runs_dir = shutil.copytree(unfinished, tmp_path / "runs")
    for path in [*runs_dir.rglob("*.pt")]:
        path.write_bytes(b"")
    assert "previous.pt is damaged" in refusal(train.main, run_of(runs_dir), monkeypatch)


@pytest.mark.parametrize("content", [b"", b"garbage", torch_bytes([1]), torch_bytes(torch.ones(2))])
def test_a_forged_checkpoint_is_one_sentence(content, tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(f"{checkpoint.FORMAT} {sha256(content)}\n".encode() + content)
    with pytest.raises(InputError, match=r"last\.pt is no checkpoint of this suite"):
        load_checkpoint(path)


def test_a_run_without_its_manifest_is_not_continued(unfinished, tmp_path, monkeypatch):
    """Which says what data, how many processes and threads it had."""
    runs_dir = shutil.copytree(unfinished, tmp_path / "runs")
    next(runs_dir.rglob("manifest.json")).unlink()
    assert "manifest.json is missing" in refusal(train.main, run_of(runs_dir), monkeypatch)


def test_a_finished_run_of_a_table_is_answered_without_its_lock(finished, tmp_path, monkeypatch):
    """As on a disk that only reads."""
    runs_dir = shutil.copytree(finished.parents[2], tmp_path / "runs")
    words = run_of(runs_dir, "suite=table", "cell=one")
    folder = train.run(words)
    monkeypatch.setattr(Record, "_take_lock", lambda _: pytest.fail("locked"))
    assert train.run(words) == folder


def test_processes_of_torchrun_check_a_finished_run_too(finished):
    """`answer` is what one process does alone."""
    cfg = train_config(finished.parents[3])
    record = Record(cfg)
    record.folder = finished
    answers = []
    run.train_here(cfg, record, lambda: answers.append("checked"))
    assert answers == ["checked"]


def test_a_run_is_not_evaluated_on_other_data(finished, monkeypatch):
    monkeypatch.setattr(TensorImages, "digest", "another")
    sentence = f"{finished} belongs to the data of SHA-256 .* another is what lies there"
    with pytest.raises(InputError, match=sentence):
        evaluate.evaluate_run([f"run={finished}"])


def test_adopting_a_run_keeps_its_files_whole(finished, tmp_path):
    runs_dir = shutil.copytree(finished.parents[2], tmp_path / "runs")
    folder = train.run(run_of(runs_dir, "suite=table", "cell=one"))
    run = read_run(folder)
    assert (run.suite, run.cell) == ("table", "one")


@pytest.mark.parametrize("other_run", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_run_whose_folder_is_not_its_own_any_more_stops(other_run, tmp_path, monkeypatch):
    """Moved away in its second epoch; another process may have begun again there."""
    original, log = Record.log, []

    def move(record, metrics):
        log.append(record.folder)
        if len(log) == 2:
            record.folder.rename(tmp_path / "moved")
            if other_run:
                record.folder.mkdir()
                (record.folder / ".lock").touch()
        original(record, metrics)

    monkeypatch.setattr(Record, "log", move)
    with pytest.raises(InputError, match="was moved or deleted while this process trained"):
        train.run(run_of(tmp_path))
    left = [path.name for path in log[0].iterdir()] if other_run else []
    assert left == ([".lock"] if other_run else [])
    assert log[0].exists() is other_run


def test_an_export_is_not_written_where_another_run_may_lie(tmp_path, monkeypatch):
    """Moved away during the last evaluation."""
    folders = []
    original = run._start_top1

    def move(training):
        folders.append(training.record.folder)
        training.record.folder.rename(tmp_path / "moved")
        training.record.folder.mkdir()
        return original(training)

    monkeypatch.setattr(run, "_start_top1", move)
    with pytest.raises(InputError, match="was moved or deleted while this process trained"):
        train.run(run_of(tmp_path))
    assert list(folders[0].iterdir()) == []


def test_files_that_the_run_did_not_write_are_not_read(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    plan = read_run(folder).plan
    (folder / "plans" / "epoch_9999.json").write_text('{"layers": "planted"}')
    assert read_run(folder).plan == plan


PLANTED = [
    ".lock",
    *(
        pytest.param(name, marks=pytest.mark.long)
        for name in (
            *("config.yaml", "manifest.json", "summary.json", "done", "failed", "interrupted"),
            *("metrics.jsonl", "checkpoint/last.pt", "checkpoint/previous.pt", "checkpoint"),
            *("plans/epoch_0001.json", "plans", "pulses", "export", "export/spec.json"),
            "export/weights.safetensors",
        )
    ),
]


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_what_a_link_leads_to_is_not_touched(name, kind, tmp_path):
    """In the folder of a run that has not begun."""
    victim = tmp_path / "victim"
    is_folder = "." not in name and name not in ("done", "failed", "interrupted")
    if is_folder and kind == "hard link":
        pytest.skip("there are none of folders")
    if is_folder:
        victim.mkdir()
        (victim / "last.pt").write_text("precious")
    else:
        victim.write_text("precious")
    before = contents(victim)
    folder = Record(train_config(tmp_path)).folder
    path = folder / name
    path.parent.mkdir(parents=True)
    if kind == "link":
        path.symlink_to(victim)
    else:
        os.link(victim, path)
    _, sentence = outcome(run_of(tmp_path / "runs"))
    assert sentence == "" or str(folder) in sentence
    assert contents(victim) == before


def test_a_link_in_the_place_of_the_runs_folder_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "config.yaml").write_text("precious")
    folder = Record(train_config(tmp_path)).folder
    folder.parent.mkdir(parents=True)
    folder.symlink_to(victim)
    sentence = refusal(train.main, run_of(tmp_path / "runs"), monkeypatch)
    assert sentence.startswith(f"{folder} is a link")
    assert contents(victim)["config.yaml"] == b"precious"


def test_a_link_that_is_planted_while_the_run_trains_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "spec.json").write_text("precious")
    original = Record.log

    def plant(record, metrics):
        if not (record.folder / "export").exists():
            (record.folder / "export").symlink_to(victim)
        original(record, metrics)

    monkeypatch.setattr(Record, "log", plant)
    sentence = refusal(train.main, run_of(tmp_path / "runs"), monkeypatch)
    assert "export is a link, which is not followed" in sentence
    assert contents(victim) == {"spec.json": b"precious"}


def train_config(tmp_path):
    return compose("train", run_of(tmp_path / "runs"))


def contents(path):
    if path.is_dir():
        return {each.name: each.read_bytes() for each in path.iterdir()}
    return path.read_bytes()


def test_a_pipe_in_a_files_place_keeps_nobody_waiting(tmp_path):
    folder = Record(train_config(tmp_path)).folder
    folder.mkdir(parents=True)
    os.mkfifo(folder / ".lock")
    with pytest.raises(InputError, match="lock is no file of ours"):
        train.run(run_of(tmp_path / "runs"))


def test_what_killed_processes_left_half_written_goes(tmp_path):
    folder = Record(train_config(tmp_path)).folder
    (folder / "checkpoint").mkdir(parents=True)
    half = folder / "checkpoint" / ".last.pt.0123.tmp"
    half.write_bytes(b"half")
    train.run(run_of(tmp_path / "runs"))
    assert not half.exists()


def test_a_full_disk_leaves_the_former_content(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"one")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"two", previous=tmp_path / "previous")
    assert path.read_bytes() == b"one"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_is_said_of_the_file_that_found_no_room(tmp_path, monkeypatch):
    """And not of the one that would have remembered it."""

    def full(path, data, **_):
        if path.name not in ("config.yaml", "manifest.json", "metrics.jsonl"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_atomically(path, data)

    monkeypatch.setattr("experiments.runs.folder.write_atomically", full)
    sentence = refusal(train.main, run_of(tmp_path), monkeypatch)
    assert sentence.endswith("epoch_0001.json cannot be used: No space left on device")


def test_a_file_system_that_cannot_flush_folders_will_do(tmp_path, monkeypatch):
    flush = os.fsync

    def flush_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flush_files_only)
    write_atomically(tmp_path / "file", b"one")
    assert (tmp_path / "file").read_bytes() == b"one"


def test_done_lists_every_file_of_the_run(finished):
    listed = {*read_done(finished)}
    there = {
        path.relative_to(finished).as_posix()
        for path in finished.rglob("*")
        if path.is_file() and path.relative_to(finished).parts[0] not in ("checkpoint", "wandb")
    }
    assert listed == there - {".lock", "done"}
    assert json.loads((finished / "done").read_text())["files"].keys() == listed
