import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from analysis.collect import (
    CAME_LATER,
    TIDY_COLUMNS,
    DataError,
    NotFinishedError,
    main,
    read_run,
    read_runs,
    record,
    tidy,
)
from experiments.runs.identity import CAME_LATER as LEFT_OUT
from tests.analysis.runs import LAYERS, PULSE_SUSPENDED, write_run


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", "psap", suite="table", cell="resnet20 psap 60", seed=3)


def edit(path, **values):
    """Change values of a JSON or YAML file; a dict value changes a section's values."""
    content = yaml.safe_load(path.read_text())
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
    assert run.commit == "0123456"
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


def test_older_runs_are_read(folder):
    for name, keys in {
        "summary": ("suite", "cell", "start_top1"),
        "manifest": ("identity",),
    }.items():
        path = folder / f"{name}.json"
        content = {k: v for k, v in json.loads(path.read_text()).items() if k not in keys}
        path.write_text(json.dumps(content))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(
        yaml.safe_dump({k: v for k, v in config.items() if k not in ("suite", "cell")})
    )
    shutil.rmtree(folder / "pulses")
    run = read_run(folder)
    assert (run.suite, run.cell) == (None, None)


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


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        *(
            ("summary.json", key, value)
            for key in (
                "top1",
                "top5",
                "masked_top1",
                "start_top1",
                "macs_cut",
                "macs",
                "params",
                "train_macs",
                "train_seconds",
                "prune_seconds",
                "epochs",
                "seed",
                "image_size",
                "train_images",
            )
            for value in (float("nan"), float("inf"), -1, "90", True, [90])
        ),
        *(
            ("summary.json", key, None)
            for key in ("top1", "masked_top1", "macs_cut", "params", "train_macs", "epochs")
        ),
        *(
            ("summary.json", key, 900)
            for key in ("top1", "top5", "masked_top1", "start_top1", "macs_cut")
        ),
        *(("summary.json", key, 1.5) for key in ("epochs", "seed", "params", "format")),
        *(
            ("summary.json", key, 5)
            for key in ("dataset", "model", "method", "suite", "cell", "config_hash")
        ),
        *(("summary.json", "format", value) for value in ("1", True, [1])),
        *(
            ("manifest.json", "sessions", value)
            for value in ([], {}, None, "none", [1], [{"commit": 5}])
        ),
        *(("manifest.json", key, []) for key in ("seed", "device", "config_hash", "identity")),
        *(("config.yaml", key, "x") for key in ("epochs", "data", "model", "method")),
        ("config.yaml", "method", {"name": "psap", "target_macs_cut": "much"}),
        *(
            ("plans/epoch_0004.json", "layers", value)
            for value in (
                [],
                {},
                None,
                [1],
                [{"name": "conv1", "filters": 16}],
                [{"name": "conv1", "filters": 0, "pruned": []}],
                [{"name": "conv1", "filters": 16, "pruned": 3}],
                [{"name": 1, "filters": 16, "pruned": []}],
            )
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_its_file_and_name(folder, name, key, value):
    content = yaml.safe_load((folder / name).read_text()) | {key: value}
    (folder / name).write_text(
        yaml.safe_dump(content) if name.endswith("yaml") else json.dumps(content)
    )
    assert (
        refusal(folder)
        == f"RUN/{name} is damaged: {key} cannot be {value!r:.60}; copy the run again"
    )


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
            "config.yaml",
            {"optim": {"lr": 0.2}},
            "optim differs between config.yaml and the identity in manifest.json",
        ),
        (
            "config.yaml",
            {"epochs": 9},
            "epochs differs between config.yaml and the identity in manifest.json",
        ),
        (
            "config.yaml",
            {"cell": "other"},
            "cell is other in config.yaml and resnet20 psap 60 in summary.json",
        ),
        (
            "summary.json",
            {"suite": "mine"},
            "suite is table in config.yaml and mine in summary.json",
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


def test_a_setting_that_came_later_may_stand_in_the_configuration_alone(folder):
    """The identity leaves it out where it is what runs had before; any other value is of another run."""
    edit(folder / "config.yaml", method={"scope": "all", "round_to": 1})
    assert read_run(folder).config["method"]["scope"] == "all"
    for setting in ({"scope": "coupled"}, {"scope": "all", "round_to": 8}):
        edit(folder / "config.yaml", method=setting)
        assert "method differs between config.yaml and the identity" in refusal(folder)


def test_what_came_later_is_what_a_runs_identity_leaves_out():
    left_out = {}
    for settings in LEFT_OUT.values():
        left_out |= settings
    assert {"method": left_out} == CAME_LATER


def test_a_hash_that_is_not_the_contents_is_refused(folder):
    found = read_run(folder).summary["config_hash"]
    edit(folder / "summary.json", config_hash="00000000")
    assert f"config_hash is 00000000 in summary.json and {found} in manifest.json" in refusal(
        folder
    )
    edit(folder / "manifest.json", config_hash="00000000")
    assert f"config_hash is 00000000 and the identity in manifest.json has {found}" in refusal(
        folder
    )


@pytest.mark.parametrize(
    ("section", "name"), [("data", "root"), ("model", "weights"), ("method", "run")]
)
def test_paths_may_differ(tmp_path, section, name):
    folder = write_run(tmp_path / "run", "thin_plan", weights="w.safetensors")
    edit(folder / "config.yaml", **{section: {name: "elsewhere"}})
    read_run(folder)


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
        sessions=[{"commit": "f" * 40}, {"commit": "a" * 40, "dirty_diff_sha256": "b" * 64}],
    )
    assert read_run(folder).commit == "aaaaaaa+"


def test_all_runs_below_a_folder_in_a_stable_order(tmp_path):
    for name, cell, seed in (("a", "psap", 10), ("b", "psap", 2), ("c/d/e", "dense", 0)):
        write_run(tmp_path / name, cell, suite="table", cell=cell, seed=seed)
    assert [(run.cell, run.seed) for run in read_runs(tmp_path)] == [
        ("dense", 0),
        ("psap", 2),
        ("psap", 10),
    ]


def test_of_the_runs_below_a_folder_unfinished_ones_are_reported_and_damaged_ones_refused(tmp_path):
    write_run(tmp_path / "a", "dense")
    (write_run(tmp_path / "b", "dense") / "done").unlink()
    with pytest.warns(UserWarning, match="^left out: .*b is not the folder of a finished run"):
        assert len(read_runs(tmp_path)) == 1
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


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def runs_dir(tmp_path):
    runs = tmp_path / "runs"
    write_run(
        runs / "a", "psap", suite="table", cell="resnet20 psap 60", weights="resnet20.safetensors"
    )
    write_run(runs / "b", "thin_plan", suite="table", cell="resnet20 thin_plan 60")
    write_run(runs / "alone", "dense")
    (write_run(runs / "unfinished", "dense", suite="table", cell="dense") / "done").unlink()
    return runs


def test_recording_keeps_what_analysis_reads_and_no_path_of_the_machine(runs_dir, tmp_path):
    results = tmp_path / "results"
    recorded, left_out = record(runs_dir, results)
    assert [str(place.relative_to(results)) for place in recorded] == [
        "table/resnet20_psap_60/seed0",
        "table/resnet20_thin_plan_60/seed0",
    ]
    assert left_out == [
        f"{runs_dir / 'unfinished'} is not the folder of a finished run: it has no file `done`",
        f"{runs_dir / 'alone'} belongs to no suite",
    ]
    psap, thin = map(contents, recorded)
    for data in (*psap.values(), *thin.values()):
        assert b"/data/" not in data
        assert str(tmp_path).encode() not in data
    assert sorted(map(str, psap)) == sorted(
        [
            "config.yaml",
            "done",
            "manifest.json",
            "metrics.jsonl",
            "plans/epoch_0004.json",
            "summary.json",
        ]
        + [f"pulses/epoch_000{epoch}.json" for epoch in range(1, 5)]
    )
    original, again = read_run(runs_dir / "a"), read_run(recorded[0])
    assert again.summary == original.summary | {"format": 1}
    assert again.config["model"]["weights"] == "resnet20.safetensors"
    assert read_run(recorded[1]).config["method"]["run"] == "cifar10_resnet20/0123abcd/seed0"
    assert again.plan == original.plan
    pd.testing.assert_frame_equal(again.metrics, original.metrics)
    pd.testing.assert_frame_equal(again.pulses, original.pulses)
    assert [set(session) for session in again.manifest["sessions"]] == [
        {"started", "commit", "dirty_diff_sha256"}
    ]


def test_recording_again_changes_nothing(runs_dir, tmp_path):
    results = tmp_path / "results"
    first = record(runs_dir, results)
    before = contents(results)
    assert record(runs_dir, results) == first
    assert contents(results) == before


def test_another_run_in_a_recorded_place_is_refused_and_nothing_is_written(runs_dir, tmp_path):
    results = tmp_path / "results"
    record(runs_dir, results)
    before = contents(results)
    edit(runs_dir / "a" / "summary.json", top1=91.0)
    write_run(runs_dir / "new", "sfp", suite="table", cell="aaa")
    place = results / "table" / "resnet20_psap_60" / "seed0"
    with pytest.raises(DataError) as caught:
        record(runs_dir, results)
    assert str(caught.value) == (
        f"{place} records another run than {runs_dir / 'a'}: move it away, nothing is overwritten"
    )
    assert contents(results) == before


def test_two_runs_of_one_place_are_refused(runs_dir, tmp_path):
    write_run(runs_dir / "twin", "psap", top1=80.0, suite="table", cell="resnet20 psap 60")
    with pytest.raises(
        DataError,
        match=r"a and .*twin are different runs of the same suite, cell and seed: move one",
    ):
        record(runs_dir, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_a_recording_that_was_cut_short_leaves_nothing_that_is_read(
    runs_dir, tmp_path, monkeypatch
):
    results = tmp_path / "results"
    monkeypatch.setattr(
        "pathlib.Path.rename", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        record(runs_dir, results)
    assert contents(results) == {}


def test_what_a_killed_recording_left_behind_is_not_read(runs_dir, tmp_path):
    (place, *_), _ = record(runs_dir, tmp_path / "results")
    shutil.copytree(place, place.with_name(".tmpabc"))
    assert len(read_runs(tmp_path / "results")) == 2


def test_the_command_tells_what_it_recorded_and_what_it_left_out(runs_dir, tmp_path):
    command = [
        sys.executable,
        "-m",
        "analysis.collect",
        str(runs_dir),
        "--results",
        str(tmp_path / "results"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == ["recorded"] * 2 + [
        "left out"
    ] * 2
    edit(runs_dir / "a" / "summary.json", top1=91.0)
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert refused.stderr.count("\n") == 1


def test_the_command_writes_a_row_of_every_finished_run_and_records_nothing(
    runs_dir, tmp_path, capsys
):
    with pytest.warns(UserWarning, match="^left out: .*unfinished"):
        main(
            [
                str(runs_dir),
                "--results",
                str(tmp_path / "results"),
                "--tidy",
                str(tmp_path / "out.csv"),
            ]
        )
    written = pd.read_csv(tmp_path / "out.csv")
    assert list(written.columns) == TIDY_COLUMNS
    assert list(written["method"]) == ["dense", "psap", "thin_plan"]
    assert not (tmp_path / "results").exists()
    with pytest.raises(SystemExit) as refused, pytest.warns(UserWarning, match="left out"):
        main([str(runs_dir), "--tidy", str(tmp_path / "nowhere" / "out.csv")])
    assert refused.value.code == 2
    assert "nowhere" in capsys.readouterr().err
