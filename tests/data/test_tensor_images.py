"""Data: augmentation equal to torchvision's, fixed disjoint splits, position in an epoch, damaged files."""

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from safetensors.torch import save_file

from experiments import data
from experiments.data import tensor_images
from experiments.data.base import Normalisation, Sharing
from experiments.schema import DataConfig
from psap_core import InputError

DIGITS = DataConfig("digits", "unused", 8, None, 180, False, [0.5], [0.5])


def cifar10(root, **changes):
    settings = {"image_size": 32, "train_images": None, "validation_images": 0, **changes}
    return DataConfig("cifar10", str(root), flip=True, mean=[0.5] * 3, std=[0.5] * 3, **settings)


@pytest.fixture
def fake_cifar10(monkeypatch):
    """60 + 20 random images of CIFAR-10's shape instead of its file."""
    generator = torch.Generator().manual_seed(0)

    def split(count):
        images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
        return tensor_images.LabelledImages(images, torch.arange(count) % 10)

    splits = split(60), split(20)
    monkeypatch.setattr(tensor_images, "_load_cifar10", lambda root: splits)
    return splits


@pytest.mark.parametrize("size", [8, 16, 32])
def test_crop_equals_torchvision_bit_for_bit(size):
    generator = torch.Generator().manual_seed(size)
    images = torch.randint(256, (64, 3, size, size), dtype=torch.uint8, generator=generator)
    padding = size // 8
    top, left = torch.randint(2 * padding + 1, (2, 64), generator=generator)
    flip = torch.rand(64, generator=generator) < 0.5
    windows = tensor_images.crop_windows(size, padding)[(top * (2 * padding + 1) + left) * 2 + flip]
    ours = tensor_images.crop(F.pad(images, (padding,) * 4), windows)
    for i, image in enumerate(images):
        theirs = TF.crop(TF.pad(image, [padding]), int(top[i]), int(left[i]), size, size)
        theirs = TF.hflip(theirs) if flip[i] else theirs
        assert torch.equal(ours[i], theirs)


def test_normalisation_equals_torchvision():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
    theirs = TF.normalize(images.float() / 255, mean, std)
    assert torch.equal(Normalisation(mean, std)(images), theirs)


def training_images(batch_size=50, flip=True, seed=3):
    train = data.load_resident(DIGITS).train
    return tensor_images.TensorLoader(
        train, Normalisation((0.0,), (1.0,)), Sharing(batch_size), flip, seed
    )


def test_an_epoch_shows_every_image_once_and_can_be_entered_at_any_batch():
    images = training_images()
    epoch = [batch.parts[0] for batch in images.epoch("train", 2)]
    assert len(epoch) == images.batches == 26
    assert (
        torch.cat([labels for _, labels in epoch]).bincount().tolist()
        == images.labels.bincount().tolist()
    )
    for first in (0, 1, 25, 26):
        rest = [batch.parts[0] for batch in images.epoch("train", 2, first)]
        assert len(rest) == 26 - first
        assert all(torch.equal(a[0], b[0]) for a, b in zip(epoch[first:], rest, strict=True))


def test_epochs_streams_and_seeds_differ_and_are_repeatable():
    def first(images, stream, epoch):
        return next(images.epoch(stream, epoch)).parts[0][0]

    same = first(training_images(), "train", 0)
    assert torch.equal(same, first(training_images(), "train", 0))
    for other in (
        first(training_images(), "train", 1),
        first(training_images(), "pulse", 0),
        first(training_images(seed=4), "train", 0),
    ):
        assert not torch.equal(same, other)


def test_digits_split_is_fixed_disjoint_and_stratified():
    dataset = data.load_resident(DIGITS)
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [
        1257,
        180,
        360,
    ]
    assert dataset.digest == "b475865ddaccee787dc32659638179ee2e4baa31d95eef7673a1daa64ac77d48"
    assert dataset.test.labels.bincount().tolist() == [36] * 10
    assert dataset.validation.labels.bincount().tolist() == [18] * 10
    # Every image of the library is in exactly one split (two digits are drawn alike: compare as multisets).
    images = torch.cat(
        [split.images for split in (dataset.train, dataset.validation, dataset.test)]
    ).flatten(1)
    everything = torch.cat([split.images for split in tensor_images._load_digits(None)]).flatten(1)
    assert sorted(images.tolist()) == sorted(everything.tolist())


def test_validation_comes_first_and_training_images_from_the_rest(fake_cifar10, tmp_path):
    def rows(split):
        return {tuple(image.flatten().tolist()) for image in split.images}

    full = data.load_resident(cifar10(tmp_path, validation_images=20))
    part = data.load_resident(cifar10(tmp_path, validation_images=20, train_images=10))
    assert rows(full.validation) == rows(part.validation)
    assert rows(part.train) < rows(full.train)
    assert not rows(full.train) & rows(full.validation)
    assert rows(full.train) | rows(full.validation) == rows(fake_cifar10[0])
    assert part.train.labels.bincount().tolist() == [1] * 10


def test_downsampling_is_the_rounded_mean_of_an_area(fake_cifar10, tmp_path):
    small = data.load_resident(cifar10(tmp_path, image_size=16)).test.images
    native = fake_cifar10[1].images.double()
    assert small.shape == (20, 3, 16, 16)
    assert (small.double() - F.avg_pool2d(native, 2)).abs().max() <= 0.5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"validation_images": 60}, "do not fit into the 60 training images"),
        ({"validation_images": 20, "train_images": 41}, "do not fit into the 60"),
        ({"validation_images": -1}, "do not fit"),
        ({"image_size": 64}, "image_size=64 must be between 1 and the images' own 32"),
    ],
)
def test_impossible_splits_are_refused(changes, sentence, fake_cifar10, tmp_path):
    with pytest.raises(InputError, match=sentence):
        data.load_resident(cifar10(tmp_path, **changes))


def test_missing_root_truncated_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        data.load_resident(cifar10(tmp_path / "nowhere"))
    path = tmp_path / "cifar10.safetensors"
    save_file({"train_images": torch.zeros(2, 3, 32, 32, dtype=torch.uint8)}, path)
    with pytest.raises(InputError, match="has no uint8 tensor 'train_images' of shape"):
        data.load_resident(cifar10(tmp_path))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match="is damaged"):
        data.load_resident(cifar10(tmp_path))


def test_torchvisions_cifar10_is_converted_once_and_an_interrupted_conversion_leaves_nothing(
    tmp_path, monkeypatch
):
    class Fake:
        def __init__(self, root, train, download):
            assert download
            calls.append(train)
            count = 50000 if train else 10000
            self.data = torch.arange(count).mul(7).remainder(256).to(torch.uint8)
            self.data = self.data.view(-1, 1, 1, 1).expand(-1, 2, 3, 3).numpy()  # [N, H, W, C]
            self.targets = [i % 10 for i in range(count)]

    calls: list[bool] = []
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    monkeypatch.setattr(
        tensor_images,
        "CIFAR10_SHAPES",
        {
            k: (*v[:1], 3, 2, 3) if len(v) > 1 else v
            for k, v in tensor_images.CIFAR10_SHAPES.items()
        },
    )
    with monkeypatch.context() as patch:
        patch.setattr("experiments.data.tensor_images.os.replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tensor_images._load_cifar10(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".downloading"]
    for _ in range(2):
        train, test = tensor_images._load_cifar10(tmp_path)
    assert calls == [True, False] * 2
    assert train.images[5, 0, 0, 0] == 35
    assert len(test) == 10000
    assert test.labels[:3].tolist() == [0, 1, 2]
