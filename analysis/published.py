"""Figures that others published: published.csv, checked."""

import csv
import re
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.suites import Setting
from experiments.runs.files import DataError
from experiments.suites.method_styles import published_names

PUBLISHED = Path(__file__).parent / "published.csv"
TEXTS = ("dataset", "model", "method", "source_url", "source_note")
RANGES = {  # of numbers; all in percent or percentage points, and empty where the source has none
    "base_top1": (0, 100),
    "pruned_top1": (0, 100),
    "top1_drop": (-100, 100),
    "base_top5": (0, 100),
    "pruned_top5": (0, 100),
    "flops_reduction_pct": (0, 100),
    "params_reduction_pct": (0, 100),
}
COLUMNS = ["dataset", "model", "method", "year", "pretrained", *RANGES, "source_url", "source_note"]
# What makes a row unusable, in its note: flagged, or the remaining FLOPs printed as the removed ones.
FLAGS = re.compile(
    r"DO NOT USE|unusable|print error|misprint|REMAINING FLOPs|FLOPs RATIO \(remaining\)"
)
# Our methods that others published figures of, by what those are called; the first that matches. ASFP is SFP on a ramp.
PEERS = {"asfp": r"\bASFP\b", **published_names()}
ROUNDING = 0.05  # percentage points by which a printed drop may differ from its two accuracies


def read_published(path: Path = PUBLISHED) -> pd.DataFrame:
    """The rows of published.csv, checked, and two more columns.

    `excluded` is why a row cannot be used, missing where it can; `peer` is which of our methods the row is of, missing
    where it is of none.
    `pretrained` is yes, no or None (not stated); numbers that are not printed are NaN. Raises DataError, which
    names the line, where a row is broken.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != COLUMNS:
                raise DataError(f"{path}, line 1: the columns must be {', '.join(COLUMNS)}")
            rows = []
            for row in reader:
                try:
                    rows.append(_checked(row))
                except ValueError as error:
                    raise DataError(f"{path}, line {reader.line_num}: {error}") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    objects = dict.fromkeys(("pretrained", "excluded", "peer"), object)
    return pd.DataFrame(rows, columns=[*COLUMNS, "excluded", "peer"]).astype(objects)


def peer_of(method: str) -> str | None:
    """Which of our methods a published one is, by our name of it; None of methods that we do not run."""
    return next((ours for ours, called in PEERS.items() if re.search(called, method)), None)


def usable(published: pd.DataFrame, setting: Setting) -> pd.DataFrame:
    """The published rows of a data set and network that can be used."""
    of_both = published["dataset"].eq(setting.dataset_title) & published["model"].eq(
        setting.model_title
    )
    return published[of_both & published["excluded"].isna()]


def _checked(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its numbers, `excluded` and `peer`. Raises ValueError, which says what is wrong."""
    if None in row or None in row.values():
        raise ValueError(f"it must have {len(COLUMNS)} values")
    for name in TEXTS:
        if not row[name]:
            raise ValueError(f"{name} is empty")
    if not re.fullmatch(r"(19|20)\d\d", row["year"]):
        raise ValueError(f"year is {row['year']!r} and must be a year")
    if row["pretrained"] not in ("yes", "no", ""):
        raise ValueError(f"pretrained is {row['pretrained']!r} and must be yes, no or empty")
    numbers = {name: _number(name, row[name]) for name in RANGES}
    checked = row | numbers | {"year": int(row["year"]), "pretrained": row["pretrained"] or None}
    return checked | {"excluded": _excluded(checked), "peer": peer_of(row["method"])}


def _number(name: str, text: str) -> float:
    low, high = RANGES[name]
    try:
        number = float(text) if text else float("nan")
    except ValueError as error:
        raise ValueError(f"{name} is {text!r} and must be a number") from error
    if text and not low <= number <= high:
        raise ValueError(f"{name} is {text} and must be within {low} and {high}")
    return number


def _excluded(row: dict[str, Any]) -> str | None:
    parts = row["source_note"].split("; ")
    flagged = [place for place, part in enumerate(parts) if FLAGS.search(part)]
    if flagged:
        return "; ".join(parts[flagged[0] :])
    difference = row["base_top1"] - row["pruned_top1"]
    if abs(difference - row["top1_drop"]) > ROUNDING:  # False of NaN
        return f"print error: a drop of {row['top1_drop']:.2f} beside accuracies that differ by {difference:.2f}"
    return None
