"""`--help` teaches: what a command does, examples, every key with its value and its meaning."""

import re
import sys
from dataclasses import fields, is_dataclass

import pytest

from experiments import evaluate, export, schema, status, train
from experiments.help import key_meanings

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


def test_help_shows_the_values_of_what_is_chosen(monkeypatch, capsys):
    text = said(train.main, ["experiment=cifar10_resnet110", "method=sfp"], monkeypatch, capsys)
    assert re.search(r"optim.warmup_epochs=1 +epochs at warmup_lr\n", text)
    assert re.search(r"method.scope=all +which .* together \(coupled, all, inner\)\n", text)
    assert "method.kappa" not in text
    assert max(map(len, text.splitlines())) <= 160
