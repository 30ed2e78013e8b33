"""Every notebook runs from its first cell to its last, with recorded runs and without."""

import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from analysis.plots import FIGURES
from tests.analysis.runs import write_run
from tests.limits import HANG_SECONDS

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))
CHOSEN = [re.search(r'"SUITE = \\"(\w+)\\"', path.read_text()).group(1) for path in NOTEBOOKS]
STUDY = "small_study"
(SUITE,) = {*CHOSEN} - {STUDY}


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A copy of the folder analysis without results, tables and figures, beside the suites."""
    made = shutil.ignore_patterns("results", "tables", "figures", "__pycache__")
    shutil.copytree(ROOT / "analysis", tmp_path / "analysis", ignore=made)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    (tmp_path / "analysis" / "results").mkdir()
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path / "analysis"


def execute(folder):
    """Texts and number of images that the notebooks in a folder show. Raises if a cell fails.

    They run in one kernel, each as if it were a new one: starting kernels would take a minute.
    """
    shown = []
    for path in sorted(folder.glob("*.ipynb")):
        shown += [
            *nbformat.read(path, as_version=4).cells,
            nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {folder}"),
        ]
    NotebookClient(
        nbformat.v4.new_notebook(cells=shown),
        timeout=HANG_SECONDS,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    outputs = [output for cell in shown if cell.cell_type == "code" for output in cell.outputs]
    images = sum("image/png" in output.get("data", {}) for output in outputs)
    return "\n".join(
        output.get("text", "") + str(output.get("data", "")) for output in outputs
    ), images


def test_notebooks_show_what_was_recorded(workplace):
    how = {
        "suite": SUITE,
        "dataset": "cifar10",
        "image_size": 16,
        "train_images": 10000,
        "epochs": 30,
    }
    how["macs_cut"] = 0.54
    for cell in ("dense", "psap 54", "psap without protection 54"):
        folder = workplace / "results" / SUITE / cell.replace(" ", "_") / "seed0"
        write_run(
            folder, cell.split()[0], cell=cell, protection="without" not in cell, top1=61.23, **how
        )
    write_run(folder.with_name("seed99"), "psap", cell=cell, protection=False, seed=99, **how)
    how |= {"macs_cut": 0.85, "validation_images": 10000}
    for method, top1 in (("psap", 61.0), ("thin", 59.5)):
        write_run(
            workplace / "results" / STUDY / method / "seed0",
            method,
            cell=method,
            top1=top1,
            **how | {"suite": STUDY},
        )
    texts, images = execute(workplace / "notebooks")
    assert images == len(FIGURES)
    assert texts.count(f"{SUITE}: 3 finished runs") == CHOSEN.count(SUITE) - 1
    assert texts.count(f"{cell}, seed 99: the suite has no such cell and seed") == CHOSEN.count(
        SUITE
    )
    assert f"{STUDY}: 2 finished runs" in texts
    assert "| psap      | -1.50 " in texts
    assert texts.count("| 1 of 5 | 61.23 ") == 4  # in the table; dense in both of its sections


def test_without_results_notebooks_say_not_run(workplace):
    texts, images = execute(workplace / "notebooks")
    assert images == 0
    assert texts.count(f"{SUITE}: not run") == CHOSEN.count(SUITE) - 1
    assert f"{STUDY}: not run" in texts
    assert "runs: 0 of 75, 75 not run" in texts
    assert texts.count("is left out: not run") == len(FIGURES)


@pytest.mark.parametrize(
    ("name", "table"), [("01_tables", SUITE), ("07_study", f"{STUDY}_findings")]
)
def test_a_notebook_shows_the_committed_table(name, table):
    notebook = nbformat.read(ROOT / "analysis" / "notebooks" / f"{name}.ipynb", as_version=4)
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    shown = [output["data"].get("text/markdown") for output in outputs if "data" in output]
    committed = (ROOT / "analysis" / "tables" / f"{table}.md").read_text()
    assert committed.strip() in [text.strip() for text in shown if text]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_is_committed_executed_thin_and_without_a_machines_paths(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert 2 <= len(code) <= 5
    assert all(cell.execution_count for cell in code)
    outputs = str([cell.outputs for cell in code])
    assert str(ROOT) not in outputs
    assert "/home/" not in outputs
