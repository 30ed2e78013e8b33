"""Networks: published sizes, widths, shortcuts, weights files."""

import copy
import itertools
import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from experiments import models
from experiments.configuration import compose
from experiments.evaluate import evaluate_run as evaluate
from experiments.methods.sfp import SFP
from experiments.methods.thin import network_macs, thin_model
from experiments.models import cifar
from experiments.runs.files import weights_digest
from experiments.schema import Fan, ModelConfig, ResNetConfig, Shortcut
from psap_core import PSAP, InputError, export, export_error, macs, params
from psap_core.groups import find_groups
from psap_core.supervision import pulse
from psap_core.suspension import Snapshot, filter_tensors, restore_, suspend_

RESNET20 = ResNetConfig("resnet20", 1.0, None, Fan("in"), Shortcut.option_a)
VGG16 = ModelConfig("vgg16_bn", 1.0, None, Fan("in"))
IMAGE = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize(
    ("name", "million_macs", "parameters"),
    [("resnet20", 40.55, 269722), ("resnet32", 68.86, 464154), ("resnet56", 125.49, 853018)],
)
def test_sizes_are_the_published_ones(name, million_macs, parameters):
    model = models.build(replace(RESNET20, name=name), 3, 10)
    assert macs(model, IMAGE) / 1e6 == pytest.approx(million_macs, abs=0.01)
    assert params(model) == parameters


@pytest.mark.parametrize("shortcut", list(Shortcut))
@pytest.mark.parametrize("width", [0.2, 0.3, 1.0])
@pytest.mark.parametrize("size", [8, 32])
def test_every_width_runs_and_can_be_analysed(shortcut, width, size):
    model = models.build(replace(RESNET20, width=width, shortcut=shortcut), 3, 10)
    image = torch.zeros(2, 3, size, size)
    assert model(image).shape == (2, 10)
    assert len(find_groups(model, image, scope="all")) == 19


def test_vgg_runs_at_both_sizes():
    model = models.build(replace(VGG16, width=0.125), 1, 10)
    for size in (8, 32):
        assert model(torch.zeros(2, 1, size, size)).shape == (2, 10)
    assert len(find_groups(model, torch.zeros(2, 1, 8, 8))) == 13


def test_option_a_is_a_strided_slice_with_zero_channels_on_both_sides():
    x = torch.randn(2, 3, 4, 4)
    out = cifar.OptionA(3, 6, 2)(x)
    assert out.shape == (2, 6, 2, 2)
    assert torch.equal(out[:, 1:4], x[:, :, ::2, ::2])
    assert out[:, [0, 4, 5]].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_option_a_computes_bit_for_bit_what_padding_does(dtype, layout):
    x = torch.randn(8, 5, 9, 9).to(dtype).relu().to(memory_format=layout)
    gradient = torch.randn(8, 11, 5, 5).to(dtype).to(memory_format=layout)
    found = []
    for shortcut in (
        cifar.OptionA(5, 11, 2).to(dtype),
        lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3)),
    ):
        images = x.clone().requires_grad_()
        out = shortcut(images)
        out.backward(gradient)
        found.append((out.detach(), images.grad))
    for ours, padded in zip(*found, strict=True):
        assert torch.equal(ours, padded)


def test_option_a_is_no_part_of_the_state():
    assert not any("shortcut" in name for name in models.build(RESNET20, 3, 10).state_dict())


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 3), ("resnet56", 9)])
def test_in_scope_coupled_every_stage_has_a_stream_of_its_own(name, blocks):
    model = models.build(replace(RESNET20, name=name), 3, 10)
    groups = find_groups(model, IMAGE, scope="coupled")
    streams = {group.name: group for group in groups if len(group.writers) > 1}
    assert {name: group.filters for name, group in streams.items()} == {
        "conv1": 16,
        "layer2.0.conv2": 32,
        "layer3.0.conv2": 64,
    }
    assert [len(group.writers) for group in streams.values()] == [blocks + 1, blocks, blocks]
    inner = [group.name for group in groups if len(group.writers) == 1]
    assert inner == [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in range(blocks)]
    for number, stream in enumerate(streams.values(), 1):
        rows, columns = f"layer{number}.0.shortcut.weight", f"layer{number + 1}.0.shortcut.weight"
        silencers = [entries.tensor for entries in stream.silencers]
        assert (rows in silencers) == (number > 1)
        assert (columns in [entries.tensor for entries in stream.readers]) == (number < 3)
        assert rows not in [entries.tensor for entries in stream.writers]


class Coupled:
    """A small network under PSAP in scope coupled."""

    def __init__(self, model, target=0.6):
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
        self.images, self.labels = torch.randn(4, 16, 3, 8, 8), torch.randint(10, (4, 16))
        self.pruner = PSAP(
            model,
            self.optimizer,
            torch.zeros(1, 3, 8, 8),
            scope="coupled",
            target_macs_cut=target,
            total_epochs=6,
            start=1,
            ramp_end=3,
            freeze=4,
            pulse_batches=3,
        )

    def loss(self, number):
        return F.cross_entropy(self.model(self.images[number]), self.labels[number])

    def epochs(self, count):
        for _ in range(count):
            for number in (0, 1):
                self.optimizer.zero_grad()
                self.loss(number).backward()
                self.optimizer.step()
            self.pruner.end_epoch((1, 2, 3), self.loss)

    def shortcut(self, stage):
        return self.model.get_submodule(f"layer{stage}.0.shortcut").weight


@pytest.fixture(params=["resnet20", pytest.param("resnet56", marks=pytest.mark.long)])
def coupled(request):
    torch.manual_seed(0)
    return Coupled(models.build(replace(RESNET20, name=request.param, width=0.5), 3, 10))


def test_streams_get_thinner_exactly_and_again_in_a_second_round(coupled):
    dense = macs(coupled.model, coupled.images[0, :1])
    coupled.epochs(6)
    plan = coupled.pruner.plan
    pruned = plan.pruned["layer2.0.conv2"]
    assert pruned
    assert not coupled.shortcut(2)[[*pruned]].any()
    small = export(coupled.model, plan)
    assert export_error(coupled.model, small, plan) < 1e-12
    assert macs(small, coupled.images[0, :1]) == plan.macs <= 0.4 * dense
    assert {type(module) for module in small.modules()} == {
        type(module) for module in coupled.model.modules()
    }
    kept = plan.layers[0].kept
    assert small.conv1.out_channels == small.layer1[1].bn2.num_features == kept
    assert small.layer2[0].shortcut.weight.shape[1] == kept < 8
    once_more = Coupled(small, target=0.4)
    once_more.epochs(6)
    smaller = export(small, once_more.pruner.plan)
    assert export_error(small, smaller, once_more.pruner.plan) < 1e-12
    assert macs(smaller, coupled.images[0, :1]) <= 0.6 * plan.macs


def test_a_suspended_channel_of_a_stream_is_silent_through_the_shortcut_and_comes_back(coupled):
    before = coupled.shortcut(2).clone()
    coupled.epochs(2)
    suspended = [*coupled.pruner.plan.pruned["layer2.0.conv2"]]
    live = sorted({*range(16)}.difference(suspended))
    assert before[suspended].any()
    assert not coupled.shortcut(2)[suspended].any()
    assert torch.equal(coupled.shortcut(2)[live], before[live])
    assert not coupled.shortcut(2).requires_grad
    assert coupled.shortcut(2).grad is None
    snapshot = coupled.pruner._snapshots["layer2.0.conv2"]
    (group,) = (group for group in coupled.pruner.groups if group.name == "layer2.0.conv2")
    restore_(filter_tensors(coupled.model, group, [coupled.optimizer]), snapshot)
    assert torch.equal(coupled.shortcut(2), before)


def test_the_utility_of_a_streams_filter_counts_what_the_shortcut_gives_back():
    """u_f = (L(0) - L(t * saved)) / t for a small t, the shortcut's row included."""
    torch.manual_seed(0)
    model = models.build(replace(RESNET20, width=0.5), 3, 10).double()
    images, labels = torch.randn(16, 3, 8, 8).double(), torch.randint(10, (16,))
    groups = find_groups(model, images[:1], scope="coupled")
    tensors = {group.name: filter_tensors(model, group) for group in groups}
    stream = tensors["layer2.0.conv2"]
    filters = [0, 5, 8]  # the first has nothing in the shortcut
    for name in stream.silencers:
        if name.endswith("bias"):
            torch.nn.init.uniform_(stream.parameters[name].tensor)
    snapshots = {name: Snapshot() for name in tensors}
    snapshots["layer2.0.conv2"] = saved = suspend_(stream, filters, Snapshot())

    def loss_of_batch(batch):
        return F.cross_entropy(model(images), labels)

    seen = pulse(model, tensors, snapshots, range(2), loss_of_batch, 2)
    with torch.no_grad():
        without = loss_of_batch(0).item()
        for f in filters:
            rows = saved.select([f]).rows
            for name in stream.silencers:
                stream.parameters[name].put_(torch.tensor([f]), rows[name] * 1e-4)
            fall = (without - loss_of_batch(0).item()) / 1e-4
            for name in stream.silencers:
                stream.parameters[name].zero_(torch.tensor([f]))
            assert seen.utility["layer2.0.conv2"][f][0] == pytest.approx(fall, rel=0.01)
            assert fall != 0


def test_a_state_of_an_earlier_epoch_brings_its_shortcuts_back():
    """Forward into a fresh process, and back in the same one."""
    torch.manual_seed(0)
    first = Coupled(models.build(replace(RESNET20, width=0.5), 3, 10))
    states, shortcuts = [], []
    for _ in range(5):
        first.epochs(1)
        parts = (first.model, first.optimizer, first.pruner)
        states.append([copy.deepcopy(part.state_dict()) for part in parts])
        shortcuts.append([first.shortcut(stage).clone() for stage in (2, 3)])
    assert not torch.equal(shortcuts[0][1], shortcuts[3][1])
    other = Coupled(models.build(replace(RESNET20, width=0.5), 3, 10))
    for training in (first, other):
        for state, expected in zip(reversed(states), reversed(shortcuts), strict=True):
            for part, saved in zip(
                (training.model, training.optimizer, training.pruner), state, strict=True
            ):
                part.load_state_dict(copy.deepcopy(saved))
            for stage, shortcut in zip((2, 3), expected, strict=True):
                assert torch.equal(training.shortcut(stage), shortcut)


@pytest.mark.parametrize("cfg", [RESNET20, pytest.param(VGG16, marks=pytest.mark.long)])
@pytest.mark.parametrize("target", [0.0, 0.6])
def test_thin_takes_the_largest_width_that_reaches_the_target(cfg, target):
    thin = thin_model(cfg, target, 3, 10, 32)
    cost = network_macs(3, 10, 32)
    assert cost(thin) <= (1 - target) * cost(cfg)
    wider = replace(thin, width=thin.width + 0.5 / models.widest(cfg.name))
    assert target == 0 or cost(wider) > (1 - target) * cost(cfg)


@pytest.mark.long
def test_widths_are_rounded_so_that_a_little_more_factor_is_a_little_more_network():
    """Rounded down, all three stages would grow at once wherever the first one does."""
    cost = network_macs(3, 10, 32)
    factors = [step / 128 for step in range(64, 129)]
    whole = cost(RESNET20)
    shares = [cost(replace(RESNET20, width=factor)) / whole for factor in factors]
    assert shares == sorted(shares)
    assert max(b - a for a, b in itertools.pairwise(shares)) < 0.045
    assert [
        models.build(replace(RESNET20, width=41.5 / 64), 3, 10).get_submodule(name).out_channels
        for name in ("conv1", "layer2.0.conv1", "layer3.0.conv1")
    ] == [10, 21, 42]


@pytest.mark.parametrize("name", ["resnet20", "vgg16_bn", "resnet18"])
def test_the_fan_is_that_of_the_initialisation(name):
    kind, more = (ResNetConfig, [Shortcut.option_a]) if name == "resnet20" else (ModelConfig, [])
    for fan in Fan:
        torch.manual_seed(0)
        network = models.build(kind(name, 1.0, None, fan, *more), 3, 10)
        own = models.build(kind(name, 1.0, None, fan, *more), 3, 10)
        models.initialise_(own, fan, name)
        for (path, weight), other in zip(network.named_parameters(), own.parameters(), strict=True):
            if weight.numel() > 10_000:
                assert weight.std().item() == pytest.approx(other.std().item(), rel=0.1), (
                    fan,
                    path,
                )


@pytest.mark.parametrize("target", [0.0, 0.42, 0.6, 0.9])
def test_peers_prune_one_share_of_every_layer_under_the_budget_that_psap_has(target):
    model = models.build(RESNET20, 3, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = SFP(model, optimizer, IMAGE, target, "all", 4, 1, lambda *_: None)
    pruned, filters = method.counts(target), method.cost.filters
    kept = [o - n for o, n in zip(filters, pruned, strict=True)]
    left = method.cost.budget(target) - method.cost.cost(kept)
    assert left >= 0
    assert all(method.cost.marginal(kept, l) > left for l, o in enumerate(filters) if kept[l] < o)
    shares = [(n / o, 1 / o) for n, o in zip(pruned, filters, strict=True)]
    assert max(share - step for share, step in shares) <= min(
        share + step for share, step in shares
    )


def nan_in_it(state):
    state["conv1.weight"][0] = float("nan")


def bytes_of_integers(state):
    state["conv1.weight"] = state["conv1.weight"].view(torch.int32)


def complex_numbers(state):
    state["conv1.weight"] = state["conv1.weight"].to(torch.complex64)


@pytest.mark.parametrize("change", [nan_in_it, bytes_of_integers, complex_numbers])
def test_weights_that_are_no_numbers_of_the_network_are_refused(change, tmp_path):
    cfg = compose("train", ["experiment=digits_resnet20", "model.width=0.25"]).model
    state = models.build(cfg, 1, 10).state_dict()
    change(state)
    path = tmp_path / "weights.pt"
    torch.save(state, path)
    with pytest.raises(InputError, match=r"weights\.pt is damaged: conv1\.weight holds"):
        models.start(replace(cfg, weights=str(path)), 1, 10)


def test_weights_that_would_fill_the_memory_or_never_end_are_refused(tmp_path):
    cfg = compose("train", ["experiment=digits_resnet20", "model.width=0.25"]).model
    bomb = tmp_path / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    for name in ("pipe.pt", "pipe.safetensors"):
        os.mkfifo(tmp_path / name)
    for name, reason in (
        ("bomb.pt", "it holds 10,000,000 bytes in"),
        ("pipe.pt", "no plain file"),
        ("pipe.safetensors", "no plain file"),
    ):
        with pytest.raises(InputError, match=f"{name} is no readable weights file: .*{reason}"):
            models.start(replace(cfg, weights=str(tmp_path / name)), 1, 10)


def test_weights_of_another_architecture_and_no_weights_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(models.build(replace(RESNET20, name="resnet32"), 3, 10).state_dict(), path)
    with pytest.raises(InputError, match="is of another network than resnet20"):
        models.start(replace(RESNET20, weights=str(path)), 3, 10)
    for content in (b"", b"no weights at all", path.read_bytes()[:5000]):
        for name in ("bad.safetensors", "bad.pth"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(InputError, match="is no readable weights file"):
                models.start(replace(RESNET20, weights=str(tmp_path / name)), 3, 10)


@pytest.mark.parametrize(
    "text", ["hello", "(", ".", "cos\nsystem\n", "h", "\x80", "{}", "weights: 3\n" * 50]
)
def test_pth_of_text_is_refused(text, tmp_path):
    (tmp_path / "w.pth").write_text(text, "latin-1")
    with pytest.raises(
        InputError, match=r"is no readable weights file|is not a dictionary of named tensors"
    ):
        models.start(replace(RESNET20, weights=str(tmp_path / "w.pth")), 3, 10)


@pytest.mark.parametrize(
    "content", [3, [torch.zeros(1)], {1: torch.zeros(1)}, {"state_dict": {0: torch.zeros(1)}}]
)
def test_pth_of_something_else_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputError, match="is not a dictionary of named tensors"):
        models.start(replace(RESNET20, weights=str(tmp_path / "w.pth")), 3, 10)


def test_pth_of_a_wrapped_network_loads(tmp_path):
    model = models.build(RESNET20, 3, 10)
    wrapped = {f"module.{k}": v for k, v in model.state_dict().items() if "num_batches" not in k}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "w.pth")
    loaded, normalisation = models.start(replace(RESNET20, weights=str(tmp_path / "w.pth")), 3, 10)
    assert normalisation is None
    assert torch.equal(loaded(IMAGE + 1), model(IMAGE + 1))


@pytest.mark.parametrize(
    ("name", "top1"),
    [
        ("resnet20", 91.73),
        pytest.param("resnet32", 92.63, marks=pytest.mark.long),
        pytest.param("resnet56", 93.39, marks=pytest.mark.long),
    ],
)
def test_pretrained_networks_reach_their_published_accuracy(name, top1):
    root = Path(os.environ.get("PSAP_DATA", "data"))
    weights = root / "weights" / f"cifar10_{name}.safetensors"
    if not (weights.exists() and (root / "cifar10.safetensors").exists()):
        pytest.skip("needs cifar10.safetensors and weights/ in the folder that PSAP_DATA names")
    result = evaluate(
        [f"experiment=cifar10_{name}", f"model.weights={weights}", f"data.root={root}"]
    )
    assert (round(result.top1, 2), result.images) == (top1, 10000)


TORCHVISION = ModelConfig("resnet18", 1.0, None, Fan("out"))


@pytest.mark.parametrize(
    ("name", "giga_macs", "parameters"),
    [
        ("resnet18", 1.814, 11689512),
        ("resnet34", 3.664, 21797672),
        ("resnet50", 4.089, 25557032),
        ("mobilenet_v2", 0.301, 3504872),
    ],
)
def test_torchvisions_networks_have_their_published_sizes(name, giga_macs, parameters):
    with torch.device("meta"):
        model = models.build(replace(TORCHVISION, name=name), 3, 1000)
        assert macs(model, torch.zeros(1, 3, 224, 224)) / 1e9 == pytest.approx(giga_macs, abs=0.001)
    assert params(model) == parameters


@pytest.mark.long
@pytest.mark.parametrize("name", ["resnet18", pytest.param("mobilenet_v2", marks=pytest.mark.long)])
def test_a_thinner_torchvision_network_has_every_width_scaled_and_its_initialisation(name):
    torch.manual_seed(0)
    cfg = replace(TORCHVISION, name=name)
    dense, thin = (models.build(replace(cfg, width=width), 3, 10) for width in (1.0, 0.5))
    assert thin(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    images = torch.zeros(2, 3, 32, 32)
    assert len(find_groups(thin, images)) == len(find_groups(dense, images))
    for (path, wide), (_, narrow) in zip(dense.named_modules(), thin.named_modules(), strict=True):
        if isinstance(wide, torch.nn.Conv2d):
            assert narrow.out_channels == wide.out_channels // 2, path
            fan_out = narrow.weight[:, 0].numel()  # as torch counts it, depthwise or not
            assert narrow.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.15), path
        elif isinstance(wide, torch.nn.Linear):
            shrunk = (
                1 if name == "mobilenet_v2" else (narrow.in_features / wide.in_features) ** 0.5
            )  # torch's own
            assert narrow.weight.std().item() * shrunk == pytest.approx(
                wide.weight.std().item(), rel=0.1
            )
            assert bool(narrow.bias.any()) == bool(wide.bias.any())
    assert cost_share(cfg, thin_model(cfg, 0.5, 3, 10, 32)) <= 0.5


def cost_share(cfg: ModelConfig, thin: ModelConfig) -> float:
    cost = network_macs(3, 10, 32)
    return cost(thin) / cost(cfg)


def test_published_weights_start_a_network_and_a_new_classifier_where_the_classes_differ(
    monkeypatch, capsys
):
    cfg = replace(TORCHVISION, weights="IMAGENET1K_V1")
    theirs = models.build(TORCHVISION, 3, 1000).state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.WeightsEnum.get_state_dict", lambda self, **options: dict(theirs)
    )
    whole, _ = models.start(cfg, 3, 1000)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in whole.state_dict().items())
    part, _ = models.start(cfg, 3, 2, new_classifier=True)
    assert part.fc.weight.shape == (2, 512)
    assert torch.equal(part.layer4[1].conv2.weight, theirs["layer4.1.conv2.weight"])
    assert "fc starts anew" in capsys.readouterr().err
    with pytest.raises(InputError, match="of another network"):
        models.start(cfg, 3, 2)
    assert weights_digest("IMAGENET1K_V1") == "IMAGENET1K_V1"


@pytest.mark.parametrize(
    ("cfg", "channels", "sentence"),
    [
        (
            replace(TORCHVISION, weights="IMAGENET1K_V9"),
            3,
            "not one of torchvision's for resnet18: IMAGENET1K_V1",
        ),
        (
            replace(RESNET20, weights="IMAGENET1K_V1"),
            3,
            "not one of torchvision's for resnet20: none",
        ),
        (TORCHVISION, 1, "takes colour images, these have 1 channel"),
    ],
)
def test_torchvision_choices_that_do_not_exist(cfg, channels, sentence):
    with pytest.raises(InputError, match=sentence):
        models.start(cfg, channels, 10)


def test_a_download_that_fails_is_one_sentence(monkeypatch):
    def offline(self, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", offline)
    with pytest.raises(
        InputError, match=r"IMAGENET1K_V1 of resnet18 could not be had from .*: no route"
    ):
        models.start(replace(TORCHVISION, weights="IMAGENET1K_V1"), 3, 1000)
