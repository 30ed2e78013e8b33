"""Who a run is: the hash over what changes its result."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.runs.files import weights_digest
from experiments.schema import (
    Config,
    MethodConfig,
    PSAPConfig,
    Scope,
    ThinPlanConfig,
    UniformConfig,
)

# Settings that came after runs were recorded, with the value that those runs had. An identity leaves out this value, so
# that the hash of a configuration stays what it was; analysis/collect.py knows them, too.
CAME_LATER: dict[type[MethodConfig], dict[str, Any]] = {
    UniformConfig: {"scope": Scope.all},
    PSAPConfig: {"round_to": 1},
}


def identity(cfg: Config) -> dict[str, Any]:
    """What changes the result: weights by content, another run by its own identity, no path, seed or machine."""
    method = asdict(cfg.method)
    if isinstance(cfg.method, ThinPlanConfig):
        method["run"] = Path(cfg.method.run).parent.name
    for kind, settings in CAME_LATER.items():
        if isinstance(cfg.method, kind):
            for name, value in settings.items():
                if method[name] == value:
                    del method[name]
    return {
        "epochs": cfg.epochs,
        "data": {key: value for key, value in asdict(cfg.data).items() if key != "root"},
        "model": asdict(cfg.model) | {"weights": weights_digest(cfg.model.weights)},
        "method": method,
        "optim": asdict(cfg.optim),
    }


def config_hash(cfg: Config) -> str:
    """Eight hex digits over a run's identity."""
    return hashlib.sha256(json.dumps(identity(cfg), sort_keys=True).encode()).hexdigest()[:8]
