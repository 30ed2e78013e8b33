"""Whoever takes an exported network away can ask it of images, and gets what the run's tests got."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2 as transforms

from experiments import classify, train
from experiments.configuration import compose
from experiments.data.image_folder import load_image_folder, read_image
from tests.helpers import refusal, small


@pytest.fixture(scope="module")
def overrides(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    for name, brightness in (("day", 140), ("night", 100)):
        (root / name).mkdir()
        for number in range(20):
            pixels = draw.normal(brightness, 40, (24 + number, 40, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return [
        *("experiment=image_folder", "model=resnet20", "model.width=0.25", "model.weights=null"),
        *(f"data.root={root}", "data.image_size=16", "optim.batch_size=8", "epochs=2", "method=l1"),
        *("runtime.threads=1", "tracking.mode=disabled", f"runs_dir={root.parent / 'runs'}"),
    ]


@pytest.fixture(scope="module")
def run(overrides):
    return train.run(overrides)


def test_it_sees_what_the_runs_test_saw(run, overrides):
    dataset = load_image_folder(compose("train", overrides).data)
    names = [name.decode() for name in dataset.test.names.tolist()]
    lines = classify.classify(run, [Path(dataset.root, name) for name in names])
    seen = [line.split(": ")[1].split(",")[0] for line in lines]
    right = sum(label == name.split("/")[0] for label, name in zip(seen, names, strict=True))
    top1 = json.loads((run / "summary.json").read_text())["top1"]
    assert 100 * right / len(names) == pytest.approx(top1)


def test_the_spec_says_how_an_image_becomes_the_networks_input(run, tmp_path):
    spec = json.loads((run / "export" / "spec.json").read_text())
    preprocessing = spec["preprocessing"]
    assert preprocessing["turned_upright"]
    view = transforms.Compose(
        [
            transforms.Resize(preprocessing["shorter_side"]),
            transforms.CenterCrop(preprocessing["size"]),
            transforms.PILToTensor(),
        ]
    )
    draw = np.random.default_rng(1)
    for height, width in ((30, 41), (18, 18), (90, 60)):
        image = Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8))
        path = tmp_path / f"{height}.png"
        image.save(path)
        ours = read_image(path, preprocessing["size"], turn=True)
        assert torch.equal(ours[0].permute(2, 0, 1), view(image))


def test_what_cannot_be_asked_is_one_sentence(run, tmp_path, monkeypatch):
    def main():
        classify.main(words)

    words = [str(run), "nothing.jpg"]
    assert refusal(main, [], monkeypatch) == "nothing.jpg cannot be read: No such file or directory"
    (tmp_path / "text.jpg").write_text("text")
    words = [str(run), str(tmp_path / "text.jpg")]
    assert refusal(main, [], monkeypatch) == f"{words[1]} cannot be read: not an image"
    digits = train.run(small(tmp_path, "dense", "epochs=1"))
    words = [str(digits), "nothing.jpg"]
    assert "was trained on images that are no files" in refusal(main, [], monkeypatch)
