"""Reading run folders, and recording the small files of finished runs.

python -m analysis.collect RUNS_DIR [--results analysis/results]
    records every finished run of a suite below RUNS_DIR; what is recorded is never overwritten
python -m analysis.collect RUNS_DIR --tidy OUT.csv
    records nothing; writes one row of numbers per finished run below RUNS_DIR, of suites or not
"""

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

FORMAT = 1  # of recorded runs
RESULTS = Path(__file__).parent / "results"
WITHOUT_PLAN = {"dense", "thin", "thin_plan"}
# Paths; the identity has their digests instead.
NOT_COMPARED = {"data": {"root"}, "model": {"weights"}, "method": {"run"}}
# Settings that the identity leaves out at the value that runs had before there was such a setting.
CAME_LATER = {"method": {"scope": "all", "round_to": 1}}
PULSE_COLUMNS = ["epoch", "layer", "filter", "utility", "standard_error", "restored"]

Check = Callable[[Any], bool]


def _is(*kinds: type) -> Check:
    return lambda value: isinstance(value, kinds) and not isinstance(value, bool)


def _within(low: float, high: float, *kinds: type) -> Check:
    return lambda value: _is(*kinds)(value) and low <= value <= high


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list(check: Check, least: int = 0) -> Check:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(check, value))


def _has(checks: Mapping[str, Check]) -> Check:
    """Of a mapping whose values, None where it has no such key, pass."""
    return lambda value: (
        isinstance(value, dict) and all(check(value.get(name)) for name, check in checks.items())
    )


TEXT, NUMBER = _is(str), _is(int, float)
WHOLE, AT_LEAST_1 = _within(0, sys.float_info.max, int), _within(1, sys.float_info.max, int)
AMOUNT, SHARE, PERCENT = (_within(0, high, int, float) for high in (sys.float_info.max, 1, 100))
# What analysis needs of the files of a run.
SUMMARY = {
    "suite": _or_none(TEXT),
    "cell": _or_none(TEXT),
    "seed": WHOLE,
    "dataset": TEXT,
    "image_size": WHOLE,
    "train_images": WHOLE,
    "model": TEXT,
    "method": TEXT,
    "epochs": AT_LEAST_1,
    "top1": PERCENT,
    "top5": PERCENT,
    "masked_top1": PERCENT,
    "start_top1": _or_none(PERCENT),
    "macs": WHOLE,
    "macs_cut": SHARE,
    "params": WHOLE,
    "train_macs": AMOUNT,
    "train_seconds": AMOUNT,
    "prune_seconds": AMOUNT,
    "config_hash": TEXT,
}
MANIFEST = {
    "config_hash": TEXT,
    "seed": WHOLE,
    "device": TEXT,
    "identity": _or_none(_is(dict)),
    "sessions": _list(_has({"commit": _or_none(TEXT)}), least=1),
}
CONFIG = {
    "name": TEXT,
    "epochs": AT_LEAST_1,
    "model": _has({"name": TEXT}),
    "data": _has(
        {
            "name": TEXT,
            "image_size": WHOLE,
            "train_images": _or_none(WHOLE),
            "validation_images": WHOLE,
        }
    ),
    "method": _has({"name": TEXT, "target_macs_cut": _or_none(SHARE)}),
}
PLAN = {
    "layers": _list(_has({"name": TEXT, "filters": AT_LEAST_1, "pruned": _list(WHOLE)}), least=1)
}
PULSE = {
    "filters": _list(WHOLE),
    "utility": _list(NUMBER),
    "standard_error": _list(NUMBER),
    "restored": _list(WHOLE),
}
TIDY_COLUMNS = [*SUMMARY, "commit", "device"]


class DataError(Exception):
    """What is wrong with a file, in one sentence for a person."""


class NotFinishedError(DataError):
    """The folder of a run that has not finished."""


@contextmanager
def plain_exits(*kinds: type[Exception]) -> Iterator[None]:
    """What is meant for a person, of these kinds, leaves as `error: <sentence>`, exit code 2."""
    try:
        yield
    except kinds as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        summary: summary.json.
        config: config.yaml.
        manifest: manifest.json.
        metrics: one row per completed epoch (the index), one column per key of metrics.jsonl, in the order in
            which the keys first appear; NaN where an epoch has no value.
        plan: the final plan; None for methods that make none.
        pulses: one row per filter that stood suspended during a pulse: epoch, layer, filter, utility,
            standard_error, restored (bool). Empty without pulses.
    """

    summary: dict[str, Any]
    config: dict[str, Any]
    manifest: dict[str, Any]
    metrics: pd.DataFrame
    plan: dict[str, Any] | None
    pulses: pd.DataFrame

    @property
    def suite(self) -> str | None:
        return self.summary.get("suite")

    @property
    def cell(self) -> str | None:
        return self.summary.get("cell")

    @property
    def seed(self) -> int:
        return int(self.summary["seed"])

    @property
    def method(self) -> str:
        return str(self.summary["method"])

    @property
    def commit(self) -> str:
        """Of the last session: seven digits, and `+` if there were uncommitted changes."""
        last = self.manifest["sessions"][-1]
        return (last.get("commit") or "unknown")[:7] + (
            "+" if last.get("dirty_diff_sha256") else ""
        )

    def layers(self, quantity: str) -> pd.DataFrame:
        """The columns `layer/<quantity>/<layer>`, named by layer, of the epochs that have a value."""
        prefix = f"layer/{quantity}/"
        columns = [name for name in self.metrics if name.startswith(prefix)]
        return (
            self.metrics[columns]
            .rename(columns=lambda name: name.removeprefix(prefix))
            .dropna(how="all")
        )


def read_run(folder: Path) -> Run:
    """Read a run folder or a recorded run.

    Raises:
        NotFinishedError: the run has not finished.
        DataError: a file is missing or damaged, was edited by hand, belongs to another run, or has a newer format.
    """
    if not (folder / "done").is_file():
        raise NotFinishedError(
            f"{folder} is not the folder of a finished run: it has no file `done`"
        )
    # First, because a newer format may lack the rest.
    summary = _read(folder / "summary.json", {"format": _or_none(WHOLE)})
    if (summary.get("format") or 0) > FORMAT:
        raise DataError(
            f"{folder / 'summary.json'} was written by a newer version of this suite: update"
        )
    summary = _read(folder / "summary.json", SUMMARY)
    manifest = _read(folder / "manifest.json", MANIFEST)
    config = _read(folder / "config.yaml", CONFIG)
    _refuse_mixed(folder, summary, config, manifest)
    plans = sorted((folder / "plans").glob("epoch_*.json"))
    if not plans and summary["method"] not in WITHOUT_PLAN:
        raise DataError(f"{folder} is half-written: it has no plan in plans/; copy it again")
    return Run(
        summary=summary,
        config=config,
        manifest=manifest,
        metrics=_metrics(folder / "metrics.jsonl", summary["epochs"]),
        plan=_read(plans[-1], PLAN) if plans else None,
        pulses=_pulses(sorted((folder / "pulses").glob("epoch_*.json"))),
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(
            f"{path.parent} is half-written: {path.name} is missing; copy it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; copy the run again") from error


def _read(path: Path, checks: Mapping[str, Check]) -> dict[str, Any]:
    """The mapping in a JSON or YAML file, whose values pass the checks of their names."""
    data = _bytes(path)
    try:
        content: Any = yaml.safe_load(data) if path.suffix == ".yaml" else json.loads(data)
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(f"{path} is damaged: it cannot be read; copy the run again") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: it holds no names and values; copy the run again")
    for name, check in checks.items():
        if not check(content.get(name)):
            what = (
                f"{name} cannot be {content[name]!r:.60}"
                if name in content
                else f"it has no {name!r}"
            )
            raise DataError(f"{path} is damaged: {what}; copy the run again")
    return content


def _refuse_mixed(
    folder: Path, summary: dict[str, Any], config: dict[str, Any], manifest: dict[str, Any]
) -> None:
    """Refuse files that belong to different runs; those of older versions have no identity to compare."""

    def refuse(what: str) -> None:
        raise DataError(
            f"{folder} was edited by hand or mixed from two runs: {what}; copy or train it again"
        )

    for name in ("config_hash", "seed"):
        if summary[name] != manifest[name]:
            refuse(
                f"{name} is {summary[name]} in summary.json and {manifest[name]} in manifest.json"
            )
    for name in ("seed", "suite", "cell"):
        if name in config and config[name] != summary.get(name):
            refuse(
                f"{name} is {config[name]} in config.yaml and {summary.get(name)} in summary.json"
            )
    identity = manifest.get("identity")
    if identity is None:
        return
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    if digest != manifest["config_hash"]:
        refuse(
            f"config_hash is {manifest['config_hash']} and the identity in manifest.json has {digest}"
        )
    for section, content in identity.items():
        if _identity_part(section, content) != _identity_part(section, config.get(section)):
            refuse(f"{section} differs between config.yaml and the identity in manifest.json")


def _identity_part(section: str, content: Any) -> Any:
    if not isinstance(content, dict):
        return content
    paths = NOT_COMPARED.get(section, set())
    later = CAME_LATER.get(section, {})
    return {
        key: value
        for key, value in content.items()
        if key not in paths and (key not in later or value != later[key])
    }


def _metrics(path: Path, epochs: int) -> pd.DataFrame:
    try:
        rows = [json.loads(line) for line in _bytes(path).splitlines()]
        if not all(
            isinstance(row, dict) and all(map(_or_none(NUMBER), row.values())) for row in rows
        ):
            raise ValueError
        metrics = pd.DataFrame(rows).set_index("epoch")
    except (ValueError, KeyError) as error:
        raise DataError(
            f"{path} is damaged: a line is no epoch's values; copy the run again"
        ) from error
    if "eval/top1" not in metrics or metrics["eval/top1"].isna().any():
        raise DataError(f"{path} is damaged: an epoch has no 'eval/top1'; copy the run again")
    if list(metrics.index) != list(range(1, epochs + 1)):
        raise DataError(
            f"{path} is damaged: it does not hold epochs 1 to {epochs}; copy the run again"
        )
    return metrics


def _pulses(paths: Sequence[Path]) -> pd.DataFrame:
    rows = []
    for path in paths:
        try:
            epoch = int(path.stem.removeprefix("epoch_"))
            for layer, pulse in _read(path, {}).items():
                if not _has(PULSE)(pulse):
                    raise ValueError
                columns = zip(
                    pulse["filters"], pulse["utility"], pulse["standard_error"], strict=True
                )
                rows += [
                    (epoch, layer, *values, values[0] in pulse["restored"]) for values in columns
                ]
        except ValueError as error:
            raise DataError(f"{path} is damaged: it holds no pulse; copy the run again") from error
    return pd.DataFrame(rows, columns=PULSE_COLUMNS).astype({"restored": bool})


def scan(root: Path) -> tuple[dict[Path, Run], list[DataError]]:
    """The runs below a folder, in the order of suite, cell, seed and folder, and what cannot be read."""
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    runs, errors = {}, []
    markers = [
        path for name in ("manifest.json", "summary.json", "done") for path in root.rglob(name)
    ]
    for folder in sorted({marker.parent for marker in markers}):
        if folder.name.startswith("."):
            continue  # a recording that was cut short
        try:
            runs[folder] = read_run(folder)
        except DataError as error:
            errors.append(error)
    order = sorted(
        runs,
        key=lambda folder: (runs[folder].suite or "", runs[folder].cell or "", runs[folder].seed),
    )
    return {folder: runs[folder] for folder in order}, errors


def read_runs(root: Path) -> list[Run]:
    """All finished runs below a folder, in the order of suite, cell, seed and folder.

    Of each run that has not finished, a warning says so. Raises DataError if there is no such folder or a
    finished run is damaged.
    """
    runs, errors = scan(root)
    for error in errors:
        if not isinstance(error, NotFinishedError):
            raise error
        warnings.warn(f"left out: {error}", stacklevel=2)
    return list(runs.values())


def training_hours(runs: Iterable[Run]) -> str:
    """How long they trained, each on its own clock, with all that shared its device; evaluation is not in it."""
    return f"{sum(run.summary['train_seconds'] for run in runs) / 3600:.1f} h"


def named(names: Iterable[str]) -> str:
    """All different ones, in one line."""
    return ", ".join(sorted(set(names)))


def tidy(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run, with TIDY_COLUMNS; accuracies in percent, macs_cut a share."""
    rows = [run.summary | {"commit": run.commit, "device": run.manifest["device"]} for run in runs]
    return pd.DataFrame(rows, columns=TIDY_COLUMNS)


def recorded_files(folder: Path) -> dict[str, bytes]:
    """What is recorded of a finished run: names and contents, without commands and paths of the machine."""
    run = read_run(folder)
    manifest = run.manifest | {
        "sessions": [
            {k: v for k, v in session.items() if k != "command"}
            for session in run.manifest["sessions"]
        ]
    }
    config = {key: value for key, value in run.config.items() if key != "runs_dir"}
    config["data"] = {key: value for key, value in config["data"].items() if key != "root"}
    for section, key, parts in (("model", "weights", 1), ("method", "run", 3)):
        if path := config[section].get(key):
            config[section] = config[section] | {
                key: "/".join(Path(path).parts[-parts:]).lstrip("/")
            }
    files = {
        "summary.json": _json({"format": FORMAT} | run.summary),
        "manifest.json": _json(manifest),
        "config.yaml": yaml.safe_dump(config, sort_keys=False).encode(),
        "metrics.jsonl": _bytes(folder / "metrics.jsonl"),
    }
    for path in [
        *sorted((folder / "plans").glob("epoch_*.json"))[-1:],
        *(folder / "pulses").glob("epoch_*.json"),
    ]:
        files[str(path.relative_to(folder))] = path.read_bytes()
    return files | {"done": b""}


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def record(runs_dir: Path, results: Path) -> tuple[list[Path], list[str]]:
    """Record every finished run of a suite below `runs_dir` in results/<suite>/<cell>/seed<k>.

    Returns the recorded folders, those that were recorded before among them, and what was left out and why.

    Raises:
        DataError: another run is recorded in a run's place, or two runs have the same; nothing is written then.
    """
    runs, errors = scan(runs_dir)
    left_out = [str(error) for error in errors]
    sources: dict[Path, Path] = {}
    contents: dict[Path, dict[str, bytes]] = {}
    for folder, run in runs.items():
        if run.suite is None or run.cell is None:
            left_out.append(f"{folder} belongs to no suite")
            continue
        place = results / run.suite / run.cell.replace(" ", "_") / f"seed{run.seed}"
        files = recorded_files(folder)
        if contents.get(place, files) != files:
            raise DataError(
                f"{sources[place]} and {folder} are different runs of the same suite, cell and seed: move one away"
            )
        if place.exists() and _content(place) != files:
            raise DataError(
                f"{place} records another run than {folder}: move it away, nothing is overwritten"
            )
        sources[place], contents[place] = folder, files
    for place, files in contents.items():
        if not place.exists():
            _write(place, files)
    return list(contents), left_out


def _content(place: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file()
    }


def _write(place: Path, files: dict[str, bytes]) -> None:
    """Write a folder at once: a reader finds all of it or nothing."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".", dir=place.parent))
    try:
        for name, data in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(data)
        temporary.chmod(0o755)
        temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs_dir", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--tidy", type=Path, metavar="OUT.csv")
    given = parser.parse_args(arguments)
    with plain_exits(DataError, OSError):
        if given.tidy:
            tidy(read_runs(given.runs_dir)).to_csv(given.tidy, index=False)
            return
        recorded, left_out = record(given.runs_dir, given.results)
        if not recorded:
            reasons = "".join(f"; {why}" for why in left_out)
            raise DataError(f"{given.runs_dir} holds no finished run of a suite{reasons}")
    for place in recorded:
        print(f"recorded: {place}")
    for why in left_out:
        print(f"left out: {why}")


if __name__ == "__main__":
    main(sys.argv[1:])
