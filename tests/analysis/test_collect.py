"""What is recorded of a suite: all that tables and figures need, never overwritten, whole or not at all."""

import csv
import gzip
import io
import json
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import yaml

from analysis import collect
from analysis.collect import RENAMED, main, record
from analysis.recorded import read_results, read_suite_runs, suite_files
from analysis.results import TIDY_COLUMNS, read_run
from experiments.runs.files import DataError
from experiments.runs.identity import digest
from experiments.suites.spec import suite_names
from tests.analysis.runs import seal, write_run
from tests.analysis.test_results import edit
from tests.limits import HANG_SECONDS

NO_COLUMNS = gzip.compress(b"cell,seed\n", mtime=0)
NO_NUMBERS = gzip.compress(b"cell,seed,epoch,eval/top1\na,0,first,90\n", mtime=0)
FILES = ["configs.yaml", "epochs.csv.gz", "plans.json", "pulses.csv.gz", "runs.csv"]


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def runs_dir(tmp_path):
    """Two runs of one cell, one of another, and two that are not recorded."""
    runs = tmp_path / "runs"
    psap = {"suite": "table", "cell": "psap 60", "weights": "resnet20.safetensors"}
    write_run(runs / "a", "psap", **psap)
    write_run(runs / "a1", "psap", seed=1, top1=91.5, **psap)
    write_run(runs / "b", "thin_plan", suite="table", cell="thin_plan 60")
    write_run(runs / "alone", "dense")
    (write_run(runs / "unfinished", "dense", suite="table", cell="dense") / "done").unlink()
    return runs


@pytest.fixture
def table(runs_dir, tmp_path):
    """Folder of the recorded suite."""
    record(runs_dir, tmp_path / "results")
    return tmp_path / "results" / "table"


def test_a_recorded_run_is_the_run_to_six_digits(table, runs_dir):
    recorded = read_suite_runs(table, pulses=True)
    assert [(run.cell, run.seed) for run in recorded] == [
        ("psap 60", 0),
        ("psap 60", 1),
        ("thin_plan 60", 0),
    ]
    for again, name in zip(recorded, ("a", "a1", "b"), strict=True):
        original = read_run(runs_dir / name)
        for what in ("recipe", "summary", "identity", "provenance", "plan"):
            assert getattr(again, what) == getattr(original, what), what
        derived = [column for column in original.metrics if "prune_ratio" in column]
        pd.testing.assert_frame_equal(
            again.metrics, original.metrics.drop(columns=derived), rtol=1e-5, check_dtype=False
        )
        for quantity in ("prune_ratio", "kept", "utility"):
            ours, theirs = again.layers(quantity), original.layers(quantity)
            pd.testing.assert_frame_equal(ours, theirs, rtol=1e-5, check_dtype=False)


def test_of_a_cells_seeds_the_first_has_its_pulses(table, runs_dir):
    first, second, thin = read_suite_runs(table, pulses=True)
    original = read_run(runs_dir / "a").pulses
    pd.testing.assert_frame_equal(first.pulses, original, rtol=1e-5)
    assert second.pulses.empty
    assert thin.pulses.empty
    assert all(run.pulses.empty for run in read_suite_runs(table))


def test_recording_keeps_no_path_of_the_machine(table, tmp_path):
    assert sorted(path.name for path in table.iterdir()) == FILES
    for path in table.iterdir():
        data = path.read_bytes()
        text = gzip.decompress(data) if path.suffix == ".gz" else data
        assert b"/data/" not in text
        assert str(tmp_path).encode() not in text


def test_hashes_are_taken_over_what_is_recorded_of_a_cell(table):
    configs = yaml.safe_load((table / "configs.yaml").read_text())
    for row in csv.DictReader(io.StringIO((table / "runs.csv").read_text())):
        identity = {k: v for k, v in configs[row["cell"]].items() if k != "recipe"}
        assert digest(identity) == row["config_hash"]


def test_a_commit_of_digits_only_stays_a_text(table):
    (run, *_) = read_suite_runs(table)
    for commit in ("1234567", "12e4567", "0000000"):
        changed = replace(run, provenance=replace(run.provenance, commit=commit))
        for name, data in suite_files([changed]).items():
            (table / name).write_bytes(data)
        assert read_suite_runs(table)[0].provenance.commit == commit


def test_recording_again_and_in_parts_makes_the_same_bytes(runs_dir, table, tmp_path):
    before = contents(table)
    recorded, left_out = record(runs_dir, table.parent)
    assert len(recorded) == 3
    assert left_out == [
        f"{runs_dir / 'unfinished'} is not the folder of a finished run: it has no file `done`",
        f"{runs_dir / 'alone'} belongs to no suite",
    ]
    assert contents(table) == before
    for name in ("b", "a1", "a"):
        record(runs_dir / name, tmp_path / "parts")
    assert contents(tmp_path / "parts" / "table") == before


def test_a_run_with_a_metric_that_others_lack_is_recorded_again_as_itself(runs_dir, tmp_path):
    path = runs_dir / "a" / "metrics.jsonl"
    rows = [json.loads(line) | {"train/macs": 101_382_400_000} for line in path.open()]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    seal(runs_dir / "a")
    record(runs_dir, tmp_path / "results")
    before = contents(tmp_path / "results")
    record(runs_dir, tmp_path / "results")
    assert contents(tmp_path / "results") == before


def test_another_run_in_a_recorded_place_is_refused_and_nothing_is_written(runs_dir, table):
    before = contents(table.parent)
    edit(runs_dir / "a" / "summary.json", top1=91.0)
    seal(runs_dir / "a")
    write_run(runs_dir / "new", "sfp", suite="table", cell="aaa")
    with pytest.raises(
        DataError, match=r"table records another run of psap 60, seed 0, than .*/a: move that away"
    ):
        record(runs_dir, table.parent)
    assert contents(table.parent) == before


def test_two_runs_of_one_place_are_refused(runs_dir, tmp_path):
    write_run(runs_dir / "twin", "psap", top1=80.0, suite="table", cell="psap 60")
    with pytest.raises(
        DataError,
        match=r"a and .*twin are different runs of the same suite, cell and seed: move one",
    ):
        record(runs_dir, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_cell_of_two_configurations_is_refused(runs_dir, table):
    before = contents(table.parent)
    write_run(runs_dir / "other", "psap", seed=2, lr=0.2, suite="table", cell="psap 60")
    with pytest.raises(DataError, match=r"^table, cell psap 60: runs are of two configurations"):
        record(runs_dir, table.parent)
    assert contents(table.parent) == before


def test_a_first_recording_that_was_cut_short_is_done_again(runs_dir, table):
    before = contents(table)
    (table / "runs.csv").unlink()
    record(runs_dir, table.parent)
    assert contents(table) == before


def test_a_cell_may_be_called_na(tmp_path):
    write_run(tmp_path / "runs", "psap", suite="table", cell="NA")
    record(tmp_path / "runs", tmp_path / "results")
    (run,) = read_suite_runs(tmp_path / "results" / "table", pulses=True)
    assert run.cell == "NA"
    assert not run.pulses.empty


def test_a_run_that_stands_there_twice_is_refused(table):
    path = table / "runs.csv"
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[-1])
    with pytest.raises(DataError, match=r"thin_plan 60, seed 0, stands there twice"):
        read_suite_runs(table)


def test_a_recording_that_is_cut_short_loses_nothing(runs_dir, table, monkeypatch):
    """The list of the runs is written last: what it does not name is not there."""
    before = read_suite_runs(table, pulses=True)
    write_run(runs_dir / "new", "sfp", suite="table", cell="aaa")

    def killed_at_the_list(path, data):
        if path.name == "runs.csv":
            raise OSError("disk full")
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr("analysis.recorded.write_atomically", killed_at_the_list)
        with pytest.raises(OSError, match="disk full"):
            record(runs_dir, table.parent)
    again = read_suite_runs(table, pulses=True)
    assert [run.summary for run in again] == [run.summary for run in before]
    record(runs_dir, table.parent)
    assert read_suite_runs(table)[0].cell == "aaa"


def test_what_a_killed_recording_left_half_written_goes(runs_dir, table):
    half = table / ".runs.csv.0123.tmp"
    half.write_bytes(b"half")
    record(runs_dir, table.parent)
    assert not half.exists()


def test_two_recordings_at_once_lose_nothing(tmp_path):
    places = []
    for seed in range(2):
        places.append(tmp_path / f"runs{seed}")
        write_run(places[-1] / "run", "psap", suite="table", cell="psap", seed=seed)
    results = tmp_path / "results"
    command = [sys.executable, "-m", "analysis.collect", "--results", str(results)]
    processes = [subprocess.Popen([*command, str(place)]) for place in places]
    assert [process.wait(HANG_SECONDS) for process in processes] == [0, 0]
    assert [run.seed for run in read_suite_runs(results / "table")] == [0, 1]


@pytest.mark.parametrize(
    ("name", "damage", "why"),
    [
        ("runs.csv", b"", "its first line does not name the columns"),
        ("runs.csv", b"cell,seed\na,b\n", "its first line does not name the columns"),
        ("configs.yaml", b"{", "it cannot be read"),
        ("configs.yaml", b"a: 3", "a cell is no configuration"),
        ("plans.json", b"[", "an entry is no plan"),
        ("plans.json", b"[]", "it has no plan of psap 60, seed 0"),
        ("epochs.csv.gz", b"no gzip", "it cannot be read"),
        ("epochs.csv.gz", NO_COLUMNS, "it has no column 'epoch'"),
        ("epochs.csv.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"no deflate", "it cannot be read"),
        ("epochs.csv.gz", NO_NUMBERS, "column 'epoch' holds no numbers"),
        ("pulses.csv.gz", NO_COLUMNS, "it has no column 'epoch'"),
    ],
)
def test_a_damaged_file_is_refused_by_name(table, name, damage, why):
    (table / name).write_bytes(damage)
    with pytest.raises(DataError, match=f"{name} is damaged: {why}"):
        read_suite_runs(table, pulses=True)


def test_a_value_that_was_changed_in_the_list_is_refused(table):
    path = table / "runs.csv"
    path.write_text(path.read_text().replace(",91.5,", ",915,", 1))
    with pytest.raises(DataError, match=r"runs\.csv is damaged: top1 cannot be 915"):
        read_suite_runs(table)
    configs = table / "configs.yaml"
    configs.write_text(configs.read_text().replace("lr: 0.01", "lr: 0.02"))
    path.write_text(path.read_text().replace(",915,", ",91.5,", 1))
    with pytest.raises(DataError, match=r"configs\.yaml is damaged: 'psap 60' is not"):
        read_suite_runs(table)


def test_an_epoch_that_is_missing_is_refused(table):
    path = table / "epochs.csv.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join(lines[:-1])))
    with pytest.raises(DataError, match="it does not hold epochs 1 to 8"):
        read_suite_runs(table)


def test_runs_of_a_suites_old_name_are_recorded_under_its_new_one(tmp_path):
    write_run(tmp_path / "runs", "dense", suite="small_table", cell="dense")
    record(tmp_path / "runs", tmp_path / "results")
    (run,) = read_results(tmp_path / "results")
    assert run.suite == "cifar16_comparison"
    assert {*RENAMED.values()} <= {*suite_names()}
    assert not {*RENAMED} & {*suite_names()}


def test_there_is_no_such_folder(tmp_path):
    with pytest.raises(DataError, match=r"^there is no folder .*nowhere$"):
        read_results(tmp_path / "nowhere")


def test_the_command_tells_what_it_recorded_and_what_it_left_out(runs_dir, tmp_path):
    results = str(tmp_path / "results")
    command = [sys.executable, "-m", "analysis.collect", str(runs_dir), "--results", results]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = [line.split(": ")[0] for line in done.stdout.splitlines()]
    assert said == ["recorded"] * 3 + [f"in {results}"] + ["left out"] * 2
    edit(runs_dir / "a" / "summary.json", top1=91.0)
    seal(runs_dir / "a")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


def test_only_record_writes_to_the_repository(runs_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "RESULTS", tmp_path / "repository")
    monkeypatch.chdir(tmp_path)
    collect.main([str(runs_dir)])
    assert not (tmp_path / "repository").exists()
    collect.main([str(runs_dir), "--record"])
    assert contents(tmp_path / "repository") == contents(tmp_path / "results" / "recorded")


def test_the_command_writes_a_row_of_every_finished_run_and_records_nothing(
    runs_dir, tmp_path, capsys
):
    out = tmp_path / "out.csv"
    main([str(runs_dir), "--results", str(tmp_path / "results"), "--tidy", str(out)])
    assert "unfinished" in capsys.readouterr().err
    written = pd.read_csv(out)
    assert list(written.columns) == TIDY_COLUMNS
    assert list(written["method"]) == ["dense", "psap", "psap", "thin_plan"]
    assert not (tmp_path / "results").exists()
    with pytest.raises(SystemExit) as refused:
        main([str(runs_dir), "--tidy", str(tmp_path / "nowhere" / "out.csv")])
    assert refused.value.code == 2
    assert "nowhere" in capsys.readouterr().err
