"""Reading run folders."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        summary: summary.json.
        config: config.yaml.
        metrics: one row per completed epoch (the index), one column per key of metrics.jsonl, in the order in
            which the keys first appear; NaN where an epoch has no value.
    """

    summary: dict[str, Any]
    config: dict[str, Any]
    metrics: pd.DataFrame

    @property
    def method(self) -> str:
        return str(self.summary["method"])

    def layers(self, quantity: str) -> pd.DataFrame:
        """The columns `layer/<quantity>/<layer>`, named by layer, of the epochs that have a value."""
        prefix = f"layer/{quantity}/"
        columns = [name for name in self.metrics if name.startswith(prefix)]
        return self.metrics[columns].rename(columns=lambda name: name.removeprefix(prefix)).dropna(how="all")


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises FileNotFoundError if the run has not finished."""
    if not (folder / "done").is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a finished run")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Run(
        summary=json.loads((folder / "summary.json").read_text()),
        config=yaml.safe_load((folder / "config.yaml").read_text()),
        metrics=pd.DataFrame(rows).set_index("epoch"),
    )
