"""Finished runs are read from their folders whole, or refused by the file and what is wrong in it."""

import json

import pytest
import yaml

from analysis.collect import read_runs
from analysis.results import TIDY_COLUMNS, NotFinishedError, read_run, tidy
from experiments.runs.files import DataError
from tests.analysis.runs import LAYERS, PULSE_SUSPENDED, seal, write_run


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", "psap", suite="table", cell="resnet20 psap 60", seed=3)


def edit(path, **values):
    """Change values of a JSON or YAML file; a dict value changes a section's values."""
    load = yaml.safe_load if path.suffix == ".yaml" else json.loads
    content = load(path.read_text())
    for key, value in values.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(content) if path.suffix == ".yaml" else json.dumps(content))


def refusal(folder):
    with pytest.raises(DataError) as caught:
        read_run(folder)
    return str(caught.value).replace(str(folder), "RUN")


def test_a_run_knows_its_place_its_plan_and_its_pulses(folder):
    run = read_run(folder)
    assert (run.suite, run.cell, run.seed, run.method) == ("table", "resnet20 psap 60", 3, "psap")
    assert run.provenance.commit == "0123456"
    last = json.loads((folder / "plans" / "epoch_0004.json").read_text())
    assert run.plan == last
    second = run.pulses.query("epoch == 2 and layer == 'conv1'")
    assert list(second["filter"]) == PULSE_SUSPENDED["filters"]
    assert list(second["utility"]) == [2 * utility for utility in PULSE_SUSPENDED["utility"]]
    assert list(second["restored"]) == [True, False, False]
    assert len(run.pulses) == 4 * len(LAYERS) * 3


def test_layers_stand_in_network_order_with_only_the_epochs_that_have_a_value(folder):
    ratios = read_run(folder).layers("prune_ratio")
    assert list(ratios.columns) == list(LAYERS)
    assert list(ratios.index) == [1, 2, 3, 4]
    assert ratios.loc[3, "layer1.0.conv2"] == pytest.approx(0.5)


def test_dense_runs_have_no_plan_and_empty_pulses(tmp_path):
    run = read_run(write_run(tmp_path / "run", "dense"))
    assert run.plan is None
    assert run.pulses.empty
    assert list(run.pulses.columns) == [
        "epoch",
        "layer",
        "filter",
        "utility",
        "standard_error",
        "restored",
    ]


def test_a_run_that_has_not_finished_is_refused(folder):
    (folder / "done").unlink()
    with pytest.raises(
        NotFinishedError, match=r"run is not the folder of a finished run: it has no file `done`$"
    ):
        read_run(folder)


FILES = [
    "summary.json",
    "manifest.json",
    "config.yaml",
    "metrics.jsonl",
    "plans/epoch_0004.json",
    "pulses/epoch_0002.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_as_it_was_written_is_refused_by_name(folder, name):
    path = folder / name
    text = path.read_text()
    path.write_text(text.replace("0", "1", 1))
    what = "it is not what the run wrote; copy the run again"
    assert refusal(folder) == f"RUN/{name} is damaged or was edited: {what}"
    path.unlink()
    assert refusal(folder) == f"RUN is half-written: {name} is missing; copy the run again"
    path.mkdir()
    assert refusal(folder) == f"RUN/{name} cannot be read: it is no plain file; copy the run again"


def test_a_newer_format_is_refused(folder):
    edit(folder / "summary.json", format=1)
    seal(folder)
    read_run(folder)
    edit(folder / "summary.json", format=2)
    seal(folder)
    assert (
        refusal(folder) == "RUN/summary.json was written by a newer version of this suite: update"
    )


def test_uncommitted_changes_show_in_the_commit(folder):
    edit(
        folder / "manifest.json",
        sessions=[
            {"started": "", "commit": "f" * 40},
            {"started": "", "commit": "a" * 40, "dirty_diff_sha256": "b" * 64},
        ],
    )
    seal(folder)
    assert read_run(folder).provenance.commit == "aaaaaaa+"


def test_all_runs_below_a_folder_in_a_stable_order(tmp_path):
    for name, cell, seed in (("a", "psap", 10), ("b", "psap", 2), ("c/d/e", "dense", 0)):
        write_run(tmp_path / name, cell, suite="table", cell=cell, seed=seed)
    assert [(run.cell, run.seed) for run in read_runs(tmp_path)] == [
        ("dense", 0),
        ("psap", 2),
        ("psap", 10),
    ]


def test_of_the_runs_below_a_folder_unfinished_ones_are_counted_and_damaged_ones_refused(
    tmp_path, capsys
):
    write_run(tmp_path / "a", "dense")
    (write_run(tmp_path / "b", "dense") / "done").unlink()
    (write_run(tmp_path / "c", "dense") / "done").unlink()
    assert len(read_runs(tmp_path)) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"left out: {tmp_path / 'b'} is not the folder of a finished run")
    assert said.endswith(", and 1 more\n")
    (tmp_path / "a" / "summary.json").unlink()
    with pytest.raises(DataError, match=r"a is half-written: summary\.json is missing"):
        read_runs(tmp_path)
    with pytest.raises(DataError, match=r"^there is no folder .*nowhere$"):
        read_runs(tmp_path / "nowhere")


def test_tidy_has_a_row_per_run(folder, tmp_path):
    frame = tidy([read_run(folder), read_run(write_run(tmp_path / "other", "dense", top1=93.0))])
    assert list(frame.columns) == TIDY_COLUMNS
    assert list(frame["method"]) == ["psap", "dense"]
    assert list(frame["top1"]) == [90.0, 93.0]
    assert list(frame["commit"]) == ["0123456"] * 2
    assert frame["device"][0] == "x86_64 CPU, 2 cores"
    assert frame["suite"][0] == "table"
    assert frame["suite"].isna()[1]
