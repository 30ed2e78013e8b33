"""Bad input to suites and tables: one clear sentence and exit code 2, each."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis import build, collect, published, tables
from analysis.collect import record
from experiments import suite
from experiments.runs.summary import FORMAT
from tests.analysis.runs import seal, write_run
from tests.helpers import refusal

CELL = "{name: dense, recipe: digits_small, overrides: [method=dense]}"


@pytest.fixture
def said(monkeypatch) -> Callable[..., str]:
    """The sentence with which a command refuses."""

    def of(main: Callable[..., None], *arguments: object) -> str:
        words = [*map(str, arguments)]
        command = main if main is suite.main else lambda: main(sys.argv[1:])
        return refusal(command, words, monkeypatch)

    return of


def suite_of(folder: Path, *cells: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(
        "title: Mine\nseeds: [0]\ncells:\n" + "".join(f"  - {cell}\n" for cell in cells)
    )
    return path


def a_run(folder: Path, **changes: Any) -> Path:
    """The parent of a digits_demo run's folder, with changes to its summary."""
    written = write_run(folder / "runs" / "dense", "dense", suite="digits_demo", cell="dense")
    summary = written / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | changes))
    seal(written)
    return folder / "runs"


def duplicate_cell(folder, said, **_) -> str:
    return said(suite.main, "plan", suite_of(folder, CELL, CELL))


def unknown_method(folder, said, **_) -> str:
    return said(
        suite.main, "launch", suite_of(folder, CELL.replace("method=dense", "method=hrank"))
    )


def edited_run(folder, said, **_) -> str:
    runs = a_run(folder)
    manifest = runs / "dense" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"lr": 0.1', '"lr": 0.2'))
    return said(tables.main, runs, "digits_demo")


def half_written_run(folder, said, **_) -> str:
    runs = a_run(folder)
    (runs / "dense" / "metrics.jsonl").unlink()
    return said(tables.main, runs, "digits_demo")


def damaged_results(folder, said, **_) -> str:
    record(a_run(folder), folder / "runs" / "recorded")
    path = folder / "runs" / "recorded" / "digits_demo" / "runs.csv"
    path.write_text(path.read_text().replace(",90.0,", ",900,", 1))
    return said(build.main, "verify", "--results", folder / "runs" / "recorded")


def newer_results(folder, said, **_) -> str:
    return said(tables.main, a_run(folder, format=FORMAT + 1), "digits_demo")


def broken_published_row(folder, said, monkeypatch) -> str:
    lines = published.PUBLISHED.read_text().splitlines()
    (folder / "published.csv").write_text(
        "\n".join([lines[0], lines[1].replace(",20", ",year 20", 1)])
    )
    monkeypatch.setattr(
        build, "read_published", lambda: published.read_published(folder / "published.csv")
    )
    return said(build.main, "tables", "--out", folder / "tables")


def no_runs_to_tabulate(folder, said, **_) -> str:
    return said(tables.main, folder, "digits_demo")


def no_such_folder_or_suite(folder, said, **_) -> str:
    return said(tables.main, folder / "rnus")


def two_folders(folder, said, **_) -> str:
    return said(tables.main, folder, folder.parent)


def a_record_of_another_folder(folder, said, **_) -> str:
    return said(build.main, "tables", "--record", "--results", folder)


def no_suite_to_build(folder, said, **_) -> str:
    return said(build.main, "tables", "--suite", "nothing", "--out", folder / "tables")


def no_runs_to_record(folder, said, **_) -> str:
    return said(collect.main, folder, "--results", folder / "results")


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        (duplicate_cell, "mine.yaml is no suite: 'dense' stands there twice"),
        (unknown_method, "method=hrank: there is no such method; "),
        (
            edited_run,
            "manifest.json is damaged or was edited: it is not what the run wrote; copy the run again",
        ),
        (half_written_run, "is half-written: metrics.jsonl is missing; copy the run again"),
        (damaged_results, "runs.csv is damaged: top1 cannot be 900"),
        (newer_results, "summary.json was written by a newer version of this suite: update"),
        (broken_published_row, "published.csv, line 2: year is 'year 20"),
        (no_runs_to_tabulate, "holds no finished run of digits_demo"),
        (no_such_folder_or_suite, "rnus': a suite is one of "),
        (two_folders, "name one folder, not "),
        (a_record_of_another_folder, "--record builds from analysis/recorded: leave out --results"),
        (no_suite_to_build, "there is no suite 'nothing': it must be one of "),
        (no_runs_to_record, "holds no finished run of a suite"),
    ],
)
def test_refused_in_one_sentence(
    case: Callable[..., str], sentence: str, said, tmp_path, monkeypatch
) -> None:
    assert sentence in case(folder=tmp_path, said=said, monkeypatch=monkeypatch)
    assert {path.name for path in tmp_path.iterdir()} <= {
        "mine.yaml",
        "runs",
        "published.csv",
    }  # nothing half-written
