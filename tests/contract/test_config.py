"""Configuration: every recipe runs, no key is dead, identities are frozen, bad input is one sentence."""

import copy
import json
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from analysis.recorded import read_results
from analysis.results import RESULTS
from experiments import data, evaluate, export, models, schema, train
from experiments.configuration import compose
from experiments.methods.base import Callback
from experiments.runs import identity
from experiments.runs.folder import Record
from experiments.runs.identity import config_hash
from experiments.schema import Scope, Shortcut
from experiments.training import checkpoint, run
from experiments.training.optim import learning_rate, make_optimizer
from psap_core import InputError
from psap_core.files import sealed, unsealed
from tests.helpers import METHODS, SMALL, refusal, small

PACKAGE = Path(train.__file__).parent
RECIPES = sorted(path.stem for path in (PACKAGE / "conf" / "experiment").glob("*.yaml"))
FROZEN_HASHES = {
    ("experiment=digits_resnet20", "method=dense"): "887bbc20",
    ("experiment=demo_digits", "method=psap", "method.scope=all"): "e558e595",
    (
        "experiment=cifar10_resnet20",
        "method=psap",
        "method.scope=all",
        "target_macs_cut=0.54",
    ): "a640f9b6",
    ("experiment=cifar10_resnet20", "method=psap", "target_macs_cut=0.54"): "fa0e232c",
    ("experiment=cifar10_resnet20", "method=l1", "target_macs_cut=0.54"): "c2f92416",
    ("experiment=cifar10_resnet20", "method=taylor", "target_macs_cut=0.54"): "35676207",
    ("experiment=cifar10_resnet20", "method=fpgm", "target_macs_cut=0.54"): "79911c1d",
    ("experiment=cifar10_resnet56", "method=sfp"): "0f33fb3e",
    ("experiment=cifar10_resnet110", "method=dense", "seed=3"): "5f71a91e",
    ("experiment=cifar10_small", "method=thin", "target_macs_cut=0.85"): "c0a8ce99",
    (
        "experiment=cifar10_resnet20",
        "model=vgg16_bn",
        "method=psap",
        "method.scope=all",
        "method.start=10",
    ): "77b4c15e",
}


QUICK_RECIPES = (
    "cifar10_small",
    "image_folder",
)


@pytest.mark.parametrize(
    "recipe",
    [
        recipe if recipe in QUICK_RECIPES else pytest.param(recipe, marks=pytest.mark.long)
        for recipe in RECIPES
    ],
)
def test_every_recipe_does_one_step(recipe, tiny):
    folder = train.run(
        [f"experiment={recipe}", *tiny(recipe, epochs=1, train_images=16, batch_size=4)]
    )
    assert folder.parts[-3] == recipe  # the file's name is the recipe's
    assert json.loads((folder / "summary.json").read_text())["epochs"] == 1


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=pytest.mark.long) if method != "psap" else method
        for method in METHODS
    ],
)
def test_the_run_folder_is_complete(method, tmp_path):
    folder = train.run(small(tmp_path, method))
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    always = [
        "config.yaml",
        "manifest.json",
        "metrics.jsonl",
        "summary.json",
        "done",
        "checkpoint/last.pt",
    ]
    assert present >= {*always, "export/spec.json", "export/weights.safetensors"}
    epochs = {
        "psap": {1, 2, 3},
        "taylor": {1, 2},
        "sfp": {1, 2, 3, 4},
        "fpgm": {1, 2, 3, 4},
        "dense": set(),
        "thin": set(),
    }
    plans = epochs.get(method, {2})  # one shot: when half of the epochs are done
    assert {path for path in present if path.startswith("plans/")} == {
        f"plans/epoch_{e:04d}.json" for e in plans
    }
    summary = json.loads((folder / "summary.json").read_text())
    assert list(summary) == [
        "dataset",
        "image_size",
        "train_images",
        "model",
        "method",
        "epochs",
        "seed",
        "suite",
        "cell",
        "start_top1",
        "top1",
        "top5",
        "masked_top1",
        "test_images",
        "macs",
        "macs_cut",
        "params",
        "export_max_relative_error",
        "train_macs",
        "train_seconds",
        "train_seconds_dense_ratio",
        "prune_seconds",
        "config_hash",
    ]
    assert summary["macs_cut"] >= (0 if method == "dense" else 0.5)
    assert summary["export_max_relative_error"] <= 1e-9
    assert method in ("sfp", "fpgm", "psap") or summary["masked_top1"] == summary["top1"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert {epoch for epoch, row in enumerate(rows, 1) if "psap/macs_cut" in row} == plans

    accuracy = evaluate.evaluate_run([f"run={folder}"])  # a network rebuilt from the folder alone
    assert (accuracy.top1, accuracy.top5) == (summary["top1"], summary["top5"])
    assert accuracy.images == 360
    for override in (
        "data=digits",
        "data.validation_images=20",
        "model.width=0.5",
        "experiment=cifar10_resnet20",
    ):
        with pytest.raises(InputError, match=f"leave out {override}, or leave out run"):
            evaluate.evaluate_run([f"run={folder}", override])


@pytest.mark.long
def test_an_exported_network_can_be_trained_on_and_exported_again(tmp_path):
    first = train.run(small(tmp_path, "psap"))
    weights = shutil.copytree(first / "export", tmp_path / "kept")
    second = train.run(
        small(tmp_path, "psap", f"model.weights={weights}", "target_macs_cut=0.3", "epochs=3")
    )
    shutil.rmtree(weights)  # the second run's folder is whole without it
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (first, second)]
    assert summaries[1]["macs"] <= 0.7 * summaries[0]["macs"]
    assert evaluate.evaluate_run([f"run={second}"]).top1 == summaries[1]["top1"]


def test_an_exported_network_of_another_kind_is_refused(tmp_path):
    weights = train.run(small(tmp_path, "psap")) / "export"
    cfg = replace(compose("train", SMALL).model, weights=str(weights))
    for other, channels, classes, sentence in (
        (replace(cfg, name="resnet32"), 1, 10, "with name=resnet20, this run's has name=resnet32"),
        (
            replace(cfg, shortcut=Shortcut.projection),
            1,
            10,
            "with shortcut=option_a, this run's has shortcut=proj",
        ),
        (cfg, 3, 10, "with channels=1, this run's has channels=3"),
        (cfg, 1, 3, "with classes=10, this run's has classes=3"),
    ):
        with pytest.raises(InputError, match=f"{weights} holds a network {sentence}"):
            models.start(other, channels, classes)
    assert models.start(replace(cfg, width=1.0), 1, 10)


def test_onnx_needs_its_packages(tmp_path, monkeypatch):
    folder = train.run(small(tmp_path, "dense"))
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)
        said = refusal(export.main, [f"run={folder}", "onnx=true"], patch)
        assert re.search(r"onnx=true needs .*onnxscript: pip install ", said)


@pytest.mark.long
def test_onnx(tmp_path, capsys):
    folder = train.run(small(tmp_path, "psap"))
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    export.check_export(compose("export", [f"run={folder}", "onnx=true"]))
    assert (folder / "export" / "model.onnx").exists()
    assert "in ONNX Runtime" in capsys.readouterr().out


def test_every_key_is_read_somewhere():
    sources = "".join(
        path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "schema.py"
    )
    classes = [c for c in vars(schema).values() if isinstance(c, type) and is_dataclass(c)]
    keys = {field.name for c in classes for field in fields(c)}
    keys.remove("figures")  # which analysis reads, from the file
    keys.remove("compact")  # which schema.compacts reads
    assert len(keys) > 40
    assert {key for key in keys if not re.search(rf"\.{key}\b", sources)} == set()


@pytest.mark.parametrize("overrides", FROZEN_HASHES, ids=" ".join)
def test_known_configurations_keep_their_hash(overrides):
    assert config_hash(compose("train", overrides)) == FROZEN_HASHES[overrides]


def test_every_recorded_run_keeps_its_hash(monkeypatch):
    """Settings that came later have the value that stands for what was before."""
    runs = read_results(RESULTS)
    assert len(runs) > 150
    later = set()
    for recorded_run in {each.summary.config_hash: each for each in runs}.values():
        recorded = copy.deepcopy(dict(recorded_run.identity))
        method = recorded["method"]
        if "run" in method:
            method["run"] = f"runs/{method['run']}/seed0"
        chosen = [f"{group}={recorded[group]['name']}" for group in ("data", "model", "method")]
        open_keys = [f"method.{key}={method[key]}" for key in ("rule", "run") if key in method]
        today = OmegaConf.structured(compose("train", [*chosen, *open_keys, "name=recorded"]))
        later |= {*today.method} - {*method}
        if "scope" in today.method:
            today.method.scope = Scope.all  # of runs whose identity does not tell
        if "compact" in today.method:
            today.method.compact = False  # which no identity tells
        cfg = OmegaConf.to_object(OmegaConf.merge(today, recorded))
        digest = recorded_run.identity["model"]["weights"]
        monkeypatch.setattr(identity, "weights_digest", lambda weights, digest=digest: digest)
        assert identity.identity(cfg) == recorded_run.identity
        assert config_hash(cfg) == recorded_run.summary.config_hash
    assert later == {"scope", "round_to", "compact", "figures"}


@pytest.mark.parametrize(
    ("method", "setting", "changed"),
    [
        ("l1", "scope=coupled", False),
        ("l1", "scope=all", True),
        ("sfp", "scope=all", False),
        ("sfp", "scope=inner", True),
        ("psap", "round_to=1", False),
        ("psap", "round_to=8", True),
        ("psap", "scope=all", True),
        ("psap_variant", "round_to=1", False),
    ],
)
def test_settings_that_came_later_change_the_hash_where_they_change_the_result(
    method, setting, changed
):
    overrides = [*SMALL, f"method={method}"]
    if method == "psap_variant":
        overrides.append("method.rule=permuted")
    before = config_hash(compose("train", overrides))
    assert (config_hash(compose("train", [*overrides, f"method.{setting}"])) != before) == changed


def test_hash_is_of_what_changes_the_result(tmp_path):
    dense = [*SMALL, "method=dense"]
    base = config_hash(compose("train", dense))
    same = [
        "seed=5",
        "runs_dir=elsewhere",
        "data.root=x",
        "runtime.threads=2",
        "tracking.mode=online",
        "name=n",
    ]
    for override in [*same, "target_macs_cut=0.9"]:  # dense has no target
        assert config_hash(compose("train", [*dense, override])) == base
    for override in [
        "epochs=5",
        "optim.lr=0.2",
        "data.train_images=300",
        "model.width=0.5",
        "method=psap",
    ]:
        assert config_hash(compose("train", [*dense, override])) != base
    hashes = []
    for name, content in (("a.pth", b"1"), ("b.pth", b"1"), ("b.pth", b"2")):
        (tmp_path / name).write_bytes(content)
        hashes.append(config_hash(compose("train", [*SMALL, f"model.weights={tmp_path / name}"])))
    assert hashes[0] == hashes[1] != hashes[2]


def test_learning_rate_and_weight_decay_of_the_fields_recipe():
    cfg = compose("train", ["experiment=cifar10_resnet110"]).optim
    rates = [learning_rate(cfg, epoch, 200) for epoch in range(200)]
    steps = {0: 0.01, 1: 0.1, 59: 0.1, 60: 0.02, 119: 0.02, 120: 0.004, 160: 0.0008, 199: 0.0008}
    assert {epoch: rates[epoch] for epoch in steps} == pytest.approx(steps)
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    decays = {
        flag: sorted(
            (p.ndim, group["weight_decay"])
            for group in make_optimizer(model, replace(cfg, decay_all=flag)).param_groups
            for p in group["params"]
        )
        for flag in (True, False)
    }
    assert decays[True] == [(1, 5e-4)] * 3 + [(4, 5e-4)]
    assert decays[False] == [(1, 0.0)] * 3 + [(4, 5e-4)]


def test_the_network_that_is_chosen_is_the_one_that_trains():
    """A recipe that named one itself would overrule `model=`."""
    for recipe in RECIPES:
        content = yaml.safe_load((PACKAGE / "conf" / "experiment" / f"{recipe}.yaml").read_text())
        assert "name" not in content.get("model", {}), recipe
    chosen = ["experiment=image_folder", "model=mobilenet_v2", "data.root=folder"]
    assert compose("train", chosen).model.name == "mobilenet_v2"


# Bad input: one sentence, exit code 2.


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["data.sise=8"], "data.sise: there is no such key; "),
        (["+data.sise=8"], "unknown key data.sise"),
        (["epocs=8"], "epocs: there is no such key; did you mean epochs?"),
        (["method=sfp", "method.kappa=1"], "method.kappa: there is no such key; there are method."),
        (["epochs=many"], "epochs=many: it takes a whole number"),
        (
            ["method=psap", "method.scope=most"],
            "method.scope=most: choose from coupled, all, inner",
        ),
        (["name=???"], "missing mandatory value: name"),
        (
            ["experiment=nothing"],
            "experiment=nothing: there is no such recipe; choose from cifar10",
        ),
        (["method=psap", "target_macs_cut=1.0"], "must be a share in [0, 1)"),
        (["target_macs_cut=54"], "must be a share in [0, 1) (did you mean 0.54?), not 54"),
        (["method=psap", "target_macs_cut=-0.1"], "must be a share in [0, 1)"),
        (["method=psap", "target_macs_cut=0.999"], "unreachable"),
        (["method=psap", "method.start=4", "method.freeze=2"], "start"),
        (["method=psap", "method.interval=0"], "interval"),
        (["method=psap", "method.exclude=[layer9.conv]"], "excluded 'layer9.conv' is no module"),
        (
            ["method=psap", "optim.batch_size=320"],
            "at least 2 training batches per epoch for its pulse, there is 1",
        ),
        (["method=sfp", "target_macs_cut=1.0"], "must be a share in [0, 1)"),
        (["method=sfp", "target_macs_cut=0.9999"], "unreachable"),
        (["method=thin", "target_macs_cut=-1"], "must be a share in [0, 1)"),
        (["method=thin", "target_macs_cut=0.9999"], "unreachable"),
        (["epochs=0"], "epochs=0 must be from 1 to 1,000,000"),
        (["epochs=10000000000000000000000000000"], "must be from 1 to 1,000,000"),
        (["optim.lr=1e308"], "optim.lr=1e+308 must be above 0 and at most 1e+06"),
        (["optim.mixup=1e-320"], "must be 0 or in [0.001, 100]"),
        (["seed=9223372036854775808"], "seed=9223372036854775808 must lie between -2^63 and 2^63"),
        (
            ["seed=-9223372036854775808"],
            "seed=-9223372036854775808 must lie between -2^63 and 2^63",
        ),
        (["optim.batch_size=0"], "optim.batch_size=0"),
        (["optim.momentum=1"], "optim.momentum=1.0"),
        (["runtime.device=tpu"], "must be one of auto, cpu, cuda"),
        (["runtime.threads=0"], "runtime.threads=0"),
        (["model.weights=/no/such/file.pth"], "cannot be read"),
        (["model.width=0"], "model.width=0.0 must be above 0"),
        (["data=cifar10", "data.root=/no/such/folder"], "is no folder"),
        (["optim.lr=1e6"], "in epoch 1"),
        (["method=sfp", "method.name=psap"], "method.name='psap' does not name the chosen method"),
        (["method.name=sfp"], "method.name='sfp' does not"),
        (["method=psap", "method.name=dense"], "method.name='dense' does not"),
        (["method.name=foo"], "choose with method=<dense|fpgm|l1|l2|psap|"),
        (["optim.lr=0"], "optim.lr=0.0 must be above 0 and at most 1e+06"),
        (["optim.lr=nan"], "optim.lr=nan"),
        (["optim.lr=inf"], "optim.lr=inf"),
        (["optim.weight_decay=inf"], "optim.weight_decay=inf"),
        (["optim.weight_decay=-1"], "optim.weight_decay=-1.0"),
        (["optim.milestones=[0.5,1.1]"], "optim.milestones=[0.5, 1.1] must be shares"),
        (["optim.milestones=[-0.1]"], "optim.milestones"),
        (["optim.lr_factor=0"], "optim.lr_factor=0.0 must be in (0, 1]"),
        (["optim.lr_factor=1.5"], "optim.lr_factor=1.5"),
        (["optim.warmup_epochs=-1"], "optim.warmup_epochs=-1 must be at least 0"),
        (
            ["optim.warmup_epochs=1", "optim.warmup_lr=0"],
            "optim.warmup_lr=0.0 must be above 0 and at most 1e+06",
        ),
        (["data.mean=[0.5,0.5]"], "data.mean=[0.5, 0.5] and data.std=[0.376] must have 1 numbers"),
        (["data.std=[]"], "data.std=[] must have 1 numbers"),
        (["data.std=[0]"], "those of data.std above 0"),
        (["data.mean=[nan]"], "must be equally many finite numbers"),
        (["runtime.threads=1000000"], "runtime.threads=1000000 must be at most 1024"),
        (["model.weights=''"], "model.weights='' names no file"),
        (["suite=../../x"], "suite='../../x' must be words of letters"),
        (["cell=a/b"], "cell='a/b' must be words of letters"),
        (["model.width=1e9"], "model.width=1000000000.0 must be above 0 and at most 64"),
        (["model.width=inf"], "model.width=inf must be above 0 and at most 64"),
        (["method=thin", "model.width=inf"], "model.width=inf"),
        (["name=''"], "name='' must be a plain folder name"),
        (["name=.."], "name='..' must be a plain folder name"),
        (["name=../../x"], "must be a plain folder name"),
        (
            ["optim.batch_size=29", "data.train_images=30"],
            "optim.batch_size=29 leaves a part of fewer than two",
        ),
        (["optim.batch_size=1"], "of 320 training images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_configurations(overrides, sentence, tmp_path, monkeypatch):
    said = refusal(train.main, [*SMALL, f"runs_dir={tmp_path}", *overrides], monkeypatch)
    assert sentence in said
    assert (
        list(tmp_path.rglob("manifest.json")) == [] or "the loss" in said
    )  # refused before anything is made


@pytest.mark.parametrize("method", ["dense", "thin", "sfp", "psap"])
def test_a_method_is_its_name(method, tmp_path, monkeypatch):
    for other in {"dense", "thin", "sfp", "psap", "foo"} - {method}:
        overrides = [*small(tmp_path, method), f"method.name={other}"]
        assert f"method.name={other!r} does not name" in refusal(train.main, overrides, monkeypatch)


def test_psap_without_a_pulse_trains_on_one_batch(tmp_path):
    train.run(small(tmp_path, "psap", "optim.batch_size=320", "method.protection=false"))


def test_a_real_process_says_one_sentence_too(tmp_path):
    command = [
        sys.executable,
        "-m",
        "experiments.train",
        *SMALL,
        f"runs_dir={tmp_path}",
        "method.margn=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: method.margn: there is no such key; did you mean method.margin?\n"


@pytest.fixture(scope="module")
def half_way(tmp_path_factory):
    """A run's runs_dir in which two of four epochs are done."""
    runs_dir = tmp_path_factory.mktemp("half_way")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Record, "save_checkpoint", stop_at_call(3, Record.save_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            train.run(small(runs_dir, "dense"))
    return runs_dir


def stop_at_call(number, function):
    calls = 0

    def counted(*arguments):
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return function(*arguments)

    return counted


def change_state(path, **changes):
    write_state(path, {**checkpoint.load_checkpoint(path), **changes})


def remove_from_state(path, key):
    state = checkpoint.load_checkpoint(path)
    del state[key]
    write_state(path, state)


def write_state(path, state):
    """Without the checkpoint before, which would be taken in a damaged one's place."""
    path.write_bytes(checkpoint.checkpoint_bytes(state))
    path.with_name("previous.pt").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (
            lambda path: change_state(path, config_hash="12345678"),
            "is of another configuration (12345678",
        ),
        (lambda path: change_state(path, seed=7), "is of another configuration"),
        (
            lambda path: change_state(path, model={"linear.weight": torch.zeros(1)}),
            "or of another network",
        ),
        (
            lambda path: change_state(
                path, written={"files": {}, "metrics_bytes": 10**6, "metrics_sha256": ""}
            ),
            "is shorter than its checkpoint says",
        ),
        (
            lambda path: change_state(path, position={"epoch": -1}),
            "last.pt is damaged or of another",
        ),
        *(
            pytest.param(
                lambda path, key=key, value=value: change_state(path, **{key: value}),
                "last.pt is damaged or of another",
                marks=pytest.mark.long,
            )
            for key, value in [
                ("model", None),
                ("optimizer", {}),
                ("optimizer", {"state": {}, "param_groups": [3]}),
                ("ranks", [{"generators": {"cpu": "x", "cuda": None}, "loss_sum": 0.0}]),
                ("ranks", [{}]),
                ("ranks", []),
                ("position", {"epoch": "two"}),
                ("position", {"step": 1}),
                ("position", 7),
                ("written", {"files": {}}),
            ]
        ),
        *(
            (lambda path, key=key: remove_from_state(path, key), "last.pt is ")
            for key in ("model",)
        ),
        *(
            pytest.param(
                lambda path, key=key: remove_from_state(path, key),
                "last.pt is ",
                marks=pytest.mark.long,
            )
            for key in ("config_hash", "seed", "optimizer", "position", "method", "ranks")
        ),
    ],
)
def test_bad_checkpoints(damage, sentence, half_way, tmp_path, monkeypatch):
    runs_dir = shutil.copytree(half_way, tmp_path / "runs")
    (path,) = runs_dir.rglob("last.pt")
    damage(path)
    damaged = path.read_bytes()
    assert sentence in refusal(train.main, small(runs_dir, "dense"), monkeypatch)
    assert path.read_bytes() == damaged  # nothing is overwritten


@pytest.mark.long
@pytest.mark.parametrize("method", [pytest.param("sfp", marks=pytest.mark.long), "psap"])
def test_a_checkpoint_without_its_method(method, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Record, "save_checkpoint", stop_at_call(2, Record.save_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            train.run(small(tmp_path, method))
    (path,) = tmp_path.rglob("last.pt")
    for state in (None, {}, {"plan": 3}, {"plan": "{}"}):
        change_state(path, method=state)
        assert refusal(train.main, small(tmp_path, method), monkeypatch).startswith(str(path))


@pytest.mark.parametrize("name", ["manifest.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff\xfe"])
def test_a_damaged_file_of_a_started_run_is_refused(name, content, half_way, tmp_path, monkeypatch):
    runs_dir = shutil.copytree(half_way, tmp_path / "runs")
    (path,) = runs_dir.rglob(name)
    lines = (
        content + b"\n" + b" " * path.stat().st_size
    )  # metrics.jsonl may be longer than the checkpoint says
    path.write_bytes(lines)
    assert f"{path} is damaged" in refusal(train.main, small(runs_dir, "dense"), monkeypatch)


def test_a_run_is_not_continued_on_other_data(half_way, tmp_path, monkeypatch):
    runs_dir = shutil.copytree(half_way, tmp_path / "runs")
    before = {path: path.read_bytes() for path in runs_dir.rglob("*") if path.is_file()}
    monkeypatch.setattr(data.TensorImages, "digest", "another")
    assert "began with the data of SHA-256" in refusal(
        train.main, small(runs_dir, "dense"), monkeypatch
    )
    after = {path: path.read_bytes() for path in runs_dir.rglob("*") if path.is_file()}
    (why,) = after.keys() - before.keys()
    assert why.name == "failed"
    assert b"began with the data of SHA-256" in after.pop(why)
    assert after == before


def test_a_folder_of_another_configuration_is_never_overwritten(half_way, tmp_path, monkeypatch):
    runs_dir = shutil.copytree(half_way, tmp_path / "runs")
    (path,) = runs_dir.rglob("manifest.json")
    manifest = unsealed(json.loads(path.read_text()))
    path.write_text(json.dumps(sealed(manifest | {"seed": 1})))
    assert "holds the run of another configuration" in refusal(
        train.main, small(runs_dir, "dense"), monkeypatch
    )


def test_a_run_folder_that_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "digits_resnet20").write_text("")
    assert "a file stands in its place" in refusal(
        train.main, small(tmp_path, "dense"), monkeypatch
    )


def test_a_nan_loss_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(
        run, "learning_rate", lambda cfg, epoch, epochs: 1e30 if epoch == 2 else 0.1
    )
    assert "in epoch 3" in refusal(train.main, small(tmp_path, "psap"), monkeypatch)
    (path,) = tmp_path.rglob("last.pt")
    state = checkpoint.load_checkpoint(path)
    assert state["position"]["epoch"] == 2
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.parametrize("at_a_signal", [False, True])
def test_weights_that_are_not_finite_keep_the_last_good_checkpoint(
    at_a_signal, tmp_path, monkeypatch
):
    """The epoch's only loss is computed before the step that breaks the network."""
    received = property(lambda self: at_a_signal and broken, lambda self, value: None)
    broken = False

    def rate(cfg, epoch, epochs):
        nonlocal broken
        broken = epoch == 2
        return float("inf") if broken else 0.1

    monkeypatch.setattr(run, "learning_rate", rate)
    monkeypatch.setattr(run.StopSignals, "received", received, raising=False)
    said = refusal(train.main, small(tmp_path, "sfp", "optim.batch_size=320"), monkeypatch)
    assert "weights are not finite in epoch 3" in said
    (path,) = tmp_path.rglob("last.pt")
    state = checkpoint.load_checkpoint(path)
    assert state["position"]["epoch"] == 2
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    assert len(list(tmp_path.rglob("epoch_*.json"))) == 2


def test_a_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(self):
        nonlocal steps
        steps += 1
        if steps == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))

    steps = 0
    with monkeypatch.context() as patch:
        patch.setattr(Callback, "after_step", fill_disk)
        try:
            said = refusal(train.main, small(tmp_path, "dense"), patch)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (path,) = tmp_path.rglob("last.pt")
    assert said == f"{path} cannot be used: File too large"
    assert checkpoint.load_checkpoint(path)["position"]["epoch"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["last.pt"]
    train.run(small(tmp_path, "dense"))


@pytest.mark.long
def test_bad_exports(tmp_path, monkeypatch):
    folder = train.run(small(tmp_path, "psap"))
    assert "has no summary.json" in refusal(
        evaluate.main, [f"run={tmp_path}", "runtime.device=cpu"], monkeypatch
    )
    assert "leave out data=digits" in refusal(
        evaluate.main, [f"run={tmp_path}", "data=digits"], monkeypatch
    )
    assert "no summary.json" in refusal(export.main, [f"run={tmp_path}"], monkeypatch)
    assert "missing mandatory value: run" in refusal(export.main, [], monkeypatch)
    assert "give run=<run folder> or model.weights" in refusal(evaluate.main, [], monkeypatch)
    weights, spec = folder / "export" / "weights.safetensors", folder / "export" / "spec.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    for main in (evaluate.main, export.main):
        assert f"{weights} is damaged" in refusal(main, [f"run={folder}"], monkeypatch)
    weights.write_bytes(whole)
    other = train.run(small(tmp_path, "psap", "target_macs_cut=0.7"))
    spec.write_text((other / "export" / "spec.json").read_text())
    for main in (evaluate.main, export.main):
        assert f"{spec} is damaged" in refusal(main, [f"run={folder}"], monkeypatch)
    with pytest.raises(InputError, match="is not what spec"):
        models.open_exported(folder / "export")


@pytest.mark.parametrize(
    "changes",
    [
        {"network": None},
        {"network": {}},
        {"network": {"model": None, "channels": 1, "classes": 10}},
        {"classes": -3},
        {"classes": 0},
        {"classes": "ten"},
        {"channels": 0},
        {"channels": 5},
        {"shortcut": "bogus"},
        {"width": "inf"},
        {"width": 1e400},
        {"width": -1},
        {"name": "resnet21"},
        {"name": ["resnet20"]},
        {"depth": 3},
        {"normalisation": [["a"], ["b"]]},
        {"normalisation": [[0.5], [0.0]]},
        {"normalisation": [[0.5] * 2, [0.5] * 2]},
        {"normalisation": 3},
        {"plan": {}},
        {"plan": None},
    ],
    ids=str,
)
def test_a_wrong_spec_is_refused(changes, exported, tmp_path):
    """Of another version of the suite, say: it is as it was written."""
    folder = shutil.copytree(exported / "export", tmp_path / "export")
    path = folder / "spec.json"
    spec = unsealed(json.loads(path.read_text()))
    for key, value in changes.items():
        place = (
            spec
            if key in spec
            else spec["network"]
            if key in spec["network"]
            else spec["network"]["model"]
        )
        place[key] = value
    path.write_text(json.dumps(sealed(spec)))
    with pytest.raises(InputError):
        models.open_exported(folder)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"{}", b"\xff\xfe", b"data: 3", b"data: {sise: 8}", b"a: [b"]
)
def test_damaged_files_of_a_finished_run_are_refused(content, exported, tmp_path, monkeypatch):
    folder = shutil.copytree(exported, tmp_path / "run")
    for main, name in ((evaluate.main, "config.yaml"), (export.main, "summary.json")):
        (folder / name).write_bytes(content)
        assert f"{folder / name} is damaged" in refusal(main, [f"run={folder}"], monkeypatch)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder of a finished run."""
    return train.run(small(tmp_path_factory.mktemp("exported"), "sfp", "epochs=1"))


def test_programmatic_use_raises_the_same_sentence(tmp_path):
    with pytest.raises(InputError, match="did you mean epochs"):
        train.run([*SMALL, "epocs=3"])
