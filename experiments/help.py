"""What a command says to `--help`: what it does, what may be chosen, and every key with its value and its meaning."""

import ast
import inspect
import io
import textwrap
import tokenize
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, EnumNode, OmegaConf

from experiments import schema

WIDTH = 40  # of a key with its value
LINE = 120


def help_text(about: str, config: DictConfig, conf: Path) -> str:
    """All of it.

    Args:
        about: what the command does, with examples.
        config: the composed configuration; values may be missing.
        conf: folder whose folders are the groups.
    """
    lines = [about.strip(), "", "Choices, as in method=psap:"]
    for group in groups(config, conf):
        lines += _wrapped(f"{group}: {', '.join(options(conf, group))}")
    lines += [
        "",
        "Keys, with their present values (choices before --help change them), as in seed=1:",
    ]
    lines += _key_lines(config, "")
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, LINE, initial_indent="  ", subsequent_indent="    ")


def groups(config: DictConfig, conf: Path) -> list[str]:
    """The groups of files that this configuration takes its parts from, the recipes first."""
    found = [str(key) for key in config if any((conf / str(key)).glob("*.yaml"))]
    is_a_run = "epochs" in config
    return ["experiment", *found] if is_a_run else found


def options(conf: Path, group: str) -> list[str]:
    """What may be chosen of a group."""
    return sorted(path.stem for path in (conf / group).glob("*.yaml"))


def _key_lines(config: DictConfig, path: str) -> list[str]:
    kind = OmegaConf.get_type(config)
    meanings = key_meanings(kind) if is_dataclass(kind) else {}
    own: list[str] = []
    below: list[str] = []
    for key in map(str, config):
        node: Any = config._get_node(key)
        name = f"{path}{key}"
        if name == "method.figures":
            continue
        if isinstance(node, DictConfig):
            below += _key_lines(node, f"{name}.")
        else:
            assignment = f"{name}={_shown(config, key)}"
            meaning = meanings.get(key, "")
            if isinstance(node, EnumNode):
                meaning = f"{meaning} ({', '.join(node.enum_type.__members__)})"
            own.append(f"  {assignment:{WIDTH}}  {meaning}".rstrip())
    return own + below


def _shown(config: DictConfig, key: str) -> str:
    """A key's value as one would write it; `...` where one has to."""
    if OmegaConf.is_missing(config, key):
        return "..."
    value = config[key]
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)


@cache
def key_meanings(kind: type) -> dict[str, str]:
    """By key of a dataclass of the schema the comment that stands beside it, or above it."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base) and base.__module__ == schema.__name__:
            meanings |= _meanings_in(inspect.getsource(base))
    return {field.name: meanings.get(field.name, "") for field in fields(kind)}


def _meanings_in(source: str) -> dict[str, str]:
    beside: dict[int, str] = {}
    above: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            is_alone = token.line.lstrip().startswith("#")
            place = above if is_alone else beside
            place[token.start[0]] = token.string.lstrip("# ").rstrip(".")
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            line = statement.lineno
            found[statement.target.id] = beside.get(line) or above.get(line - 1, "")
    return found
