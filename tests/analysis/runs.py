"""Run folders with made-up but plausible content, for the tests of what reads them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.configuration import CONF, compose
from experiments.runs.done import write_done
from experiments.runs.identity import digest, settings
from psap_core.files import sha256

LAYERS = {"conv1": 16, "layer1.0.conv1": 16, "layer1.0.conv2": 16, "layer2.0.conv1": 32}
DENSE_MACS, DENSE_PARAMS = 40_000_000, 270_000
PRUNING = ("sfp", "fpgm", "l1", "l2", "random", "psap")
METHOD_RUN = "/data/somebody/runs/cifar10_resnet20/0123abcd/seed0"
PULSE_SUSPENDED = {
    "filters": [0, 3, 5],
    "utility": [0.2, -0.1, 0.01],
    "standard_error": [0.05, 0.05, 0.02],
}


def write_run(
    folder: Path,
    method: str,
    epochs: int = 8,
    top1: float = 90.0,
    seed: int = 0,
    dataset: str = "digits",
    image_size: int = 8,
    model: str = "resnet20",
    macs_cut: float = 0.6,
    suite: str | None = None,
    cell: str | None = None,
    recipe: str | None = None,
    weights: str | None = None,
    protection: bool = True,
    scope: str | None = None,
    train_images: int | None = None,
    target: float | None = None,
    lr: float | None = None,
    width: float = 1.0,
    validation_images: int | None = None,
    time_share: float | None = None,
    method_changes: Mapping[str, Any] | None = None,
) -> Path:
    """A finished run; all paths in it are below /data/somebody.

    A pruning method's steps are at epochs 1 to 4. psap's prune (epoch + l) / 10 of layer number l, measure the
    utilities PULSE_SUSPENDED in every layer (utility growing with the epoch), and restore filter 0. The target is
    the cut, where no other is given. `method_changes` are settings of the method that its configuration has not.
    """
    (folder / "plans").mkdir(parents=True)
    cut = 0.0 if method == "dense" else macs_cut
    rows = [_row(method, epoch, top1, cut) for epoch in range(1, epochs + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if method in PRUNING:
        for epoch in range(1, 5):
            _write_json(folder / "plans" / f"epoch_{epoch:04d}.json", _plan(epoch, cut))
    if method == "psap" and protection:
        (folder / "pulses").mkdir()
        for epoch in range(1, 5):
            pulse = PULSE_SUSPENDED | {
                "utility": [u * epoch for u in PULSE_SUSPENDED["utility"]],
                "restored": [0],
            }
            _write_json(folder / "pulses" / f"epoch_{epoch:04d}.json", dict.fromkeys(LAYERS, pulse))
    if validation_images is None:
        validation_images = 180 if dataset == "digits" else 0
    overrides = [
        *_recipe(recipe, dataset, model, pretrained=weights is not None),
        f"method={method}",
        f"epochs={epochs}",
        f"seed={seed}",
        f"target_macs_cut={macs_cut if target is None else target}",
        f"data.image_size={image_size}",
        f"data.train_images={'null' if train_images is None else train_images}",
        f"data.validation_images={validation_images}",
        f"model.width={width}",
        f"suite={suite or 'null'}",
        f"cell='{cell}'" if cell else "cell=null",
        "runs_dir=/data/somebody/runs",
        "data.root=/data/somebody/data",
    ]
    optional = {
        "optim.lr": lr,
        "model.weights": weights and f"/data/somebody/weights/{weights}",
        "method.scope": scope,
        "method.run": METHOD_RUN if method == "thin_plan" else None,
        "method.protection": False if method == "psap" and not protection else None,
    }
    overrides += [f"{key}={value}" for key, value in optional.items() if value is not None]
    cfg = compose("train", overrides)
    config = OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)
    config["method"] |= method_changes or {}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    identity = json.loads(json.dumps(settings(cfg)))
    identity["model"]["weights"] = weights and "sha256 of the weights"
    if method == "thin_plan":
        identity["method"]["run"] = "0123abcd"
    identity["method"] |= method_changes or {}
    config_hash = digest(identity)
    session = {
        "started": "2025-01-01T00:00:00Z",
        "command": ["python", "/data/somebody/train.py"],
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty_diff_sha256": None,
    }
    manifest = {
        "config_hash": config_hash,
        "seed": seed,
        "identity": identity,
        "data_sha256": "f" * 64,
        "device": "x86_64 CPU, 2 cores",
        "world_size": 1,
        "autocast": "None",
        "compile": False,
        "fast": "eager",
        "versions": {"python": "3.11.0", "torch": "2.15.0"},
        "sessions": [session],
        "finished": "2025-01-01T01:00:00Z",
    }
    _write_json(folder / "manifest.json", manifest)
    summary = {
        "dataset": dataset,
        "image_size": image_size,
        "train_images": train_images or 1000,
        "model": model,
        "method": method,
        "epochs": epochs,
        "seed": seed,
        "suite": suite,
        "cell": cell,
        "top1": top1,
        "top5": 99.0,
        "masked_top1": top1,
        "start_top1": 92.0 if weights else None,
        "test_images": 360,
        "macs": round(DENSE_MACS * (1 - cut)),
        "macs_cut": cut,
        "params": round(DENSE_PARAMS * (1 - cut)),
        "export_max_relative_error": 1e-15,
        "train_macs": round(DENSE_MACS * (1 - cut / 2)) * 1000 * epochs,
        "train_seconds": 60.0,
        "train_seconds_dense_ratio": time_share,
        "prune_seconds": 1.0 if method == "psap" else 0.0,
        "config_hash": config_hash,
    }
    _write_json(folder / "summary.json", summary)
    seal(folder)
    return folder


def seal(folder: Path) -> None:
    """Let the files of a run, as they are now, be those that it wrote."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "done"]
    write_done(
        folder, {path.relative_to(folder).as_posix(): sha256(path.read_bytes()) for path in paths}
    )


def _recipe(recipe: str | None, dataset: str, model: str, *, pretrained: bool) -> list[str]:
    """Of a recipe that there is, or of a made-up name with its data and network."""
    name = recipe or f"{dataset}_{model}{'_pretrained' if pretrained else ''}"
    if (Path(CONF) / "experiment" / f"{name}.yaml").is_file():
        return [f"experiment={name}"]
    return [f"name={name}", f"data={dataset}", f"model={model}"]


def _row(method: str, epoch: int, top1: float, cut: float) -> dict[str, float]:
    row = {
        "epoch": epoch,
        "train/loss": 1 / epoch,
        "train/lr": 0.1,
        "train/images_per_second": 500.0,
    }
    row["eval/top1"] = top1 - 10 / epoch
    if method not in PRUNING or epoch > 4:
        return row
    row |= {
        "psap/macs_cut": epoch / 8 + 0.01,
        "psap/macs_cut_target": epoch / 8,
        "psap/mask_churn": 0.1 / epoch,
    }
    row["psap/step_seconds"] = 0.25
    if method == "psap":
        row |= {
            "psap/proposed": 12 * epoch,
            "psap/suspended": 10 * epoch,
            "psap/restored": 2 * epoch,
        }
    for l, (name, filters) in enumerate(LAYERS.items()):
        row[f"layer/prune_ratio/{name}"] = (epoch + l) / 10
        row[f"layer/kept/{name}"] = filters - len(_pruned(epoch, l, filters))
        if method == "psap":
            row[f"layer/weight_sparsity_ratio/{name}"] = 0.3 + l / 20
            row[f"layer/grad_norm_live/{name}"] = 1 / epoch
            row[f"layer/grad_norm_suspended/{name}"] = 0.5 / epoch
            row[f"layer/utility/{name}"] = 0.01 * epoch
    return row


def _pruned(epoch: int, l: int, filters: int) -> list[int]:
    return list(range(round(filters * (epoch + l) / 10)))


def _plan(epoch: int, cut: float) -> dict[str, Any]:
    layers = [
        {"name": name, "filters": filters, "pruned": _pruned(epoch, l, filters)}
        for l, (name, filters) in enumerate(LAYERS.items())
    ]
    return {
        "layers": layers,
        "input_shape": [1, 1, 8, 8],
        "macs": round(DENSE_MACS * (1 - cut)),
        "dense_macs": DENSE_MACS,
        "target_cut": cut,
        "unit": "macs",
        "digest": f"{epoch:08x}",
    }


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
