"""Who may import whom, and what the core must not do."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
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


def test_examples_import_what_a_user_imports():
    assert set.union(*map(packages, files("examples"))) & OURS == {"psap_core"}
    ours = {name for path in files("examples") for name in imports(path) if "psap_core" in name}
    assert ours - {f"psap_core.{name}" for name in api.__all__} == {"psap_core"}


def test_analysis_knows_runs_and_suites_and_no_torch():
    """Of the experiments it sees what a run leaves behind and what a suite is; nothing that trains."""
    allowed = ("experiments.runs", "experiments.suites", "experiments.exits")
    for path in files("analysis"):
        ours = {name for name in imports(path) if name.split(".")[0] in ("experiments", "tests")}
        ours.discard(
            "experiments"
        )  # whose face refuses an environment without the suite's packages
        assert all(name.startswith(allowed) for name in ours), path
        heavy = packages(path) & {"torch", "torchvision", "psap_core"}
        assert not heavy, path
    with_wandb = [path.name for path in files("analysis") if "wandb" in packages(path)]
    assert with_wandb == ["wandb_view.py"]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_there_is_no_import_circle():
    """Modules, and the rooms of experiments; a package's face does not count as importing what it offers."""
    modules = {module_name(path): path for room in OURS - {"tests"} for path in files(room)}
    arrows = {name: imports(path) & modules.keys() - {name} for name, path in modules.items()}
    order = tuple(TopologicalSorter(arrows).static_order())  # raises CycleError, which names it
    assert {*order} == modules.keys()
    rooms: dict[str, set[str]] = {}
    for name, others in arrows.items():
        mine = room_of(name)
        rooms.setdefault(mine, set()).update(room_of(other) for other in others)
    for mine, others in rooms.items():
        others.discard(mine)
    assert {*TopologicalSorter(rooms).static_order()} >= {"experiments.data", "experiments.runs"}


def room_of(module: str) -> str:
    """The folder in experiments that a module lies in, or itself; psap_core and analysis as wholes."""
    package, *rest = module.split(".")
    if package != "experiments":
        return package
    in_a_folder = rest and (ROOT / package / rest[0]).is_dir()
    return f"{package}.{rest[0]}" if in_a_folder else module


def test_wandb_is_imported_in_one_module_only():
    with_wandb = [path for path in files("experiments") if "wandb" in packages(path)]
    assert [path.parent.name for path in with_wandb] == ["training"]


def test_commands_that_only_look_import_no_torch():
    """Help, finished runs, where the runs of a suite stand, tables and figures."""
    modules = ", ".join(
        [
            *(f"experiments.{name}" for name in ("train", "status", "suite", "benchmark")),
            *(module_name(path) for path in files("experiments/runs")),
            *(f"experiments.suites.{name}" for name in ("spec", "runs", "launch", "overview")),
            *("analysis.build", "analysis.collect", "analysis.figures"),
        ]
    )
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
    assert not {"logging", "sys"} & set.union(*map(packages, CORE))


def test_no_module_hides_what_the_core_offers():
    assert not {path.stem for path in CORE} & {*api.__all__}


def test_a_name_has_one_meaning():
    """Public classes and functions; but for `main`, which every command has, and `make`, which every method has."""
    homes: dict[str, list[str]] = {}
    for room in OURS - {"tests"}:
        for path in files(room):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    homes.setdefault(node.name, []).append(module_name(path))
    several = {name for name, found in homes.items() if len(found) > 1 and not name.startswith("_")}
    assert several == {"main", "make"}
