"""`--help` teaches: what a command does, examples, every key with its value and its meaning."""

import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from experiments import evaluate, export, schema, status, train
from experiments.help import key_meanings

ROOT = Path(__file__).parents[2]
SCHEMAS = [kind for kind in vars(schema).values() if isinstance(kind, type) and is_dataclass(kind)]


def said(main, words, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["command", *words, "--help"])
    main()
    return capsys.readouterr().out


@pytest.mark.parametrize("kind", SCHEMAS, ids=lambda kind: kind.__name__)
def test_every_key_has_a_meaning(kind):
    parts = {name for name, meaning in key_meanings(kind).items() if not meaning}
    sections = {field.name for field in fields(kind) if is_dataclass(field.type)}
    assert parts <= sections


@pytest.mark.parametrize("command", [train, evaluate, export, status])
def test_help_has_examples_and_no_schema(command, monkeypatch, capsys):
    text = said(command.main, [], monkeypatch, capsys)
    assert text.startswith(command.__doc__.splitlines()[0])
    assert len(re.findall(r"^    (?:python -m|torchrun)", text, re.M)) >= 3
    assert "_schema" not in text
    assert "runtime.device=auto" in text


def test_help_says_what_of_a_folder_of_images_is_part_of_a_runs_identity(monkeypatch, capsys):
    own = said(train.main, ["experiment=image_folder"], monkeypatch, capsys)
    assert re.search(r"data.root=\.\.\. .*names and sizes are part of a run's identity", own)
    digits = said(train.main, ["experiment=digits_resnet20"], monkeypatch, capsys)
    assert "where it lies is no part of a run's identity" in digits


def test_help_of_status_says_how_a_run_is_named_and_who_lists_many(monkeypatch, capsys):
    text = said(status.main, [], monkeypatch, capsys)
    assert "there is no run=<folder> here" in text
    assert "`python -m experiments.suite status <suite>`" in text


def test_help_shows_the_values_of_what_is_chosen(monkeypatch, capsys):
    text = said(train.main, ["experiment=cifar10_resnet110", "method=sfp"], monkeypatch, capsys)
    assert re.search(r"optim.warmup_epochs=1 +epochs at warmup_lr\n", text)
    assert re.search(r"method.scope=all +which .* together \(coupled, all, inner\)\n", text)
    assert "method.kappa" not in text
    assert max(map(len, text.splitlines())) <= 160


def test_an_unknown_option_is_named_with_what_was_meant(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "--hlep"])
    with pytest.raises(SystemExit) as left:
        train.main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said == "error: --hlep: there is no such option; did you mean --help?\n"


def test_a_reader_may_leave_before_the_end():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "experiments.train", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == ""
