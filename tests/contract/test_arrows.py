"""Who may import whom, and what the core must not do."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import psap_core
from psap_core import api

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "psap_core").glob("*.py"))
OURS = {"psap_core", "experiments", "analysis", "tests"}
NO_CODE = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
}


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def test_the_core_imports_the_standard_library_torch_and_safetensors_only():
    allowed = sys.stdlib_module_names | {"torch", "safetensors", "psap_core"}
    assert set.union(*map(packages, CORE)) <= allowed


def test_experiments_import_the_core_and_nothing_else_of_ours():
    assert set.union(*map(packages, files("experiments"))) & OURS == {"experiments", "psap_core"}


def test_analysis_reads_files_only():
    forbidden = {"torch", "torchvision", "wandb", "wandb_workspaces", "psap_core", "experiments", "tests"}
    used = {path.name: packages(path) & forbidden for path in files("analysis")}
    assert {name: found for name, found in used.items() if found} == {"wandb_view.py": {"wandb", "wandb_workspaces"}}


def test_wandb_is_imported_in_one_module_of_the_harness():
    with_wandb = [path for path in files("experiments") if "wandb" in packages(path)]
    assert [path.parent.name for path in with_wandb] == ["harness"]


def test_commands_that_only_look_import_no_torch():
    """Help, finished runs, and where the runs of a suite stand."""
    commands = ("train", "status", "suite", "launch", "benchmark")
    modules = ", ".join(f"experiments.{command}" for command in commands)
    heavy = {"torch", "torchvision", "sklearn", "wandb"}
    code = f"import sys, psap_core.errors, {modules}; print({{*sys.modules}} & {heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "set()\n"


def test_the_core_offers_its_names():
    assert psap_core.__all__ == api.__all__
    assert all(getattr(psap_core, name) is getattr(api, name) for name in api.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = psap_core.nothing


def test_the_core_prints_nothing():
    calls = [
        f"{path.name}:{node.lineno}"
        for path in CORE
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []
    assert not {"logging", "warnings", "sys"} & set.union(*map(packages, CORE))


def code_lines(source: str) -> int:
    """Lines that hold code: no comment, no blank, no docstring."""
    tree = ast.parse(source)
    docstrings = set()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            text = body[0].value
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                docstrings |= set(range(text.lineno, text.end_lineno + 1))
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("", 0),
        ('"""Doc."""\n\n# comment\nx = 1  # note\n', 1),
        ('def f():\n    """Doc\n    more."""\n    return """text\nof two lines"""\n', 3),
    ],
)
def test_code_lines_counts_code(source, lines):
    assert code_lines(source) == lines


def test_the_core_stays_under_900_lines_of_code():
    assert sum(code_lines(path.read_text()) for path in CORE) < 900


def test_no_module_hides_what_the_core_offers():
    assert not {path.stem for path in CORE} & {*api.__all__}
