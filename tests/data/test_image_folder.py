"""ImageFolder: torchvision's pixels and crops, epochs that do not depend on ranks or workers, refused folders."""

import io
import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from sklearn.datasets import load_sample_image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from experiments import train
from experiments.configuration import compose
from experiments.data import folder_index, image_folder, transforms
from experiments.data.base import Normalisation, Sharing
from experiments.schema import ImageFolderConfig, OnCorrupt
from psap_core import InputError
from tests.data.photographs import DAISY, PALACE, sample_folder
from tests.limits import HANG_SECONDS

CPU = torch.device("cpu")
NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
IMAGENETTE = Path(os.environ.get("PSAP_DATA", "data"), "imagenette")
VICTIM = f"train/{DAISY}/{DAISY}_train_00005.JPEG"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """32 training and 14 validation images of 200x150 pixels, that no test changes."""
    return sample_folder(tmp_path_factory.mktemp("photographs"), train=16, val=7, size=(200, 150))


@pytest.fixture
def root(pristine, tmp_path):
    """A copy of them."""
    return shutil.copytree(pristine, tmp_path / "copy")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "psap"


def config(root, **changes):
    settings = {
        "name": "imagenet",
        "root": str(root),
        "image_size": 32,
        "train_images": None,
        "validation_images": 0,
        "flip": True,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "on_corrupt": OnCorrupt.error,
        **changes,
    }
    return ImageFolderConfig(**settings)


def raw(images):
    """Instead of a normalisation: the pixels as they are."""
    return images


def training(
    root,
    batch_size=12,
    rank=0,
    ranks=1,
    accumulate=1,
    workers=0,
    seed=3,
    normalisation=raw,
    **changes,
):
    dataset = image_folder.load_image_folder(config(root, **changes))
    return dataset.training(
        Sharing(batch_size, rank, ranks, accumulate), normalisation, seed, CPU, workers
    )


def whole(batch):
    """All images and labels of a batch of this rank."""
    return [torch.cat(tensors) for tensors in zip(*batch.parts, strict=True)]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert [len(images) for images, _ in a.parts] == [len(images) for images, _ in b.parts]
        assert all(map(torch.equal, whole(a), whole(b)))
        assert a.images == b.images


def assert_evaluates_as_torchvision(root, size, step=1):
    ours = image_folder.load_image_folder(config(root, image_size=size)).evaluation(
        "test", 0, step, raw, CPU, 0
    )
    recipe = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()])
    folder = ImageFolder(str(root / "val"), recipe)
    theirs = [folder[index] for index in range(0, len(folder), step)]
    images, labels = (torch.cat(parts) for parts in zip(*ours, strict=True))
    assert labels.tolist() == [label for _, label in theirs]
    assert torch.equal(images, torch.stack([image for image, _ in theirs]))


# The recipe.


@pytest.mark.parametrize("size", [1, 32, 65, 224])
def test_evaluation_pixels_equal_torchvisions_gray_cmyk_and_png_among_them(pristine, size):
    modes = {Image.open(path).mode for path in (pristine / "val" / PALACE).iterdir()}
    assert modes == {"RGB", "L", "CMYK"}
    assert_evaluates_as_torchvision(pristine, size)


@pytest.mark.parametrize("size", [32, 224])
def test_training_pixels_equal_torchvisions_tensors_for_the_same_crop_and_nearly_its_pil_images(
    pristine, size
):
    draw = np.random.default_rng(size)
    for path in sorted((pristine / "train").rglob("*.JPEG")):
        uniforms = draw.random(transforms.DRAWS).tolist()
        left, top, width, height = transforms.crop_box(200, 150, uniforms)
        if min(width, height) >= 4 * size:
            continue  # decoded at a lower resolution: a test of its own
        ours = torch.from_numpy(
            transforms.training_view(Image.open(path), size, uniforms, flip=True)
        )
        with Image.open(path) as image:
            image = image.convert("RGB")
            for whole_image, tolerance in ((v2.functional.pil_to_tensor(image), 0), (image, 1)):
                theirs = v2.functional.resized_crop(
                    whole_image, top, left, height, width, [size, size], antialias=True
                )
                theirs = v2.functional.horizontal_flip(theirs) if uniforms[-1] < 0.5 else theirs
                difference = ours.permute(2, 0, 1).int() - v2.functional.to_image(theirs).int()
                assert difference.abs().max() <= tolerance
                assert difference.abs().float().mean() < 0.05


@pytest.mark.parametrize(
    "size", [(500, 375), (375, 500), (224, 224), (1000, 90), (90, 1000), (3, 2), (1, 1)]
)
def test_a_crop_is_the_box_that_torchvision_makes_of_the_same_numbers(size, monkeypatch):
    """torchvision's own code, whose torch draws the given numbers; the long shapes reach its last resort."""
    width, height = size
    recipe = v2.RandomResizedCrop(32)
    recipe._log_ratio = torch.log(torch.tensor(recipe.ratio, dtype=torch.float64))
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    draw = np.random.default_rng(width)
    for _ in range(200):
        uniforms = draw.random(22).tolist()
        tries, corner = iter(uniforms[:20]), iter(uniforms[20:])
        fake = SimpleNamespace(
            exp=torch.exp,
            empty=lambda _, tries=tries: SimpleNamespace(
                uniform_=lambda low, high: torch.as_tensor(
                    low + next(tries) * (high - low), dtype=torch.float64
                )
            ),
            randint=lambda low, high, size, corner=corner: torch.tensor(
                int(low + next(corner) * (high - low))
            ),
        )
        with monkeypatch.context() as patch:
            patch.setattr("torchvision.transforms.v2._geometry.torch", fake)
            box = recipe.make_params([image])
        assert transforms.crop_box(width, height, uniforms) == (
            box["left"],
            box["top"],
            box["width"],
            box["height"],
        )


def test_crops_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    recipe, image = v2.RandomResizedCrop(224), torch.zeros(3, 375, 500, dtype=torch.uint8)
    theirs = [recipe.make_params([image]) for _ in range(3000)]
    theirs = np.array(
        [(box["left"], box["top"], box["width"], box["height"]) for box in theirs], dtype=float
    )
    uniforms = np.random.default_rng(0).random((3000, transforms.DRAWS)).tolist()
    ours = np.array([transforms.crop_box(500, 375, row) for row in uniforms], dtype=float)
    for quantity in (
        lambda box: box[:, 2] * box[:, 3],
        lambda box: box[:, 2] / box[:, 3],
        lambda box: box[:, 0] / (501 - box[:, 2]),
        lambda box: box[:, 1] / (376 - box[:, 3]),
    ):
        assert ks_2samp(quantity(ours), quantity(theirs)).pvalue > 0.01


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_decoding_a_large_crop_at_a_lower_resolution_matters_less_than_the_choice_of_a_filter(
    name, monkeypatch
):
    file = io.BytesIO()
    Image.fromarray(load_sample_image(name)).save(file, "JPEG", quality=90)
    draw = np.random.default_rng(0)
    reduced, bicubic = [], []
    for _ in range(100):
        uniforms = draw.random(transforms.DRAWS).tolist()
        image, untouched = Image.open(file), Image.open(file)
        monkeypatch.setattr(untouched, "draft", lambda *_: None)
        left, top, width, height = transforms.crop_box(640, 427, uniforms)
        ours, exact = (
            transforms.training_view(opened, 48, uniforms, flip=False).astype(int)
            for opened in (image, untouched)
        )
        if image.width == 640:
            assert min(width, height) < 4 * 48
            assert np.array_equal(ours, exact)
        else:
            assert min(width, height) * image.width / 640 >= 2 * 48
            crop = untouched.crop((left, top, left + width, top + height))
            filtered = np.asarray(crop.resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
            reduced.append(np.abs(ours - exact).mean())
            bicubic.append(np.abs(filtered - exact).mean())
    assert 10 < len(reduced) < 100
    assert np.mean(reduced) < min(2, np.mean(bicubic))
    assert max(reduced) < 6


def test_an_epoch_shows_every_image_once_with_its_label_mirrored_only_where_asked(
    pristine, monkeypatch
):
    monkeypatch.setattr(transforms, "crop_box", lambda width, height, _: (0, 0, width, height))
    recipe = v2.Compose([v2.PILToTensor(), v2.Resize((64, 64), antialias=True)])
    expected = {
        image.numpy().tobytes(): label
        for image, label in ImageFolder(str(pristine / "train"), recipe)
    }
    flipped = [
        v2.functional.horizontal_flip(image)
        for image, _ in ImageFolder(str(pristine / "train"), recipe)
    ]
    mirrored = {image.numpy().tobytes() for image in flipped}

    def shown(flip):
        batches = list(training(pristine, image_size=64, flip=flip).epoch("train", 0))
        assert (
            [len(batch.parts[0][1]) for batch in batches]
            == [batch.images for batch in batches]
            == [12, 12, 8]
        )
        images, labels = (torch.cat(tensors) for tensors in zip(*map(whole, batches), strict=True))
        keys = [image.contiguous().numpy().tobytes() for image in images]
        return dict(zip(keys, labels.tolist(), strict=True))

    assert shown(flip=False) == expected
    assert 8 < len(mirrored & shown(flip=True).keys()) < 24


def test_batches_are_normalised_float32_in_channels_last_memory(pristine):
    pixels = next(training(pristine).epoch("train", 0)).parts[0][0]
    images, labels = next(training(pristine, normalisation=NORMALISATION).epoch("train", 0)).parts[
        0
    ]
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert images.shape == (12, *image_folder.load_image_folder(config(pristine)).image_shape)
    assert images.is_contiguous(memory_format=torch.channels_last)
    theirs = v2.functional.normalize(
        pixels.float() / 255, list(NORMALISATION.mean), list(NORMALISATION.std)
    )
    assert torch.equal(images, theirs)


# Determinism.


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_share_the_batches_of_one(pristine, accumulate):
    alone = list(training(pristine).epoch("train", 1))
    ranks = [
        list(training(pristine, rank=rank, ranks=2, accumulate=accumulate).epoch("train", 1))
        for rank in (0, 1)
    ]
    for one, first, second in zip(alone, *ranks, strict=True):
        assert len(first.parts) == len(second.parts) == accumulate
        assert one.images == first.images == second.images
        for ours, *theirs in zip(whole(one), whole(first), whole(second), strict=True):
            assert torch.equal(ours, torch.cat(theirs))


def test_epochs_entered_anywhere_left_anywhere_and_read_by_workers_are_the_same(pristine):
    here, workers = training(pristine), training(pristine, workers=2)
    assert here.batches == workers.batches == 3
    assert len(here) == len(workers) == 32
    epochs = {key: list(here.epoch(*key)) for key in (("train", 0), ("train", 1), ("pulse", 0))}
    for images in (workers, here):
        for key, epoch in epochs.items():
            assert_same(images.epoch(*key), epoch)
            assert_same(
                itertools.islice(images.epoch("train", 5), 1), list(here.epoch("train", 5))[:1]
            )
            for first in (1, 2, 3):
                assert_same(images.epoch(*key, first), epoch[first:])


def test_epochs_streams_and_seeds_differ(pristine):
    keys = [(3, "train", 0), (3, "train", 1), (3, "pulse", 0), (4, "train", 0)]
    firsts = [whole(next(training(pristine, seed=seed).epoch(*key)))[0] for seed, *key in keys]
    for one, other in itertools.combinations(firsts, 2):
        assert not torch.equal(one, other)


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_torchs_own_generator_alone(pristine, workers):
    before = torch.get_rng_state()
    list(training(pristine, workers=workers).epoch("train", 0))
    list(
        image_folder.load_image_folder(config(pristine)).evaluation("test", 0, 1, raw, CPU, workers)
    )
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_evaluate_every_image_once(pristine, monkeypatch, workers):
    monkeypatch.setattr(image_folder, "EVALUATION_BATCH", 3)
    dataset = image_folder.load_image_folder(config(pristine, validation_images=6))
    for split, count in (("test", 14), ("validation", 6)):
        assert dataset.count(split) == count
        alone = list(dataset.evaluation(split, 0, 1, raw, CPU, 0))
        assert [len(labels) for _, labels in alone] == [3] * (count // 3) + [count % 3] * (
            count % 3 > 0
        )
        images, labels = (torch.cat(tensors) for tensors in zip(*alone, strict=True))
        for ranks in (2, 3):
            for rank in range(ranks):
                mine = dataset.evaluation(split, rank, ranks, raw, CPU, workers)
                theirs = [torch.cat(tensors) for tensors in zip(*mine, strict=True)]
                assert torch.equal(theirs[0], images[rank::ranks])
                assert torch.equal(theirs[1], labels[rank::ranks])
    assert (
        list(
            image_folder.load_image_folder(config(pristine)).evaluation(
                "validation", 0, 1, raw, CPU, 0
            )
        )
        == []
    )


def test_splits_are_fixed_disjoint_and_stratified(pristine):
    full = image_folder.load_image_folder(config(pristine, validation_images=6))
    part = image_folder.load_image_folder(config(pristine, validation_images=6, train_images=4))
    assert full.validation.names.tolist() == part.validation.names.tolist()
    assert full.validation.labels.tolist().count(0) == part.train.labels.tolist().count(0) + 1 == 3
    assert part.train.names.tolist() == full.train.names.tolist()[:4]
    everything = {
        os.fsencode(path.relative_to(pristine)) for path in (pristine / "train").rglob("*.JPEG")
    }
    assert sorted([*full.train.names.tolist(), *full.validation.names.tolist()]) == sorted(
        everything
    )


# Damaged images.


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2000])


def overwrite(path):
    path.write_bytes(b"nothing")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "reason"), [(truncate, "truncated"), (overwrite, "not an image")]
)
def test_a_damaged_image_is_named(root, damage, reason, workers):
    damage(root / VICTIM)
    with pytest.raises(
        InputError,
        match=rf"{VICTIM} is damaged \(.*{reason}.*\): replace it, or .*on_corrupt=skip$",
    ):
        list(training(root, workers=workers).epoch("train", 0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_left_out_where_that_is_asked_for(root, pristine, workers):
    sound = list(training(pristine, accumulate=2).epoch("train", 0))
    truncate(root / VICTIM)
    images = training(root, accumulate=2, workers=workers, on_corrupt=OnCorrupt.skip)
    for batch, theirs in zip(images.epoch("train", 0), sound, strict=True):
        assert batch.images == theirs.images
        for (ours, labels), (expected, _) in zip(batch.parts, theirs.parts, strict=True):
            assert len(ours) == len(labels)
            rows = [
                row
                for row, image in enumerate(expected)
                if any(torch.equal(image, one) for one in ours)
            ]
            assert len(rows) == len(ours) >= len(expected) - 1
    assert images.photographs.skipped == {VICTIM}


def test_damaged_evaluation_images_are_left_out_too(root):
    for index in range(7):
        overwrite(root / f"val/{DAISY}/{DAISY}_val_{index:05d}.JPEG")
    with pytest.raises(InputError, match="is damaged"):
        list(image_folder.load_image_folder(config(root)).evaluation("test", 0, 1, raw, CPU, 0))
    dataset = image_folder.load_image_folder(config(root, on_corrupt=OnCorrupt.skip))
    ((images, labels),) = dataset.evaluation("test", 0, 1, raw, CPU, 0)
    assert len(images) == 7
    assert labels.tolist() == [0] * 7
    assert len(dataset.skipped) == 7
    assert dataset.count("test") == 14


def test_a_part_of_fewer_than_two_readable_images_is_refused(root):
    names = sorted(path.relative_to(root) for path in (root / "train").rglob("*.JPEG"))
    for name in names[1:]:
        overwrite(root / name)
    with pytest.raises(
        InputError, match=r"^[01] of [46] images of a batch can be read, train/.* cannot: replace"
    ):
        list(training(root, accumulate=2, on_corrupt=OnCorrupt.skip).epoch("train", 0))


def test_a_file_that_cannot_be_read_is_no_damaged_image(root):
    images = training(root, on_corrupt=OnCorrupt.skip)
    (root / VICTIM).unlink()
    with pytest.raises(InputError, match=f"{VICTIM} cannot be read: No such file"):
        list(images.epoch("train", 0))
    assert images.photographs.skipped == set()


@pytest.mark.long
def test_a_process_with_workers_ends_with_one_sentence(root):
    """Although it has a handler for SIGTERM, and the error keeps the loader alive."""
    overwrite(root / VICTIM)
    program = """
import signal, sys, torch
from experiments.data import image_folder
from experiments.data.base import Sharing
from experiments.entry import plain_exits
from experiments.schema import OnCorrupt, ImageFolderConfig
signal.signal(signal.SIGTERM, lambda *_: None)
with plain_exits():
    cfg = ImageFolderConfig("imagenet", sys.argv[1], 32, None, 0, True, [0.5] * 3, [0.5] * 3, OnCorrupt.error)
    images = image_folder.load_image_folder(cfg).training(Sharing(12), lambda images: images, 0, torch.device("cpu"), 2)
    for batch in images.epoch("train", 0):
        pass
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(root)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert VICTIM in done.stderr


@pytest.mark.long
def test_a_killed_reader_is_one_sentence(tmp_path):
    sample_folder(tmp_path / "images", size=(64, 48))
    words = ["experiment=image_folder", f"data.root={tmp_path / 'images'}", "data.image_size=32"]
    words += ["model=torchvision", "model.name=resnet18", "model.weights=null", "epochs=400"]
    words += ["optim.batch_size=8", "runtime.workers=1", "method=dense", "tracking.mode=disabled"]
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *words, f"runs_dir={tmp_path / 'runs'}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.rglob("last.pt")):
        assert process.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    said = process.communicate(timeout=HANG_SECONDS)[1]
    assert process.returncode == 1
    assert "error: a process that reads images was killed; too little memory asks for" in said
    assert "Traceback" not in said


# The index.


def test_the_index_is_read_from_its_cache_until_a_folder_changes(root, cache, monkeypatch):
    dataset = image_folder.load_image_folder(config(root))
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(folder_index, "_scanned", lambda root: pytest.fail("scanned again"))
        assert image_folder.load_image_folder(config(root)).digest == dataset.digest
    (root / VICTIM).with_name("another.JPEG").write_bytes(b"")
    assert len(image_folder.load_image_folder(config(root)).train) == len(dataset.train) + 1
    shutil.copytree(root / "train" / DAISY, root / "train" / "n00000001")
    shutil.copytree(root / "val" / DAISY, root / "val" / "n00000001")
    assert image_folder.load_image_folder(config(root)).classes == 3
    assert [path.name for path in cache.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "damage", [truncate, overwrite, lambda path: path.write_text('{"index": {}}')]
)
def test_a_damaged_cache_is_no_error(root, cache, damage):
    dataset = image_folder.load_image_folder(config(root))
    (file,) = cache.iterdir()
    sound = file.read_bytes()
    damage(file)
    assert image_folder.load_image_folder(config(root)).digest == dataset.digest
    assert file.read_bytes() == sound


def test_an_unwritable_cache_is_no_error(pristine, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert image_folder.load_image_folder(config(pristine)).classes == 2


def test_the_digest_depends_on_the_files_and_not_on_where_they_are(root, pristine):
    digest = image_folder.load_image_folder(config(pristine)).digest
    assert image_folder.load_image_folder(config(root)).digest == digest
    assert image_folder.load_image_folder(config(pristine, train_images=10)).digest != digest
    truncate(root / VICTIM)
    os.utime((root / VICTIM).parent, ns=(0, 0))
    assert image_folder.load_image_folder(config(root)).digest != digest


# Refused and accepted folders.


def flatten(root, table=None):
    """val/ as ImageNet's own archive leaves it; `table` makes rows of (name, wnid) of LOC_val_solution.csv."""
    rows = []
    for path in sorted((root / "val").rglob("*.JPEG")):
        target = root / "val" / f"ILSVRC2012_val_{len(rows) + 1:08d}.JPEG"
        rows.append((target.stem, path.parent.name))
        path.rename(target)
    for wnid in (PALACE, DAISY):
        (root / "val" / wnid).rmdir()
    if table:
        lines = [
            "ImageId,PredictionString",
            *(f"{name},{wnid} 1 2 3 4" for name, wnid in table(rows)),
        ]
        (root / folder_index.FLAT_LABELS).write_text("\n".join(lines) + "\n")


def test_a_flat_validation_folder_works_with_its_table(root):
    sorted_folders = image_folder.load_image_folder(config(root)).test.labels.tolist()
    flatten(root, table=reversed)
    assert (
        image_folder.load_image_folder(config(root)).test.labels.tolist()
        == sorted_folders
        == [0] * 7 + [1] * 7
    )


def unlink_all(folder):
    for path in folder.iterdir():
        path.unlink()


def remove_class(root):
    shutil.rmtree(root / "train" / DAISY)
    shutil.rmtree(root / "val" / DAISY)


@pytest.mark.parametrize(
    ("change", "changes", "sentence"),
    [
        (
            shutil.rmtree,
            {},
            r"copy is no folder: data.root=.*copy must hold train/ and val/ with a folder per class",
        ),
        (
            lambda root: shutil.rmtree(root / "train"),
            {},
            "copy/train is no folder: .* must hold train/ and val/",
        ),
        (
            lambda root: shutil.rmtree(root / "val"),
            {},
            "copy/val is no folder: .* must hold train/ and val/",
        ),
        (
            lambda root: unlink_all(root / "train" / DAISY),
            {},
            f"train/{DAISY} holds no images .* fill it, or remove",
        ),
        (lambda root: unlink_all(root / "val" / PALACE), {}, f"val/{PALACE} holds no images"),
        (
            lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()],
            {},
            "train holds no images in f",
        ),
        (
            lambda root: [shutil.rmtree(path) for path in (root / "val").iterdir()],
            {},
            "val holds no images in folders",
        ),
        (remove_class, {}, f"train holds a single class, {PALACE}"),
        (
            lambda root: shutil.rmtree(root / "val" / DAISY),
            {},
            f"train holds the class {DAISY} and .*val does not",
        ),
        (lambda root: shutil.rmtree(root / "train" / DAISY), {}, "train holds a single class"),
        (
            lambda root: (root / "train" / DAISY).rename(root / "train" / "n00000001"),
            {},
            "holds the class n00000001",
        ),
        (
            lambda root: (root / "train" / DAISY).rename(root / "train" / "daisy"),
            {},
            "train/daisy is named after no W",
        ),
        (
            flatten,
            {},
            "holds its images directly: move them into a folder per class.*or put LOC_val_solution.csv",
        ),
        (
            lambda root: flatten(root, lambda rows: rows[:-1]),
            {},
            "LOC_val.* class of .*val_00000014.JPEG: it must cov",
        ),
        (
            lambda root: flatten(root, lambda rows: [(rows[0][0], "")]),
            {},
            "LOC_val_solution.csv does not|is damaged",
        ),
        (
            lambda root: flatten(root, lambda rows: [(n, DAISY) for n, _ in rows]),
            {},
            f"train holds the class {PALACE}",
        ),
        (None, {"validation_images": 32}, "do not fit into the 32 training images"),
        (None, {"validation_images": 6, "train_images": 27}, "do not fit into the 32"),
        (None, {"image_size": 0}, "data.image_size=0 must be at least 1"),
        (None, {"mean": [0.5]}, "must have 3 numbers, one per channel"),
        (None, {"std": [0.5] * 4}, "must have 3 numbers, one per channel"),
    ],
)
def test_folders_and_settings_that_do_not_fit_are_refused(root, change, changes, sentence):
    if change:
        change(root)
    with pytest.raises(InputError, match=sentence) as raised:
        image_folder.load_image_folder(config(root, **changes))
    assert "\n" not in str(raised.value)


@pytest.fixture
def imagenette(monkeypatch, pristine):
    """torchvision's downloads; `imagenette.error` makes them fail half way."""

    class Fake:
        error = None

        def __init__(self, root, download):
            assert download
            shutil.copytree(pristine, Path(root, "imagenette2"))
            if Fake.error:
                raise Fake.error

    monkeypatch.setattr("torchvision.datasets.Imagenette", Fake)
    return Fake


def visible(folder):
    return [path.name for path in folder.iterdir() if not path.name.startswith(".")]


def test_imagenette_is_taken_from_torchvisions_folder_or_downloaded(imagenette, pristine, tmp_path):
    data = tmp_path / "data"
    with pytest.raises(InputError, match="data is no folder: create it"):
        image_folder.load_image_folder(config(data / "imagenette", name="imagenette"))
    data.mkdir()
    for error in (URLError("no network"), RuntimeError("File not found or corrupted.")):
        imagenette.error = error
        with pytest.raises(
            InputError,
            match=r"Imagenette could not be downloaded to .*data: .*(no network|corrupted)",
        ):
            image_folder.load_image_folder(config(data / "imagenette", name="imagenette"))
        assert visible(data) == []
    imagenette.error = None
    assert (
        image_folder.load_image_folder(config(data / "imagenette", name="imagenette")).count("test")
        == 14
    )
    assert visible(data) == ["imagenette"]
    (data / "imagenette").rename(data / "imagenette2")
    imagenette.error = AssertionError("downloaded again")
    assert (
        image_folder.load_image_folder(config(data / "imagenette", name="imagenette")).count("test")
        == 14
    )


@pytest.mark.parametrize("name", ["imagenet", "imagenette"])
def test_configurations(name, monkeypatch):
    monkeypatch.setenv("PSAP_DATA", "somewhere")
    cfg = compose("train", ["experiment=digits_resnet20", "method=dense", f"data={name}"]).data
    assert isinstance(cfg, ImageFolderConfig)
    assert (cfg.name, cfg.root, cfg.image_size) == (name, f"somewhere/{name}", 224)
    assert (cfg.on_corrupt, cfg.flip, cfg.mean[0], cfg.std[0]) == (
        OnCorrupt.error,
        True,
        0.485,
        0.229,
    )


@pytest.mark.skipif(not IMAGENETTE.is_dir(), reason="no imagenette in PSAP_DATA")
def test_imagenettes_own_photographs():
    assert_evaluates_as_torchvision(IMAGENETTE, 160, step=200)
    dataset = image_folder.load_image_folder(config(IMAGENETTE, train_images=60, image_size=160))
    assert dataset.classes == 10
    assert sorted(dataset.train.labels.tolist()) == sorted(list(range(10)) * 6)
    batches = [
        list(dataset.training(Sharing(32), NORMALISATION, 0, CPU, workers).epoch("train", 0))
        for workers in (0, 2)
    ]
    assert_same(*batches)
    means = torch.cat([whole(batch)[0] for batch in batches[0]]).mean((0, 2, 3))
    assert all(math.isfinite(mean) and abs(mean) < 0.7 for mean in means.tolist())


@pytest.mark.long
def test_a_signal_to_every_process_of_a_run_leads_to_a_checkpoint_and_an_equal_end(tmp_path):
    """As some clusters send it: to training and to the processes that read for it, more than once."""
    root = sample_folder(tmp_path / "photographs", train=12, val=4, size=(60, 48))

    def overrides(runs: str) -> list[str]:
        small = [
            "data.image_size=32",
            "epochs=3",
            "optim.batch_size=8",
            "runtime.device=cpu",
            "runtime.workers=1",
            "runtime.threads=1",
        ]
        places = [f"data.root={root}", f"runs_dir={tmp_path / runs}", "tracking.mode=disabled"]
        return ["experiment=imagenet_resnet18", *small, *places]

    command = [sys.executable, "-m", "experiments.train", *overrides("stopped")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert any("epoch 1/3" in line for line in process.stderr)
    readers = [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    assert readers
    for pid in [*readers, process.pid] * 2:
        os.kill(pid, signal.SIGTERM)
    said = process.communicate(timeout=HANG_SECONDS)[1]
    assert process.returncode == 75, said
    assert not any(Path(f"/proc/{pid}").exists() for pid in readers)
    folders = [train.run(overrides(runs)) for runs in ("stopped", "whole")]
    weights = [(folder / "export" / "weights.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
