"""What a finished run says of itself: summary.json, as training writes it and everybody else reads it."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from experiments.runs.checks import (
    AMOUNT,
    AT_LEAST_1,
    PERCENT,
    SHARE,
    TEXT,
    WHOLE,
    Check,
    of_type,
    optional,
    plain_name,
)
from experiments.runs.done import refuse_damage
from experiments.runs.files import DataError, read_json
from psap_core import InputError

FORMAT = 1  # the newest that is understood; a file without a format has this one


@dataclass(frozen=True)
class RunSummary:
    """A finished run's result.

    Attributes:
        train_images, test_images: how many images it trained on, and was tested on.
        suite, cell: the table and its row that the run is for; None: no table.
        start_top1: of the weights that the run began with; None: it began with fresh ones.
        top1, top5: of the exported network on the test images, in percent.
        masked_top1: of the network in training, before the plan is applied for good, in percent.
        macs, params: of the exported network.
        macs_cut: share of the dense network's MACs that went.
        export_max_relative_error: max|a - b| / max|a| of both networks' outputs.
        train_macs: forward MACs of the network in training times images seen; a training step costs three times it.
        train_seconds, prune_seconds: of training, and of the pruning steps in it.
        train_seconds_dense_ratio: train_seconds over what the dense network's training takes there, by steps that were
            timed at the start; None: not measured.
    """

    dataset: str
    image_size: int
    train_images: int
    model: str
    method: str
    epochs: int
    seed: int
    suite: str | None
    cell: str | None
    start_top1: float | None
    top1: float
    top5: float
    masked_top1: float
    test_images: int
    macs: int
    macs_cut: float
    params: int
    export_max_relative_error: float
    train_macs: int
    train_seconds: float
    train_seconds_dense_ratio: float | None
    prune_seconds: float
    config_hash: str


CHECKS: dict[str, Check] = {
    "dataset": TEXT,
    "image_size": WHOLE,
    "train_images": WHOLE,
    "model": TEXT,
    "method": TEXT,
    "epochs": AT_LEAST_1,
    "seed": of_type(int),
    "suite": optional(plain_name),
    "cell": optional(plain_name),
    "start_top1": optional(PERCENT),
    "top1": PERCENT,
    "top5": PERCENT,
    "masked_top1": PERCENT,
    "test_images": WHOLE,
    "macs": WHOLE,
    "macs_cut": SHARE,
    "params": WHOLE,
    "export_max_relative_error": AMOUNT,
    "train_macs": AMOUNT,
    "train_seconds": AMOUNT,
    "train_seconds_dense_ratio": optional(AMOUNT),
    "prune_seconds": AMOUNT,
    "config_hash": TEXT,
}


def parse_summary(content: Mapping[str, Any], path: Path) -> RunSummary:
    """The summary that was found in a file.

    Raises:
        DataError: a newer version wrote it, or a value is missing or cannot be.
    """
    refuse_impossible(content, {"format": optional(WHOLE)}, path)  # a newer one may lack the rest
    if (content.get("format") or 0) > FORMAT:
        raise DataError(f"{path} was written by a newer version of this suite: update")
    refuse_impossible(content, CHECKS, path)
    values: dict[str, Any] = {field.name: content.get(field.name) for field in fields(RunSummary)}
    return RunSummary(**values)


def refuse_impossible(content: Mapping[str, Any], checks: Mapping[str, Check], path: Path) -> None:
    """Raise DataError where a value is missing or cannot be."""
    for name, check in checks.items():
        if check(content.get(name)):
            continue
        what = f"it has no {name!r}"
        if name in content:
            what = f"{name} cannot be {content[name]!r:.60}"
        raise DataError(f"{path} is damaged: {what}; copy the run again")


def read_summary(folder: Path) -> RunSummary:
    """That of a finished run's folder."""
    path = folder / "summary.json"
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        if (folder / "manifest.json").is_file():
            raise InputError(
                f"the run in {folder} is not finished: the same training command continues it"
            ) from error
        raise InputError(
            f"{folder} is not the folder of a finished run: it has no summary.json"
        ) from error
    return parse_summary(content, path)


def read_finished(folder: Path) -> RunSummary:
    """The summary of a finished run, all of whose files are as it wrote them.

    Raises:
        InputError: the run is not finished.
        DataError: one of its files is missing, damaged or edited.
    """
    summary = read_summary(folder)
    if not (folder / "done").is_file():
        raise InputError(
            f"the run in {folder} is not finished: the same training command continues it"
        )
    refuse_damage(folder)
    return summary


def summary_text(summary: RunSummary, folder: Path) -> str:
    """A few lines for a person: the result, what it cost, and what can be done next."""
    epochs = "1 epoch" if summary.epochs == 1 else f"{summary.epochs} epochs"
    classes = read_json(folder / "export" / "spec.json", "network")["network"]["classes"]
    top5 = ""
    if classes > 5:
        top5 = f", top-5 {summary.top5:.2f} %"
    lines = [
        f"{summary.model} on {summary.dataset}, {summary.method}, seed {summary.seed}: {folder}",
        f"  top-1 {summary.top1:.2f} %{top5} on {summary.test_images:,} test images",
        f"  {summary.macs / 1e6:,.2f} M MACs ({100 * summary.macs_cut:.1f} % cut), "
        f"{summary.params / 1e6:,.2f} M parameters",
        f"  trained for {epochs} in {_duration(summary.train_seconds)}",
    ]
    if summary.start_top1 is not None:
        lines[1] += f"; it began at {summary.start_top1:.2f} %"
    if summary.train_seconds_dense_ratio is not None:
        lines[-1] += (
            f", {100 * summary.train_seconds_dense_ratio:.0f} % of the dense network's time"
        )
    path = str(folder)
    run = f"run={path}"
    if not re.fullmatch(r"[\w./-]+", path):
        run = shlex.quote(f"run='{path}'")  # for the shell, and for Hydra
    lines += [
        "next:",
        f"  python -m experiments.evaluate {run}",
        f"  python -m experiments.export {run} onnx=true",
        f"  python -m analysis.figures.overview what_happened.png {shlex.quote(path)}",
    ]
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    """`2 h 5 min`, `3 min 20 s`, `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {rest} s"
    return f"{rest} s"
