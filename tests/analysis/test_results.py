"""Finished runs are read from their folders whole, or refused by the file and what is wrong in it."""

import json
import shutil

import pytest
import yaml

from analysis.collect import read_runs
from analysis.results import TIDY_COLUMNS, NotFinishedError, read_run, tidy
from experiments.runs.files import DataError
from tests.analysis.runs import LAYERS, PULSE_SUSPENDED, write_run


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


@pytest.mark.parametrize("name", ["summary.json", "manifest.json", "config.yaml", "metrics.jsonl"])
def test_a_missing_file_is_refused_by_name(folder, name):
    (folder / name).unlink()
    assert refusal(folder) == f"RUN is half-written: {name} is missing; copy it again"


def test_a_missing_plan_is_refused(folder):
    shutil.rmtree(folder / "plans")
    assert refusal(folder) == "RUN is half-written: it has no plan in plans/; copy it again"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("summary.json", "it cannot be read"),
        ("manifest.json", "it cannot be read"),
        ("config.yaml", "it cannot be read"),
        ("plans/epoch_0004.json", "it cannot be read"),
        ("pulses/epoch_0002.json", "it cannot be read"),
        ("metrics.jsonl", "a line is no epoch's values"),
    ],
)
def test_a_file_that_was_cut_short_is_refused_by_name(folder, name, why):
    text = (folder / name).read_text().rstrip()
    (folder / name).write_text(
        text[: len(text) // 3] + "\n{" if name.endswith("yaml") else text[:-3]
    )
    assert refusal(folder) == f"RUN/{name} is damaged: {why}; copy the run again"


@pytest.mark.parametrize("rows", [slice(0, 7), slice(1, 8), slice(0, 0)])
def test_metrics_without_an_epoch_are_refused(folder, rows):
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[rows]))
    assert "RUN/metrics.jsonl is damaged: " in refusal(folder)


@pytest.mark.parametrize("epochs", [1, 8])
def test_an_epoch_without_accuracy_is_refused(folder, epochs):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    less = [
        json.dumps({key: value for key, value in json.loads(line).items() if key != "eval/top1"})
        for line in lines
    ]
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:-epochs], *less[-epochs:]]))
    assert (
        refusal(folder)
        == "RUN/metrics.jsonl is damaged: an epoch has no 'eval/top1'; copy the run again"
    )


def test_files_without_what_is_needed_are_refused(folder):
    (folder / "pulses" / "epoch_0002.json").write_text('{"conv1": {"filters": [0], "utility": []}}')
    assert (
        refusal(folder)
        == "RUN/pulses/epoch_0002.json is damaged: it holds no pulse; copy the run again"
    )
    for pulse in (
        "[]",
        '{"conv1": 5}',
        json.dumps({"conv1": PULSE_SUSPENDED | {"restored": 0}}),
        json.dumps({"conv1": PULSE_SUSPENDED | {"utility": ["a", "b", "c"], "restored": [0]}}),
    ):
        (folder / "pulses" / "epoch_0002.json").write_text(pulse)
        assert "RUN/pulses/epoch_0002.json is damaged: it holds no " in refusal(folder)
    (folder / "plans" / "epoch_0004.json").write_text("{}")
    assert (
        refusal(folder)
        == "RUN/plans/epoch_0004.json is damaged: it has no 'layers'; copy the run again"
    )
    (folder / "summary.json").write_text("[]")
    assert (
        refusal(folder)
        == "RUN/summary.json is damaged: it holds no names and values; copy the run again"
    )


NUMBERS = (
    *("top1", "top5", "masked_top1", "start_top1", "macs_cut", "macs", "params", "train_macs"),
    *("train_seconds", "prune_seconds", "epochs", "image_size", "train_images", "test_images"),
)
NO_LAYERS = (
    *([], {}, None, [1]),
    [{"name": "conv1", "filters": 16}],
    [{"name": "conv1", "filters": 0, "pruned": []}],
    [{"name": "conv1", "filters": 16, "pruned": 3}],
    [{"name": 1, "filters": 16, "pruned": []}],
)
IMPOSSIBLE = {
    "summary.json": {
        **{key: (float("nan"), float("inf"), -1, "90", True, [90]) for key in NUMBERS},
        **dict.fromkeys(("dataset", "model", "method", "suite", "cell", "config_hash"), (5,)),
        "seed": (1.5, "3", None),
        "format": ("1", True, [1], 1.5),
    },
    "manifest.json": {
        "sessions": ([], {}, None, "none", [1], [{"commit": 5}]),
        **{key: ([],) for key in ("seed", "device", "config_hash", "identity", "world_size")},
    },
    "config.yaml": {"name": (5, None), "seed": ("x",)},
    "plans/epoch_0004.json": {"layers": NO_LAYERS},
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_value_that_cannot_be_is_refused_by_its_file_and_name(folder, name):
    whole = (folder / name).read_text()
    for key, values in IMPOSSIBLE[name].items():
        for value in values:
            load, dump = json.loads, json.dumps
            if name.endswith("yaml"):
                load, dump = yaml.safe_load, yaml.safe_dump
            (folder / name).write_text(dump(load(whole) | {key: value}))
            why = f"{key} cannot be {value!r:.60}"
            assert refusal(folder) == f"RUN/{name} is damaged: {why}; copy the run again"


@pytest.mark.parametrize("key", ["top1", "top5", "masked_top1", "macs_cut"])
def test_a_share_or_percentage_beyond_the_whole_is_refused(folder, key):
    edit(folder / "summary.json", **{key: 900})
    assert f"{key} cannot be 900" in refusal(folder)


@pytest.mark.parametrize(
    "line", ["5", "null", "[1]", '{"epoch": 8, "train/loss": "low"}', '{"epoch": 8, "a": true}']
)
def test_a_line_of_metrics_that_holds_no_numbers_is_refused(folder, line):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:-1], line]))
    assert (
        refusal(folder)
        == "RUN/metrics.jsonl is damaged: a line is no epoch's values; copy the run again"
    )


@pytest.mark.parametrize(
    "name",
    [
        "summary.json",
        "manifest.json",
        "config.yaml",
        "metrics.jsonl",
        "plans/epoch_0004.json",
        "pulses/epoch_0002.json",
    ],
)
def test_a_folder_in_a_files_place_is_refused(folder, name):
    (folder / name).unlink()
    (folder / name).mkdir()
    assert refusal(folder) == f"RUN/{name} cannot be read: Is a directory; copy the run again"


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        (
            "summary.json",
            {"method": "sfp"},
            "method is sfp in the summary and psap in the configuration",
        ),
        (
            "config.yaml",
            {"cell": "other"},
            "cell is resnet20 psap 60 in summary.json and other in config.yaml",
        ),
        (
            "summary.json",
            {"suite": "mine"},
            "suite is mine in summary.json and table in config.yaml",
        ),
        ("summary.json", {"seed": 4}, "seed is 4 in summary.json and 3 in manifest.json"),
    ],
)
def test_what_was_edited_by_hand_or_mixed_is_refused(folder, name, change, what):
    edit(folder / name, **change)
    assert (
        refusal(folder)
        == f"RUN was edited by hand or mixed from two runs: {what}; copy or train it again"
    )


def test_a_hash_that_is_not_the_contents_is_refused(folder):
    found = read_run(folder).summary.config_hash
    edit(folder / "summary.json", config_hash="00000000")
    assert f"config_hash is 00000000 in summary.json and {found} in manifest.json" in refusal(
        folder
    )
    edit(folder / "manifest.json", config_hash="00000000")
    assert f"config_hash is 00000000 and the identity in manifest.json has {found}" in refusal(
        folder
    )


def test_a_newer_format_is_refused(folder):
    edit(folder / "summary.json", format=1)
    read_run(folder)
    edit(folder / "summary.json", format=2)
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
