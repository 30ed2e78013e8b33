"""Networks of timm and torchvision: by name, from weights of other classes, built again from what was exported."""

import pytest
import torch
from safetensors.torch import save_file

from experiments import models
from experiments.models.package_nets import expected_normalisation
from experiments.schema import Fan, Package, PackageModelConfig
from psap_core import InputError

timm = pytest.importorskip("timm")
SMALL = "test_resnet"


def config(name, package=Package.timm, weights=None, width=1.0):
    return PackageModelConfig(name, width, weights, Fan.out, package)


@pytest.mark.parametrize(
    ("cfg", "channels", "side"),
    [
        (config(SMALL), 1, 32),
        (config("test_vit"), 3, 48),  # takes one size only
        (config("squeezenet1_1", Package.torchvision), 3, 64),  # its classifier is a convolution
        (config("googlenet", Package.torchvision), 3, 64),  # in training it has other outputs, too
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_network_gives_logits_of_our_classes(cfg, channels, side):
    network = models.build(cfg, channels, 7, side).train()
    assert network(torch.randn(2, channels, side, side)).shape == (2, 7)


@pytest.mark.parametrize("name", ["squeezenet1_1", "mobilenet_v3_small", "densenet121"])
def test_weights_of_other_classes_leave_the_last_layer_fresh(name, tmp_path, capsys):
    cfg = config(name, Package.torchvision)
    theirs = models.build(cfg, 3, 11).state_dict()
    save_file(theirs, tmp_path / "theirs.safetensors")
    cfg = config(name, Package.torchvision, str(tmp_path / "theirs.safetensors"))
    network, _ = models.start(cfg, 3, 4, new_classifier=True)
    own = network.state_dict()
    fresh = {key for key, tensor in own.items() if not torch.equal(tensor, theirs[key])}
    assert fresh
    assert {key.rpartition(".")[0] for key in fresh} == {list(own)[-1].rpartition(".")[0]}
    assert "is for another number of classes" in capsys.readouterr().err
    with pytest.raises(InputError, match="is of another network than"):
        models.start(cfg, 3, 4)


def test_timms_weights_bring_their_normalisation(tmp_path):
    network = timm.create_model(SMALL, num_classes=3)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    _, normalisation = models.start(
        config(SMALL, weights=str(tmp_path / "model.safetensors")), 3, 3
    )
    assert normalisation == expected_normalisation(network, 3)
    assert normalisation.mean == network.pretrained_cfg["mean"]


def test_grey_images_keep_their_own_normalisation(tmp_path):
    network = timm.create_model(SMALL, num_classes=3, in_chans=1)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    _, normalisation = models.start(
        config(SMALL, weights=str(tmp_path / "model.safetensors")), 1, 3
    )
    assert normalisation is None


def test_pretrained_is_what_timm_publishes(monkeypatch):
    asked = []
    create = timm.create_model

    def create_model(name, pretrained, **options):
        asked.append((name, pretrained))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", create_model)
    models.start(config(SMALL, weights="pretrained"), 3, 2, 32, new_classifier=True)
    assert asked == [(SMALL, True)]


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    def create_model(*_, **__):
        raise RuntimeError("no route to\nthe hub")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(InputError, match="could not be had: no route to the hub; name a file"):
        models.start(config(SMALL, weights="pretrained"), 3, 2, 32)


@pytest.mark.parametrize(
    ("cfg", "channels", "sentence"),
    [
        (config("efficientnet_bo"), 3, "timm has no such network; did you mean efficientnet_b"),
        (config("resnet19", Package.torchvision), 3, "did you mean resnet1"),
        (config("qqqq"), 3, "has no such network; see its list"),
        (config(SMALL, width=0.5), 3, "test_resnet of timm has one width, 1"),
        (config("resnet18", Package.torchvision), 1, "takes colour images, these have 1 channel"),
        (
            config("vit_b_16", Package.torchvision),
            3,
            "torchvision cannot make vit_b_16 for 33 pixels",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(cfg, channels, sentence):
    with pytest.raises(InputError, match=sentence):
        models.build(cfg, channels, 10, 33)


def test_timm_is_optional(monkeypatch):
    monkeypatch.setattr("experiments.models.package_nets.find_spec", lambda name: None)
    with pytest.raises(InputError, match="is a network of timm: pip install timm"):
        models.build(config(SMALL), 3, 10, 32)
