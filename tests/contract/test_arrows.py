"""Who may import whom, and what the core must not do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import psap_core
from psap_core import api

ROOT = Path(__file__).parents[2]
CORE = sorted((ROOT / "psap_core").glob("*.py"))
OURS = {"psap_core", "experiments", "analysis", "tests"}


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
    forbidden = {
        "torch",
        "torchvision",
        "wandb",
        "wandb_workspaces",
        "psap_core",
        "experiments",
        "tests",
    }
    used = {path.name: packages(path) & forbidden for path in files("analysis")}
    assert {name: found for name, found in used.items() if found} == {
        "wandb_view.py": {"wandb", "wandb_workspaces"}
    }


def test_wandb_is_imported_in_one_module_only():
    with_wandb = [path for path in files("experiments") if "wandb" in packages(path)]
    assert [path.parent.name for path in with_wandb] == ["training"]


def test_commands_that_only_look_import_no_torch():
    """Help, finished runs, and where the runs of a suite stand."""
    commands = ("train", "status", "suite", "launch", "benchmark")
    modules = ", ".join(f"experiments.{command}" for command in commands)
    heavy = {"torch", "torchvision", "sklearn", "wandb"}
    code = f"import sys, psap_core.errors, {modules}; print({{*sys.modules}} & {heavy})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
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
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert calls == []
    assert not {"logging", "warnings", "sys"} & set.union(*map(packages, CORE))


def test_no_module_hides_what_the_core_offers():
    assert not {path.stem for path in CORE} & {*api.__all__}
