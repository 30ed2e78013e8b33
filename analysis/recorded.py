"""What is recorded of a suite's runs: files that hold all that tables and figures need.

runs.csv         a row a run: where it comes from, and its summary
configs.yaml     by cell: the recipe's name, and what changes the result; the runs' hashes are taken over it
epochs.csv.gz    a row a run and epoch: its metrics, six digits; what follows from others is left out
plans.json       by cell and seed: the final plan
pulses.csv.gz    a row a filter and pulse, of the first seed of every cell, six digits: what the figures draw
latency.json     what `experiments.suite latency` printed, where somebody put it

A run that is not in runs.csv is not recorded, whatever the other files hold: it is written last.
"""

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from analysis.results import (
    IDENTITY,
    PLAN,
    PULSE_COLUMNS,
    Run,
    order,
    pulse_frame,
    refuse_another,
    refuse_incomplete,
)
from experiments.runs.checks import mapping_with
from experiments.runs.files import TEMPORARY, DataError, parse_yaml, read_plain, write_atomically
from experiments.runs.identity import digest
from experiments.runs.provenance import Provenance
from experiments.runs.summary import RunSummary, parse_summary
from experiments.suites.method_styles import chooses_filters

KEY = ["cell", "seed"]
PROVENANCE = [field.name for field in fields(Provenance)]
SUMMARY = [field.name for field in fields(RunSummary) if field.name not in ("suite", *KEY)]
DERIVED = "layer/prune_ratio/"  # from layer/kept/ and the plan, as Run.layers does
FLOATS = "%.6g"
TEXTS = {
    field.name
    for field in (*fields(RunSummary), *fields(Provenance))
    if field.type in (str, str | None)
}


# ---------------------------------------------------------------------------- writing


def write_suite(folder: Path, runs: Sequence[Run]) -> None:
    """Write what is recorded of a suite, all of it."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(TEMPORARY):  # of a process that was killed
        leftover.unlink()
    for name, data in suite_files(runs).items():
        write_atomically(folder / name, data)


def suite_files(runs: Sequence[Run]) -> dict[str, bytes]:
    """The files of a suite, by name; equal runs make equal bytes."""
    runs = sorted(runs, key=order)
    return {
        "configs.yaml": _configs(runs),
        "epochs.csv.gz": _packed(_epochs(runs)),
        "plans.json": _plans(runs),
        "pulses.csv.gz": _packed(_pulses(runs)),
        "runs.csv": _runs(runs),
    }


def _packed(frame: pd.DataFrame) -> bytes:
    text = frame.to_csv(index=False, float_format=FLOATS, lineterminator="\n")
    return gzip.compress(text.encode(), mtime=0)


def _runs(runs: Sequence[Run]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*KEY, *PROVENANCE, *SUMMARY], lineterminator="\n")
    writer.writeheader()
    for run in runs:
        writer.writerow(_row(run))
    return text.getvalue().encode()


def _row(run: Run) -> dict[str, str]:
    """A run's row in runs.csv: texts as they are, nothing for None, JSON of anything else."""
    row = {}
    for name in (*KEY, *PROVENANCE, *SUMMARY):
        value = getattr(run.provenance if name in PROVENANCE else run.summary, name)
        row[name] = json.dumps(value)
        if value is None:
            row[name] = ""
        if isinstance(value, str):
            row[name] = value
    return row


def _configs(runs: Sequence[Run]) -> bytes:
    cells = {str(run.cell): {"recipe": run.recipe, **run.identity} for run in runs}
    return yaml.safe_dump(cells, sort_keys=False).encode()


def _epochs(runs: Sequence[Run]) -> pd.DataFrame:
    frames = []
    for run in runs:
        kept = [name for name in run.metrics if not name.startswith(DERIVED)]
        metrics = run.metrics[kept].copy()  # in one piece: columns are added to it
        frames.append(metrics.reset_index().assign(cell=run.cell, seed=run.seed))
    return _keys_first(pd.concat(frames), "epoch")


def _pulses(runs: Sequence[Run]) -> pd.DataFrame:
    first = {str(run.cell): run for run in reversed(runs) if not run.pulses.empty}
    frames = [run.pulses.assign(cell=run.cell, seed=run.seed) for run in first.values()]
    empty = pulse_frame([]).assign(cell="", seed=0)
    return _keys_first(pd.concat(frames[::-1] or [empty]), *PULSE_COLUMNS)


def _keys_first(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    return frame[[*KEY, *names, *frame.columns.drop([*KEY, *names])]]


def _plans(runs: Sequence[Run]) -> bytes:
    """A line a plan."""
    lines = []
    for run in runs:
        if run.plan is not None:
            plan = json.dumps({"cell": run.cell, "seed": run.seed, "plan": run.plan})
            lines.append(f" {plan}")
    return ("[\n" + ",\n".join(lines) + "\n]\n").encode()


# ---------------------------------------------------------------------------- reading


def read_suite_runs(folder: Path, *, pulses: bool = False) -> list[Run]:
    """The runs that are recorded of a suite; their pulses only where they are asked for.

    Raises:
        DataError: a file is missing or damaged.
    """
    rows = _read_rows(folder)
    configs = _read_configs(folder / "configs.yaml")
    plans = _read_plans(folder / "plans.json")
    epochs = _read_frame(folder / "epochs.csv.gz", [*KEY, "epoch", "eval/top1"])
    metrics = dict(iter(epochs.groupby(KEY, sort=False)))
    pulse_frames: dict[Any, pd.DataFrame] = {}
    if pulses:
        frame = _read_frame(folder / "pulses.csv.gz", [*KEY, *PULSE_COLUMNS])
        pulse_frames = {key: part[PULSE_COLUMNS] for key, part in frame.groupby(KEY, sort=False)}
    runs = []
    for summary, provenance in rows:
        key = str(summary.cell), summary.seed
        config = dict(configs[key[0]]) if key[0] in configs else {}
        recipe = config.pop("recipe", "")
        if digest(config) != summary.config_hash:
            raise _damaged(folder / "configs.yaml", f"{key[0]!r} is not {summary.config_hash}")
        refuse_another(summary, config, folder / "runs.csv")
        plan = plans.get(key)
        if plan is None and chooses_filters(summary.method):
            raise _damaged(folder / "plans.json", f"it has no plan of {key[0]}, seed {key[1]}")
        if key not in metrics:
            raise _damaged(folder / "epochs.csv.gz", f"it has nothing of {key[0]}, seed {key[1]}")
        runs.append(
            Run(
                recipe=recipe,
                summary=summary,
                identity=config,
                provenance=provenance,
                metrics=_metrics(metrics[key], summary.epochs, folder),
                plan=plan,
                pulses=pulse_frames.get(key, pulse_frame([])),
            )
        )
    return runs


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"{path} is damaged: {why}; restore it or record it again")


def _read_rows(folder: Path) -> list[tuple[RunSummary, Provenance]]:
    path = folder / "runs.csv"
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != [*KEY, *PROVENANCE, *SUMMARY]:
                raise _damaged(path, "its first line does not name the columns")
            for line in reader:
                values = {name: _value(name, text) for name, text in line.items()}
                values["suite"] = folder.name
                provenance = {name: values[name] for name in PROVENANCE}
                rows.append((parse_summary(values, path), Provenance(**provenance)))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise _damaged(path, f"a line is no run ({error})") from error
    places = Counter((summary.cell, summary.seed) for summary, _ in rows)
    for (cell, seed), times in places.items():
        if times > 1:
            raise _damaged(path, f"{cell}, seed {seed}, stands there twice")
    return rows


def _value(name: str, text: str) -> Any:
    if text == "":
        return None
    return text if name in TEXTS else json.loads(text)


def _read_configs(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(read_plain(path))
    except (OSError, ValueError) as error:
        raise _damaged(path, "it cannot be read") from error
    if not isinstance(content, dict) or not all(map(mapping_with(IDENTITY), content.values())):
        raise _damaged(path, "a cell is no configuration")
    return content


def _read_plans(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    plans = {}
    try:
        for entry in json.loads(read_plain(path)):
            if not mapping_with(PLAN)(entry["plan"]):
                raise ValueError
            plans[entry["cell"], entry["seed"]] = entry["plan"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "an entry is no plan") from error
    return plans


def _read_frame(path: Path, columns: Iterable[str]) -> pd.DataFrame:
    kinds = {"cell": str, "layer": str}
    try:
        # A cell may be called NA.
        frame = pd.read_csv(path, dtype=kinds, keep_default_na=False, na_values=[""])
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise _damaged(path, "it cannot be read") from error
    for name in columns:
        if name not in frame:
            raise _damaged(path, f"it has no column {name!r}")
    texts = {"cell", "layer"}
    for name in frame.columns:
        is_text = frame[name].dtype == object or pd.api.types.is_string_dtype(frame[name])
        if name not in texts and is_text and len(frame):
            raise _damaged(path, f"column {name!r} holds no numbers")
    return frame


def _metrics(rows: pd.DataFrame, epochs: int, folder: Path) -> pd.DataFrame:
    """A run's metrics as its folder had them, but for digits beyond the sixth and prune ratios."""
    metrics = rows.drop(columns=KEY).set_index("epoch").dropna(axis="columns", how="all")
    refuse_incomplete(metrics, epochs, folder / "epochs.csv.gz")
    return metrics


def read_latencies(path: Path) -> dict[str, Any]:
    """What `experiments.suite latency` printed. Raises DataError if the file holds something else."""
    try:
        latencies: dict[str, Any] = json.loads(read_plain(path))
        measured = [ms for cell in latencies["latency_ms"].values() for ms in cell.values()]
        if not all(ms > 0 for ms in measured) or not {"device", "threads"} <= latencies.keys():
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not what `experiments.suite latency` prints: measure again"
        ) from error
    return latencies


def read_results(results: Path, *, pulses: bool = False) -> list[Run]:
    """The runs of all suites that are recorded below a folder, by suite, cell and seed.

    Raises:
        DataError: there is no such folder, or a file is missing or damaged.
    """
    if not results.is_dir():
        raise DataError(f"there is no folder {results}")
    folders = sorted(path.parent for path in results.glob("*/runs.csv"))
    return [run for folder in folders for run in read_suite_runs(folder, pulses=pulses)]
