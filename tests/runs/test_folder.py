"""What a run's folder says of itself, and of a run beside it."""

import re

import pytest
from PIL import Image

from experiments import status, train
from experiments.configuration import compose
from experiments.runs.folder import Record, run_on_other_images
from experiments.runs.identity import differ_in_images_only
from tests.helpers import small


def add_image(root, label, number):
    (root / label).mkdir(parents=True, exist_ok=True)
    Image.new("L", (20 + number, 30)).save(root / label / f"{number}.png")


@pytest.fixture
def pets(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number in range(3):
        add_image(tmp_path / "pets", "cat", number)
        add_image(tmp_path / "pets", "dog", number)
    return tmp_path / "pets"


def config(pets, *overrides):
    words = ["experiment=image_folder", "model.weights=null", f"data.root={pets}"]
    return compose("train", [*words, f"runs_dir={pets.parent / 'runs'}", *overrides])


def interrupted(cfg):
    record = Record(cfg)
    record.begin(cfg, {"device": "a GPU"})
    record.interrupt()
    record.close()
    return record


def test_status_says_when_a_run_was_interrupted_as_a_person_reads_it(tmp_path, monkeypatch, capsys):
    words = small(tmp_path, "dense")
    interrupted(compose("train", words))
    monkeypatch.setattr("sys.argv", ["status", *words])
    status.main()
    said = capsys.readouterr().out
    assert re.fullmatch(r"interrupted \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z\n", said)


@pytest.fixture
def said_before_training(monkeypatch, capsys):
    """What the training command says until training would begin."""
    monkeypatch.setattr("experiments.training.run.train_here", lambda *_: None)

    def said(cfg):
        train.train(cfg)
        return capsys.readouterr().err

    return said


def test_a_run_that_begins_anew_for_its_images_names_the_one_on_others(pets, said_before_training):
    before = interrupted(config(pets))
    add_image(pets, "dog", 9)
    assert said_before_training(config(pets, "model.name=resnet34")) == ""
    assert said_before_training(config(pets)) == (
        f"a run of the same settings lies in {before.folder}, interrupted: it was trained on other images, and this "
        "one begins anew\n"
    )


def test_a_run_that_continues_says_nothing_of_others(pets, said_before_training):
    interrupted(config(pets))
    add_image(pets, "dog", 9)
    cfg = config(pets)
    record = interrupted(cfg)
    record.checkpoints[0].parent.mkdir()
    record.checkpoints[0].touch()
    assert said_before_training(cfg) == ""


def test_a_run_of_another_seed_or_of_a_damaged_manifest_is_no_run_on_other_images(pets):
    first = interrupted(config(pets))
    add_image(pets, "dog", 9)
    cfg = config(pets, "seed=1")
    assert run_on_other_images(cfg, Record(cfg)) is None
    cfg = config(pets)
    assert run_on_other_images(cfg, Record(cfg)).folder == first.folder
    moved = first.folder.parents[1] / "01234567" / first.folder.name
    moved.parent.mkdir()
    first.folder.rename(moved)
    assert run_on_other_images(cfg, Record(cfg)) is None
    moved.rename(first.folder)
    (first.folder / "manifest.json").write_text("{}")
    assert run_on_other_images(cfg, Record(cfg)) is None


def test_identities_that_differ_in_more_than_images():
    own = {"epochs": 9, "data": {"name": "mine", "files": "a"}}
    assert differ_in_images_only(own, {"epochs": 9, "data": {"name": "mine", "files": "b"}})
    assert not differ_in_images_only(own, {"epochs": 8, "data": {"name": "mine", "files": "b"}})
    assert not differ_in_images_only(own, own)
