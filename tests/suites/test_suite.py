"""Suites: what a file means, what a run's command is, and where a run stands."""

import json
import os
import re

import pytest

from experiments import status, suite, train
from experiments.configuration import compose
from experiments.runs.done import write_done
from experiments.runs.folder import Record, State
from experiments.runs.identity import config_hash
from experiments.suites import launch, spec
from experiments.suites.runs import runs_of
from experiments.training.progress import SuiteProgress
from psap_core import InputError
from tests.helpers import SMALL, refusal

FILE = """
title: Two methods
seeds: [0, 3]
cells:
  - {name: dense, recipe: digits_resnet20, overrides: [method=dense]}
  - {name: thin, recipe: digits_resnet20, overrides: [method=thin, target_macs_cut=0.6]}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "two.yaml"
    path.write_text(FILE)
    return path


def said(main, arguments, monkeypatch, capsys) -> str:
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    main()
    return capsys.readouterr().out


def test_the_index_counts_cells_and_their_seeds(file, monkeypatch, capsys):
    runs = runs_of(str(file)).all
    assert [(run.cell.name, run.seed) for run in runs] == [
        ("dense", 0),
        ("dense", 3),
        ("thin", 0),
        ("thin", 3),
    ]
    shown = said(suite.main, ["show", file, 3, "epochs=2"], monkeypatch, capsys)
    wanted = ["experiment=digits_resnet20", "method=thin", "target_macs_cut=0.6", "seed=3"]
    assert shown.splitlines() == [*wanted, "suite='two'", "cell='thin'", "epochs=2"]


def test_one_run_by_its_index_and_where_it_stands(file, tmp_path, monkeypatch, capsys):
    extra = [
        *(override for override in SMALL if "experiment" not in override),
        "epochs=1",
        f"runs_dir={tmp_path}",
    ]
    listed = said(suite.main, ["status", file, *extra], monkeypatch, capsys)
    assert listed.endswith("two: 4 not launched\n")
    summary = json.loads(said(suite.main, ["run", file, 3, *extra], monkeypatch, capsys))
    assert [summary[key] for key in ("method", "seed", "suite", "cell")] == [
        "thin",
        3,
        "two",
        "thin",
    ]
    listed = said(suite.main, ["status", file, *extra], monkeypatch, capsys).splitlines()
    assert [line.split()[-1] for line in listed[:-1]] == [
        "launched",
        "launched",
        "launched",
        "done",
    ]
    assert listed[-1] == "two: 1 done, 3 not launched"
    run = runs_of(str(file), extra)[3]
    assert said(status.main, run.overrides, monkeypatch, capsys) == "done\n"
    again = file.with_name("again.yaml")
    again.write_text(FILE)
    listed = said(suite.main, ["status", again, *extra], monkeypatch, capsys).splitlines()
    assert listed[3].endswith("done: in the table of two, and in no other")
    planned = said(suite.main, ["plan", file, *extra], monkeypatch, capsys).splitlines()
    assert planned[3].endswith(f"{run.record.folder}")


def test_where_a_run_stands(tmp_path):
    cfg = compose("train", [*SMALL, f"runs_dir={tmp_path}"])
    record = Record(cfg)
    assert record.state is State.not_launched
    record.begin(cfg, {"device": "a GPU"})
    assert Record(cfg).state is State.running
    record.close()
    assert record.state is State.incomplete
    stops = []
    for _ in range(2):
        record.begin(cfg, {"device": "a GPU"})
        record.interrupt()
        record.close()
        assert record.state is State.interrupted
        stops.append(record.interrupted_at)
    assert stops[0] != stops[1]
    record.fail("no reason")
    assert (record.state, record.error) == (State.failed, "no reason")
    record.begin(cfg, {"device": "a GPU"})
    record.close()
    assert record.state is State.incomplete
    record.begin(cfg, {"device": "a GPU"})
    record.finish()
    record.close()
    assert record.state is State.done


def test_status_says_how_far_a_run_is(file, tmp_path, monkeypatch, capsys):
    extra = [f"runs_dir={tmp_path}", "epochs=7"]
    run = runs_of(str(file), extra)[2]
    run.record.begin(run.config, {"device": "a GPU"})
    run.record.metrics.write_text('{"epoch": 1}\n{"epoch": 2}\n')
    listed = said(suite.main, ["status", file, *extra], monkeypatch, capsys).splitlines()
    assert listed[2].endswith("running: 2 of 7 epochs")
    run.record.close()
    listed = said(suite.main, ["status", file, *extra], monkeypatch, capsys).splitlines()
    assert listed[2].endswith("incomplete: 2 of 7 epochs")


def test_an_interrupted_run_that_is_refused_when_continued_has_failed(tmp_path, monkeypatch):
    """A job that only asks whether it was interrupted would be requeued for ever."""
    record = Record(compose("train", [*SMALL, f"runs_dir={tmp_path}"]))
    record.begin(
        compose("train", [*SMALL, f"runs_dir={tmp_path}"]),
        {"device": "CPU", "data_sha256": "of other data"},
    )
    record.interrupt()
    record.close()
    assert "began with the data of" in refusal(
        train.main, [*SMALL, f"runs_dir={tmp_path}"], monkeypatch
    )
    assert record.state is State.failed


def test_one_run_that_cannot_be_looked_for_hides_no_other(tmp_path, monkeypatch, capsys):
    weights = tmp_path / "weights.safetensors"
    (tmp_path / "two.yaml").write_text(
        FILE.replace("method=dense", f"method=dense, model.weights={weights}")
    )
    extra = [tmp_path / "two.yaml", f"runs_dir={tmp_path / 'runs'}"]
    planned = said(suite.main, ["plan", *extra], monkeypatch, capsys).splitlines()
    assert planned[0].endswith(f"model.weights={weights} cannot be read: No such file or directory")
    listed = said(suite.main, ["status", *extra], monkeypatch, capsys).splitlines()
    assert "rejected: model.weights=" in listed[0]
    assert listed[-1] == "two: 2 rejected, 2 not launched"
    assert [run.cell.name for run in launch.pending(runs_of(str(extra[0]), extra[1:]))] == [
        "thin",
        "thin",
    ]


def test_a_run_of_a_suite_that_is_refused_remembers_why(file, tmp_path, monkeypatch, capsys):
    file.write_text(FILE.replace("target_macs_cut=0.6", "target_macs_cut=0.9999"))
    extra = [
        str(file),
        *(word for word in SMALL if "experiment" not in word),
        f"runs_dir={tmp_path / 'runs'}",
    ]
    refused = refusal(suite.main, ["run", extra[0], "3", *extra[1:]], monkeypatch)
    listed = said(suite.main, ["status", *extra], monkeypatch, capsys).splitlines()
    assert listed[3].endswith(f"rejected: {refused}")
    assert listed[-1] == "two: 1 rejected, 3 not launched"


def test_a_run_lives_in_one_suite_only():
    homes: dict[tuple[str, int], list[str]] = {}
    for name in spec.suite_names():
        for run in runs_of(name).all:
            homes.setdefault((str(spec.trained(run.cell)), run.seed), []).append(
                f"{name}: {run.cell.name}"
            )
    assert [found for found in homes.values() if len(found) > 1] == []


@pytest.mark.long
@pytest.mark.parametrize("name", spec.suite_names())
def test_every_cell_trains(name, tiny):
    """Two iterations each: two epochs of one batch."""
    cells = spec.read_suite(name).cells
    recipes = {cell.name: cell.recipe for cell in cells}
    for cell in sorted(cells, key=lambda cell: cell.plan_of is not None):  # plans first
        extra = tiny(cell.recipe, epochs=2, train_images=12, batch_size=8)
        (run, *_) = [run for run in runs_of(name, extra).all if run.cell == cell]
        folder = train.run(run.overrides)
        summary = json.loads((folder / "summary.json").read_text())
        assert (summary["suite"], summary["cell"], summary["epochs"]) == (name, cell.name, 2)
        assert recipes[summary["cell"]] == folder.parts[-3]


def test_a_part_of_a_suite_keeps_its_indices(file, tmp_path, monkeypatch, capsys):
    def listed(*options):
        lines = said(suite.main, ["plan", file, *options], monkeypatch, capsys).splitlines()
        return [line.split()[:4] for line in lines]

    assert listed("--cells", "th*", "--seeds", "3") == [["3", "thin", "seed", "3"]]
    assert listed("--seeds", "3,3") == [["1", "dense", "seed", "3"], ["3", "thin", "seed", "3"]]
    status = said(
        suite.main, ["status", file, "--cells", "*n*e", f"runs_dir={tmp_path}"], monkeypatch, capsys
    )
    assert status.endswith("two: 2 not launched\n")
    printed = said(
        suite.main, ["launch", file, "--launcher", "print", "--cells", "dense"], monkeypatch, capsys
    )
    assert [line.split("method=")[1].split()[0] for line in printed.splitlines()] == ["dense"] * 2
    for option, sentence in (
        ("--cells=dens", "--cells='dens' fits no cell of two"),
        ("--seeds=0,1", "--seeds=0,1: the seeds of two are 0,3, not '1'"),
        ("--seeds=", "not ''"),
    ):
        assert sentence in refusal(suite.main, ["plan", str(file), option], monkeypatch)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[]", "is no suite"),
        (FILE.split("cells")[0] + "cells: []", "at least one cell"),
        (
            FILE.replace("title: Two methods", ""),
            "it has cells, seeds, title, perhaps effects and reference",
        ),
        (
            FILE.replace("[method=dense]", "[method=thin_plan], plan_of: psap"),
            "from 'psap', which is no cell",
        ),
        (FILE.replace("[0, 3]", "[]"), "at least one cell and one seed"),
        (FILE.replace("[0, 3]", "[0.5]"), "a seed is an integer"),
        (FILE.replace("[0, 3]", "[0, 0]"), "twice"),
        (FILE.replace("name: thin", "name: dense"), "twice"),
        (
            FILE.replace("[method=dense]", "[method=thin_plan], plan_of: dense"),
            "which is no cell or takes one itself",
        ),
        (
            FILE.replace("method=dense", "method=thin, target_macs_cut=0.6"),
            "cells 'dense' and 'thin' train the same",
        ),
        (FILE.replace("name: thin", 'name: "it\'s"'), "must be words of letters"),
        (FILE.replace("name: thin", "name: a/b"), "must be words of letters"),
        (FILE.replace("recipe", "model"), "a cell has name, recipe, overrides and perhaps plan_of"),
        (FILE + "more: 1", "and nothing else"),
        (FILE.replace("Two methods", "[two]"), "its title is a text, not"),
        (
            FILE.replace("[method=dense]", "method=dense"),
            "are a list like .method=sfp., not 'method",
        ),
        (FILE.replace("[method=dense]", "[{method: dense}]"), "is key=value, not {'method'"),
        (FILE.replace("[method=dense]", "[dense]"), "is key=value, not 'dense'"),
        *(
            (
                FILE.replace("[method=dense]", f"[method=dense, {key}=1]"),
                f"'dense' sets {key.lstrip('+')}, which",
            )
            for key in ("seed", "suite", "cell", "experiment", "++seed")
        ),
        *(
            (FILE.replace("name: dense", f"name: dense, goal: {goal}"), "is no top-1 in percent")
            for goal in ("high", "true", "0.92", "912", ".nan", "'91'")
        ),
        (FILE + "effects: {pruning: [[dense, wide]]}", "'wide', which it compares, is no cell"),
        (FILE + "effects: {pruning: [[dense, thin, dense]]}", "an effect has pairs of cells"),
        (FILE + "effects: {pruning: []}", "an effect has pairs of cells"),
        (FILE + "effects: {pruning: [de]}", "an effect has pairs of cells"),
        (FILE + "effects: {pruning: [[dense, thin]]}", "needs a reference"),
        (FILE + "effects: [dense]", "is no suite"),
        ("seeds: [", "is no suite"),
    ],
)
def test_a_file_that_is_no_suite(content, sentence, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=sentence):
        spec.read_suite(str(path))


def test_a_study_compares_cells_with_its_reference_or_with_what_they_name_and_has_effects(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "title: mine\nseeds: [5]\nreference: a\neffects: {pruning: [[a, b], [c, b]]}\ncells:\n"
        "  - {name: a, recipe: cifar10_small, overrides: [method=psap]}\n"
        "  - {name: b, recipe: cifar10_small, overrides: [method=dense]}\n"
        "  - {name: c, recipe: cifar10_small, overrides: [method=l1], against: b}\n"
    )
    suite = spec.read_suite(str(path))
    against = [(cell.name, cell.against) for cell in suite.cells]
    assert against == [("a", None), ("b", "a"), ("c", "b")]
    assert suite.effects == {"pruning": [("a", "b"), ("c", "b")]}


def test_a_suite_or_run_that_does_not_exist(file, monkeypatch):
    said = refusal(suite.main, ["show", str(file), "4"], monkeypatch)
    assert "run 4 does not exist: the suite has runs 0 to 3" in said
    assert "must be one of ablation_table, cifar10_20_epochs, cifar10_schedules" in refusal(
        suite.main, ["status", "nothing"], monkeypatch
    )


def test_a_damaged_run_is_that_runs_state_and_is_left_alone(file, tmp_path, monkeypatch, capsys):
    extra = [file, f"runs_dir={tmp_path / 'runs'}"]
    runs = runs_of(str(file), extra[1:]).all
    folders = [run.record.folder for run in runs]
    for folder in folders:
        folder.mkdir(parents=True)
        write_done(folder, {})
    (folders[0] / "manifest.json").write_text("{")
    (folders[1] / "summary.json").write_text("{")
    (folders[2] / "done").write_bytes(b"")  # and the fourth has no summary
    listed = said(suite.main, ["status", *extra], monkeypatch, capsys).splitlines()
    names = [
        "manifest.json is damaged",
        "summary.json is damaged",
        "done is damaged",
        "no summary.json",
    ]
    for line, name in zip(listed, names, strict=False):
        assert re.search(f"damaged: .*{name}", line)
    assert listed[-1] == "two: 4 damaged"
    assert said(suite.main, ["launch", *extra, "--launcher", "print"], monkeypatch, capsys) == ""


def a_pipe(path):
    os.mkfifo(path)


def a_folder(path):
    path.mkdir()


def no_text(path):
    path.write_bytes(b"\xff\xfe")


def a_huge_file(path):
    path.touch()
    os.truncate(path, 2**40)


@pytest.mark.parametrize("plant", [a_pipe, a_folder, no_text, a_huge_file])
@pytest.mark.parametrize(
    "name", ["failed", "interrupted", "done", "manifest.json", "metrics.jsonl"]
)
def test_whatever_lies_in_a_runs_folder_neither_ends_nor_delays_status(
    name, plant, file, tmp_path, monkeypatch, capsys
):
    extra = [f"runs_dir={tmp_path / 'runs'}"]
    folder = runs_of(str(file), extra)[0].record.folder
    folder.mkdir(parents=True)
    plant(folder / name)
    listed = said(suite.main, ["status", file, *extra], monkeypatch, capsys).splitlines()
    assert len(listed) == 5
    assert listed[1].endswith("not launched")
    with SuiteProgress({folder / "metrics.jsonl": 4}):
        pass


def test_a_suite_may_be_called_as_numbers_and_constants_are(tmp_path):
    for name in ("null", "1e3", "1_0", "true"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(FILE)
        for run in runs_of(str(path)).all:
            assert compose("train", run.overrides).suite == run.config.suite == name


def test_aliases_in_a_suite_stand_for_no_more_than_the_memory_holds(file, monkeypatch):
    bomb = "a0: &a0 [x]\n" + "".join(
        f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 10)
    )
    file.write_text(FILE + bomb)
    assert "it has an alias, *a0" in refusal(suite.main, ["plan", str(file)], monkeypatch)


@pytest.mark.parametrize("override", ["seed=5", "++seed=5"])
def test_a_suite_sets_the_seed_itself(override, file, monkeypatch):
    assert f"{override}: the suite sets seed itself" in refusal(
        suite.main, ["status", str(file), override], monkeypatch
    )


def test_a_folder_may_follow_the_seed(file):
    for run in runs_of(str(file), ["runs_dir=/x/${seed}"]).all:
        assert run.record.folder == Record(compose("train", run.overrides)).folder


def test_two_cells_that_train_the_same_in_other_words_are_refused(file, monkeypatch):
    again = "{name: again, recipe: digits_resnet20, overrides: [method=dense, optim.lr=0.1]}"
    file.write_text(FILE.replace("cells:", f"cells:\n  - {again}"))
    for command in (["status"], ["plan"], ["launch", "--launcher", "print"]):
        name, *options = command
        sentence = refusal(suite.main, [name, str(file), *options], monkeypatch)
        assert "cells 'again' and 'dense' train the same: leave one out" in sentence


def test_a_run_of_any_seed_has_the_configuration_of_its_command(file):
    for run in runs_of(str(file), ["epochs=3"]).all:
        assert run.config == compose("train", run.overrides)
        assert run.record.config_hash == config_hash(run.config)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "it has title, seeds and cells"),
        ("3", "it has title, seeds and cells"),
        ("[" * 9000, "it is nested more than 50 times"),
        ("title: x\nseeds: 3\ncells: []", "its seeds are a list like"),
        ("title: x\nseeds: [0]\ncells: {a: b}", "its cells are a list like"),
        ("title: x\nseeds: [0]\ncells: [a]", "a cell has name, recipe, overrides"),
        (FILE + "effects: 3\n", "its effects are named pairs"),
        (FILE.replace("name: thin", "name: ../thin"), "must be words of letters"),
        (FILE.replace("method=thin", "hydra.run.dir=x"), "Hydra's own settings are not changed"),
    ],
)
def test_a_file_that_is_no_suite_is_refused(content, sentence, file, monkeypatch):
    file.write_text(content)
    assert sentence in refusal(suite.main, ["status", str(file)], monkeypatch)


def test_a_pipe_is_no_suite(file, monkeypatch):
    file.unlink()
    os.mkfifo(file)
    assert "is no plain file" in refusal(suite.main, ["status", str(file)], monkeypatch)


def test_a_suite_has_the_name_of_a_folder(file, monkeypatch):
    other = file.with_name(".hidden.yaml")
    file.rename(other)
    assert "its file's name, '.hidden', must be words" in refusal(
        suite.main, ["status", str(other)], monkeypatch
    )
