"""Finished runs as tables and figures see them, from run folders or from what is recorded of a suite."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.exits import one_sentence
from experiments.runs.checks import (
    AT_LEAST_1,
    SHARE,
    TEXT,
    WHOLE,
    Check,
    list_of,
    mapping_with,
    optional,
)
from experiments.runs.done import read_done, refuse_damage
from experiments.runs.files import DataError, parse_json, parse_yaml, read_plain
from experiments.runs.provenance import Provenance, provenance_of
from experiments.runs.summary import RunSummary, parse_summary

RESULTS = Path(__file__).parent / "recorded"
OWN = Path("results")  # where everything goes that is not meant for the repository
PULSE_COLUMNS = ["epoch", "layer", "filter", "utility", "standard_error", "restored"]
# What is needed of the files of a run.
IDENTITY = {
    "epochs": AT_LEAST_1,
    "model": mapping_with({"name": TEXT}),
    "data": mapping_with(
        {
            "name": TEXT,
            "image_size": WHOLE,
            "train_images": optional(WHOLE),
            "validation_images": WHOLE,
        }
    ),
    "method": mapping_with({"name": TEXT, "target_macs_cut": optional(SHARE)}),
}
PLAN: dict[str, Check] = {
    "layers": list_of(
        mapping_with({"name": TEXT, "filters": AT_LEAST_1, "pruned": list_of(WHOLE)}), least=1
    )
}
TIDY_COLUMNS = [*RunSummary.__dataclass_fields__, "commit", "device"]


class NotFinishedError(DataError):
    """The folder of a run that has not finished."""


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        recipe: name of what it was configured by.
        identity: what changes its result, as experiments.runs.identity says; `config_hash` is taken over it.
        metrics: one row per completed epoch (the index), one column per key of metrics.jsonl, in the order in
            which the keys first appear; NaN where an epoch has no value.
        plan: the final plan; None for methods that make none.
        pulses: one row per filter that stood suspended during a pulse: epoch, layer, filter, utility,
            standard_error, restored (bool). Empty without pulses.
    """

    recipe: str
    summary: RunSummary
    identity: Mapping[str, Any]
    provenance: Provenance
    metrics: pd.DataFrame
    plan: dict[str, Any] | None
    pulses: pd.DataFrame

    @property
    def suite(self) -> str | None:
        return self.summary.suite

    @property
    def cell(self) -> str | None:
        return self.summary.cell

    @property
    def seed(self) -> int:
        return self.summary.seed

    @property
    def method(self) -> str:
        return self.summary.method

    def layers(self, quantity: str) -> pd.DataFrame:
        """A quantity by epoch (rows; those that have a value) and layer: the metrics `layer/<quantity>/<layer>`."""
        if quantity == "prune_ratio":
            return self._prune_ratios()
        prefix = f"layer/{quantity}/"
        columns = [name for name in self.metrics if name.startswith(prefix)]
        named_by_layer = self.metrics[columns].rename(
            columns=lambda name: name.removeprefix(prefix)
        )
        return named_by_layer.dropna(how="all")

    def _prune_ratios(self) -> pd.DataFrame:
        """From the filters that are kept: recorded runs have nothing that follows from others."""
        layers = self.plan["layers"] if self.plan is not None else []
        filters = pd.Series({layer["name"]: layer["filters"] for layer in layers}, dtype=float)
        kept = self.layers("kept")
        return 1 - kept / filters[kept.columns]


# ---------------------------------------------------------------------------- run folders


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        NotFinishedError: the run has not finished.
        DataError: a file is missing, damaged, edited, or of a newer format.
    """
    if not (folder / "done").is_file():
        raise NotFinishedError(
            f"{folder} is not the folder of a finished run: it has no file `done`"
        )
    refuse_damage(folder)
    summary = parse_summary(_content(folder / "summary.json"), folder / "summary.json")
    manifest = _content(folder / "manifest.json")
    config = _content(folder / "config.yaml")
    files = sorted(read_done(folder))
    plans = [folder / name for name in files if name.startswith("plans/")]
    pulses = [folder / name for name in files if name.startswith("pulses/")]
    return Run(
        recipe=config["name"],
        summary=summary,
        identity=manifest["identity"],
        provenance=provenance_of(manifest, config["runtime"]["threads"]),
        metrics=_metrics(folder / "metrics.jsonl"),
        plan=_plan(plans[-1]) if plans else None,
        pulses=_pulses(pulses),
    )


def _content(path: Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file."""
    data = read_plain(path)
    if path.suffix != ".yaml":
        return parse_json(data, path)
    try:
        content: dict[str, Any] = parse_yaml(data)
    except ValueError as error:
        raise DataError(f"{path} is damaged: {error}") from error
    return content


def _plan(path: Path) -> dict[str, Any]:
    plan = _content(path)
    plan.pop("sha256", None)  # of the file, whose digest the run keeps
    return plan


def _metrics(path: Path) -> pd.DataFrame:
    rows = [json.loads(line) for line in read_plain(path).splitlines()]
    return pd.DataFrame(rows).set_index("epoch")


def refuse_another(summary: RunSummary, identity: Mapping[str, Any], place: Path) -> None:
    """Raise DataError where a summary and an identity, both of one place, are of different runs."""
    for name, ours, theirs in (
        ("epochs", summary.epochs, identity["epochs"]),
        ("method", summary.method, identity["method"]["name"]),
        ("dataset", summary.dataset, identity["data"]["name"]),
        ("model", summary.model, identity["model"]["name"]),
    ):
        if ours != theirs:
            raise DataError(
                f"{place} was edited by hand or mixed from two runs: {name} is {ours} in the summary and {theirs} in "
                "the configuration; copy or train it again"
            )


def refuse_incomplete(metrics: pd.DataFrame, epochs: int, path: Path) -> None:
    """Raise DataError where an epoch, or its accuracy, is missing."""
    if "eval/top1" not in metrics or metrics["eval/top1"].isna().any():
        raise DataError(f"{path} is damaged: an epoch has no 'eval/top1'; copy the run again")
    if list(metrics.index) != list(range(1, epochs + 1)):
        raise DataError(
            f"{path} is damaged: it does not hold epochs 1 to {epochs}; copy the run again"
        )


def _pulses(paths: Sequence[Path]) -> pd.DataFrame:
    rows = []
    for path in paths:
        epoch = int(path.stem.removeprefix("epoch_"))
        for layer, pulse in _content(path).items():
            columns = zip(pulse["filters"], pulse["utility"], pulse["standard_error"], strict=True)
            rows += [(epoch, layer, *values, values[0] in pulse["restored"]) for values in columns]
    return pulse_frame(rows)


def pulse_frame(rows: Iterable[tuple[Any, ...]]) -> pd.DataFrame:
    """Rows of PULSE_COLUMNS as a frame."""
    kinds = {"epoch": int, "filter": int, "utility": float, "standard_error": float}
    return pd.DataFrame(rows, columns=PULSE_COLUMNS).astype({**kinds, "restored": bool})


def scan(root: Path) -> tuple[dict[Path, Run], list[DataError]]:
    """The run folders below a folder, in the order of suite, cell, seed and path, and what cannot be read."""
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    runs, errors = {}, []
    markers = [
        path for name in ("manifest.json", "summary.json", "done") for path in root.rglob(name)
    ]
    for folder in sorted({marker.parent for marker in markers}):
        try:
            runs[folder] = read_run(folder)
        except DataError as error:
            errors.append(error)
        except OSError as error:
            errors.append(DataError(one_sentence(error)))
    ordered = sorted(runs, key=lambda folder: order(runs[folder]))
    return {folder: runs[folder] for folder in ordered}, errors


def order(run: Run) -> tuple[str, str, int]:
    """By suite, cell and seed."""
    return run.suite or "", run.cell or "", run.seed


# ---------------------------------------------------------------------------- several runs


def training_hours(runs: Iterable[Run]) -> str:
    """How long they trained, each on its own clock, with all that shared its device; evaluation is not in it."""
    return f"{sum(run.summary.train_seconds for run in runs) / 3600:.1f} h"


def named(names: Iterable[str]) -> str:
    """All different ones, in one line."""
    return ", ".join(sorted(set(names)))


def tidy(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run, with TIDY_COLUMNS; accuracies in percent, macs_cut a share."""
    rows = [
        {
            **asdict(run.summary),
            "commit": run.provenance.commit,
            "device": run.provenance.device,
        }
        for run in runs
    ]
    return pd.DataFrame(rows, columns=TIDY_COLUMNS)
