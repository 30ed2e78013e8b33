"""Who a run is: the hash over what changes its result."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.runs.files import folder_digest, weights_digest
from experiments.schema import (
    Config,
    HardPruningConfig,
    LRSchedule,
    MethodConfig,
    OptimizerName,
    OwnFolderConfig,
    PSAPConfig,
    Scope,
    ThinPlanConfig,
    UniformConfig,
    compacts,
)

# Settings that came after runs were recorded, with the value that those runs had. An identity leaves out this value, so
# that the hash of a configuration stays what it was.
OPTIM_CAME_LATER: dict[str, Any] = {
    "optimizer": OptimizerName.sgd,
    "schedule": LRSchedule.steps,
    "label_smoothing": 0.0,
    "mixup": 0.0,
}
CAME_LATER: dict[type[MethodConfig], dict[str, Any]] = {
    UniformConfig: {"scope": Scope.all},
    HardPruningConfig: {"compact": False},
    PSAPConfig: {"round_to": 1, "compact": False},
}


def settings(cfg: Config) -> dict[str, Any]:
    """What changes the result; weights and another run by their paths."""
    method = asdict(cfg.method)
    del method["figures"]
    if "compact" in method:
        method["compact"] = compacts(cfg.method)
    for kind, later in CAME_LATER.items():
        if isinstance(cfg.method, kind):
            _leave_out(method, later)
    optim = asdict(cfg.optim)
    _leave_out(optim, OPTIM_CAME_LATER)
    return {
        "epochs": cfg.epochs,
        "data": {key: value for key, value in asdict(cfg.data).items() if key != "root"},
        "model": asdict(cfg.model),
        "method": method,
        "optim": optim,
    }


def _leave_out(settings: dict[str, Any], values: Mapping[str, Any]) -> None:
    """Remove the settings that have these values."""
    for name, value in values.items():
        if settings[name] == value:
            del settings[name]


def identity(cfg: Config) -> dict[str, Any]:
    """What changes the result: weights by content, another run by its own identity, no path, seed or machine."""
    content = settings(cfg)
    content["model"]["weights"] = weights_digest(cfg.model.weights)
    if isinstance(cfg.data, OwnFolderConfig):
        content["data"]["files"] = folder_digest(cfg.data.root)
    if isinstance(cfg.method, ThinPlanConfig):
        content["method"]["run"] = Path(cfg.method.run).parent.name
    return content


def differ_in_images_only(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Are two identities the same but for the images in the data's folder?"""
    if one["data"].get("files") == other["data"].get("files"):
        return False
    return digest(_without_images(one)) == digest(_without_images(other))


def _without_images(identity: Mapping[str, Any]) -> dict[str, Any]:
    data = {key: value for key, value in identity["data"].items() if key != "files"}
    return {**identity, "data": data}


def digest(identity: Mapping[str, Any]) -> str:
    """Eight hex digits over an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def config_hash(cfg: Config) -> str:
    """Eight hex digits over a run's identity."""
    return digest(identity(cfg))
