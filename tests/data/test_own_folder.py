"""One's own folder of images: any classes, sizes and modes, split by a fixed seed, turned as EXIF says."""

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import train
from experiments.configuration import compose
from experiments.data.base import Normalisation
from experiments.data.image_folder import held_out, load_image_folder
from experiments.data.transforms import evaluation_view, upright
from experiments.runs.identity import config_hash
from psap_core import InputError

CPU = torch.device("cpu")
CLASSES = {"a cat": 10, "dog": 5, "rare": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def pets(tmp_path):
    return fill(tmp_path / "pets", CLASSES)


def fill(root, classes):
    for label, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            grey = Image.new("L", (20 + number, 30), 10 * label + number)
            grey.save(root / name / f"{number}.png")
    return root


def config(root, *overrides):
    words = ["experiment=image_folder", "model.weights=null", f"data.root='{root}'", *overrides]
    return compose("train", words)


def load(root, *overrides):
    return load_image_folder(config(root, "data.image_size=8", *overrides).data)


def names(files):
    return {name.decode() for name in files.names.tolist()}


def test_a_fifth_of_every_class_is_held_out_and_always_the_same(pets):
    dataset = load(pets)
    assert dataset.class_names == ["a cat", "dog", "rare"]
    assert dataset.classes == 3
    assert np.bincount(dataset.test.labels).tolist() == [2, 1, 1]
    assert np.bincount(dataset.train.labels).tolist() == [8, 4, 1]
    assert names(dataset.test) | names(dataset.train) == {
        f"{name}/{number}.png" for name, count in CLASSES.items() for number in range(count)
    }
    assert names(load(pets).test) == names(dataset.test)
    assert np.bincount(load(pets, "data.test_share=0.5").test.labels).tolist() == [5, 2, 1]


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_every_class_trains_and_tests(share):
    labels = np.repeat(np.arange(3), [50, 3, 2])
    train, test = held_out(labels, ["a", "b", "c"], share)
    assert set(labels[train]) == set(labels[test]) == {0, 1, 2}
    assert sorted([*train, *test]) == [*range(55)]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_a_split_that_is_there_is_taken(tmp_path, name):
    fill(tmp_path / "train", {"x": 4, "y": 4})
    fill(tmp_path / name, {"x": 1, "y": 2})
    dataset = load(tmp_path)
    assert names(dataset.test) == {f"{name}/x/0.png", f"{name}/y/0.png", f"{name}/y/1.png"}
    assert len(dataset.train) == 8


def test_train_alone_is_split(tmp_path):
    fill(tmp_path / "train", {"x": 5, "y": 5})
    dataset = load(tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (8, 2)


def test_what_programs_leave_is_no_class_and_no_image(pets):
    fill(pets, {".thumbnails": 3})
    (pets / "dog" / "._0.png").write_bytes(b"")
    (pets / "dog" / "notes.txt").write_text("")
    assert load(pets).class_names == ["a cat", "dog", "rare"]
    dataset = load(pets)
    assert len(dataset.train) + len(dataset.test) == 17
    assert dataset.left_out == ["dog/notes.txt"]


def test_what_no_class_takes_is_named(pets):
    fill(pets / "dog", {"puppies": 2})
    (pets / "dog" / "9.heic").write_bytes(b"")
    Image.new("L", (20, 30)).save(pets / "stray.png")
    assert load(pets).left_out == ["stray.png", "dog/9.heic", "dog/puppies"]


def test_an_image_is_seen_as_a_person_sees_it():
    """Lying on its side with EXIF orientation 6: the left of what is stored comes out on top."""
    stored = np.zeros((8, 16), np.uint8)
    stored[:, :8] = 255
    image = Image.fromarray(stored)
    image.getexif()[0x0112] = 6
    assert upright(image).size == (8, 16)
    assert np.asarray(upright(image))[:8].min() == 255
    assert np.asarray(upright(image))[8:].max() == 0


def test_a_run_reads_images_turned(tmp_path):
    fill(tmp_path, {"other": 2})
    (tmp_path / "turned").mkdir()
    stored = np.zeros((16, 16), np.uint8)
    stored[:, :8] = 255
    for number in range(2):
        image = Image.fromarray(stored)
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(tmp_path / "turned" / f"{number}.jpg", exif=exif, quality=100)
    dataset = load(tmp_path)
    raw = Normalisation((0.0,) * 3, (1.0,) * 3)
    ((images, labels),) = dataset.evaluation("test", 0, 1, raw, CPU, 0)
    (turned,) = images[labels == 1]
    assert turned[:, :3].min() > 0.9
    assert turned[:, 5:].max() < 0.1


@pytest.mark.parametrize("bits", [8, 16])
def test_grey_has_its_brightness_in_three_channels(bits, tmp_path):
    levels = np.full((10, 12), 200, np.uint8)
    stored = levels if bits == 8 else levels.astype(np.uint16) << 8
    Image.fromarray(stored).save(tmp_path / "grey.png")
    view = evaluation_view(Image.open(tmp_path / "grey.png"), 8)
    assert view.shape == (8, 8, 3)
    assert (view == 200).all()


def test_other_images_are_another_run_wherever_they_lie(pets, tmp_path):
    moved = fill(tmp_path / "elsewhere", CLASSES)
    hashes = {config_hash(config(root)) for root in (pets, moved)}
    assert len(hashes) == 1
    (moved / "dog" / "0.png").write_bytes(b"another")
    assert config_hash(config(moved)) not in hashes


@pytest.mark.parametrize(
    ("change", "overrides", "sentence"),
    [
        (lambda root: fill(root, {"lonely": 1}), [], "a single image of the class lonely"),
        (lambda root: (root / "empty").mkdir(), [], "empty holds no images"),
        (None, ["data.test_share=1.5"], "data.test_share=1.5 must be between 0 and 1"),
        (lambda root: fill(root, {"train/x": 2}), [], "holds a single class, x"),
        (lambda root: fill(root, {"val/dog": 2}), [], "val is called like a split"),
        (lambda root: fill(root, {"Train/dog": 2}), [], "Train is called like a split"),
        (lambda root: fill(root, {"train/dog": 2, "Val/dog": 2}), [], "Val is called like a split"),
    ],
)
def test_folders_that_do_not_fit_are_refused(pets, change, overrides, sentence):
    if change:
        change(pets)
    with pytest.raises(InputError, match=sentence):
        load(pets, *overrides)


def test_a_folder_that_is_missing_is_refused_before_anything(tmp_path):
    with pytest.raises(InputError, match="nowhere is no folder: it must hold a folder of images"):
        config_hash(config(tmp_path / "nowhere"))


def test_what_is_not_an_image_changes_no_run(pets):
    before = config_hash(config(pets))
    (pets / "dog" / "Thumbs.db").write_text("x")
    (pets / "labels.csv").write_text("x")
    assert config_hash(config(pets)) == before


def test_runs_do_not_lie_among_the_classes(pets):
    with pytest.raises(InputError, match=r"lies in data.root=.*, where every folder is a class"):
        train.train(config(pets, f"runs_dir='{pets}/runs'"))


def test_an_upright_jpeg_is_not_decoded(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg")
    image = Image.open(tmp_path / "a.jpg")
    assert upright(image) is image
    image.draft("RGB", (16, 16))  # which does nothing to a decoded one
    assert image.size == (16, 16)


def test_what_is_transparent_is_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (np.asarray(upright(image).convert("RGB")) == 255).all()


def test_what_is_transparent_is_turned_too(tmp_path):
    stored = np.zeros((8, 16, 4), np.uint8)
    stored[:, 8:, 3] = 255
    image = Image.fromarray(stored)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    seen = np.asarray(upright(Image.open(tmp_path / "a.png")).convert("L"))
    assert seen.shape == (16, 8)
    assert seen[:8].min() == 255
    assert seen[8:].max() == 0


def test_a_folder_that_is_left_open_is_asked_for():
    with pytest.raises(InputError, match=r"data\.root is missing: add data\.root=<folder with"):
        compose("train", ["experiment=image_folder"])
