"""Every notebook runs from its first cell to its last, with recorded runs and without."""

import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from analysis.build import REPORTS
from analysis.collect import record
from analysis.figures import FIGURES
from tests.analysis.runs import write_run
from tests.limits import HANG_SECONDS

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "analysis" / "notebooks").glob("*.ipynb"))
SUITE, STUDY, FRESH = "cifar16_comparison", "cifar16_study", "cifar16_defaults"
SHOWN = ("how_psap_compares", "what_psap_decides")  # which read SUITE


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A copy of the folder analysis without what is recorded and built, beside the suites."""
    made = shutil.ignore_patterns("recorded", "reports", "__pycache__")
    shutil.copytree(ROOT / "analysis", tmp_path / "analysis", ignore=made)
    for package in ("experiments", "psap_core"):
        (tmp_path / package).symlink_to(ROOT / package)
    (tmp_path / "analysis" / "recorded").mkdir()
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return tmp_path / "analysis"


def execute(folder):
    """Texts and number of images that the notebooks in a folder show. Raises if a cell fails.

    They run in one kernel, each as if it were a new one: starting kernels would take a minute.
    """
    shown = []
    for path in sorted(folder.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        for cell in cells:
            cell.id = f"{path.stem}-{cell.id}"  # a notebook's own are unique in it alone
        shown += [
            *cells,
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


@pytest.mark.long
def test_notebooks_show_what_was_recorded(workplace, tmp_path):
    runs = tmp_path / "runs"
    how = {"recipe": "cifar10_small", "dataset": "cifar10", "image_size": 16}
    how |= {"train_images": 10000, "epochs": 30}
    of_suite = how | {"suite": SUITE, "macs_cut": 0.54, "time_share": 0.8, "top1": 61.23}
    write_run(runs / "dense", "dense", cell="dense", **of_suite)
    of_suite |= {"scope": "all"}
    write_run(runs / "psap", "psap", cell="psap 54", **of_suite)
    cell = "psap without protection 54"
    write_run(runs / "without", "psap", cell=cell, protection=False, **of_suite)
    write_run(runs / "foreign", "psap", cell=cell, protection=False, seed=99, **of_suite)
    of_study = how | {"recipe": "cifar10_small_study", "macs_cut": 0.85}
    of_study |= {"validation_images": 10000}
    for suite, seed in ((STUDY, 0), (FRESH, 3)):
        of_study |= {"suite": suite, "seed": seed}
        write_run(runs / suite / "psap", "psap", cell="psap", top1=61.0, scope="all", **of_study)
        write_run(runs / suite / "thin", "thin", cell="thin", top1=59.5, **of_study)
    record(runs, workplace / "recorded")
    texts, images = execute(workplace / "notebooks")
    assert images == len(FIGURES) + 1  # the differences of two studies
    assert texts.count(f"{SUITE}: 3 finished runs") == len(SHOWN)
    assert texts.count(f"{cell}, seed 99: the suite has no such cell and seed") == len(SHOWN)
    assert f"{STUDY}: 2 finished runs" in texts
    assert f"{FRESH}: 2 finished runs" in texts
    assert "| psap      | -1.50 " in texts
    assert texts.count("| 1 of 5 | 61.23 ") == 4  # in the table; dense in both of its sections


@pytest.mark.long
def test_without_results_notebooks_say_not_run(workplace):
    texts, images = execute(workplace / "notebooks")
    assert images == 0
    assert texts.count(f"{SUITE}: not run") == len(SHOWN)
    assert f"{STUDY}: not run" in texts
    assert "runs: 0 of 75, 75 not run" in texts
    assert texts.count("is left out: not run") == len(FIGURES) + 1


@pytest.mark.parametrize(
    ("name", "table"),
    [("how_psap_compares", SUITE), ("which_parts_matter", f"{STUDY}_findings")],
)
def test_a_notebook_shows_the_committed_table(name, table):
    notebook = nbformat.read(ROOT / "analysis" / "notebooks" / f"{name}.ipynb", as_version=4)
    outputs = [
        output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    ]
    shown = [output["data"].get("text/markdown") for output in outputs if "data" in output]
    committed = (REPORTS / "tables" / f"{table}.md").read_text()
    assert committed.strip() in [text.strip() for text in shown if text]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_is_committed_executed_thin_and_without_a_machines_paths(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    told = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    for part in ("**Asked.**", "**How to read it.**", "**What follows.**"):
        assert any(part in cell.source for cell in told), part
    assert all(cell.execution_count for cell in code)
    outputs = str([cell.outputs for cell in code])
    assert str(ROOT) not in outputs
    assert "/home/" not in outputs
