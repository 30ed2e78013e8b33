"""Data and weights are fetched beforehand, once, and checked without a download."""

import multiprocessing
import time
from pathlib import Path

import pytest
import torch
from torchvision.models import get_model

from experiments import fetch
from experiments.data import tensor_images
from experiments.data.downloads import downloading
from experiments.models import weights
from experiments.schema import Fan, ResNetConfig, Shortcut
from psap_core import InputError


def refused(arguments, capsys) -> str:
    with pytest.raises(SystemExit) as exit:
        fetch.main(arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("name", ["cifar10", "imagenette"])
def test_check_says_what_is_missing_and_makes_nothing(name, tmp_path, capsys):
    root = tmp_path / "data"
    said = refused([name, f"data.root={root}", "--check"], capsys)
    assert f"{name} is not in {root}: the same command without --check downloads it" in said
    assert not root.exists()


def test_data_are_fetched_into_a_new_folder(tmp_path, monkeypatch, capsys):
    def torchvisions(root):
        return {
            "train_images": torch.zeros(50000, 3, 32, 32, dtype=torch.uint8),
            "train_labels": torch.arange(50000).remainder(10).to(torch.uint8),
            "test_images": torch.zeros(10000, 3, 32, 32, dtype=torch.uint8),
            "test_labels": torch.arange(10000).remainder(10).to(torch.uint8),
        }

    monkeypatch.setattr(tensor_images, "_torchvisions_cifar10", torchvisions)
    root = tmp_path / "data"
    fetch.main(["cifar10", f"data.root={root}"])
    said = f"cifar10: 50,000 training and 10,000 test images in {root}\n"
    assert capsys.readouterr().out == said
    monkeypatch.setattr(tensor_images, "_torchvisions_cifar10", None)
    fetch.main(["cifar10", f"data.root={root}", "--check"])
    assert capsys.readouterr().out == said


def test_weights_of_all_pretrained_recipes_go_where_torch_home_says(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    said = refused(["weights", "--check"], capsys)
    assert "IMAGENET1K_V1 of resnet18 is not there: " in said
    assert str(tmp_path / "hub" / "checkpoints" / "resnet18-") in said
    asked = []

    def get_state_dict(self, progress, check_hash):
        asked.append(Path(self.url).name)
        path = tmp_path / "hub" / "checkpoints" / asked[-1]
        path.touch()
        return get_model(asked[-1].partition("-")[0], weights=None).state_dict()

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", get_state_dict)
    fetch.main(["weights"])
    assert [name.partition("-")[0] for name in asked] == ["resnet18", "resnet34", "resnet50"]
    fetch.main(["weights", "experiment=imagenet_resnet50_pretrained", "--check"])
    assert capsys.readouterr().out.splitlines()[-1] == "resnet50: IMAGENET1K_V1 is there"


def test_a_recipe_without_published_weights_is_refused(capsys):
    said = refused(["weights", "experiment=imagenet_resnet50"], capsys)
    assert "starts from no published weights: there is nothing to fetch" in said


def hold(folder, started):
    with downloading(folder):
        started.set()
        time.sleep(1)
        (folder / "made").touch()


def test_who_comes_second_waits_and_finds_what_was_made(tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    process = context.Process(target=hold, args=(tmp_path, started))
    process.start()
    started.wait(30)
    with downloading(tmp_path):
        assert (tmp_path / "made").exists()
    process.join(30)
    assert "waiting for another process that downloads" in capsys.readouterr().err


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(InputError, match=r"cannot be written .* python -m experiments.fetch"),
        downloading(tmp_path / "file"),
    ):
        pass


def test_weights_that_are_not_torchvisions_are_refused():
    cfg = ResNetConfig("resnet20", 1.0, "pretrained", Fan("in"), Shortcut.option_a)
    with pytest.raises(InputError, match="is not one of torchvision's for resnet20: none"):
        weights.missing_download(cfg)
