"""What README, Makefile and CI tell people to do exists and runs."""

import gzip
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.configuration import compose
from experiments.suites.spec import read_suite, suite_names
from psap_core import macs

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
    "psap_core/METHOD.md",
    "analysis/notebooks/README.md",
]
README = (ROOT / "README.md").read_text()
TEXTS = "\n".join((ROOT / page).read_text() for page in PAGES)
MAKEFILE = (ROOT / "Makefile").read_text()
CI = (ROOT / ".ci" / "run").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def code_blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_every_make_target_named_exists():
    named = set(
        re.findall(r"(?:^|`|\s)make ([a-z-]+)", "\n".join([*code_blocks("bash", TEXTS), CI]))
    )
    named |= set(re.findall(r"`[^`\n]*make ([a-z-]+)[^`\n]*`", TEXTS))
    assert {"demo", "test", "check"} <= named <= TARGETS


def test_every_target_is_documented_in_help():
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE).group(1).split()
    described = re.findall(r"^([a-z-]+):.*## ", MAKEFILE, re.MULTILINE)
    assert set(phony) == set(described)


def test_every_module_that_is_run_exists():
    modules = set(re.findall(r"(?:python|IN_VENV\)) -m ([a-z0-9_.]+)", TEXTS + MAKEFILE))
    assert {"experiments.demo", "experiments.train", "pytest"} <= modules
    # To look for pip makes setuptools leave distutils to Python, which torch.compile in the same process does not bear.
    assert [
        name for name in modules - {"pip", "uv"} if importlib.util.find_spec(name) is None
    ] == []


def test_every_recipe_and_method_named_exists():
    for group, choice in re.findall(r"\b(experiment|method|data|model)=([a-z0-9_]+)", TEXTS):
        assert (ROOT / "experiments" / "conf" / group / f"{choice}.yaml").is_file(), (
            f"{group}={choice}"
        )


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_local_link_and_picture_exists(page):
    links = re.findall(r"\]\(((?!https?:|#)[^)#]+)", (ROOT / page).read_text())
    assert links or page != "README.md"
    assert [link for link in links if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_only_ci_knows_where_the_shared_data_lies():
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    beside, personal = "../" + "shared", re.compile(r"(?<![\w.])/(home|root|Users|work)/\w")
    for name in tracked.stdout.splitlines():
        path = ROOT / name
        if path.suffix in {".pdf", ".png", ".safetensors"} or not path.is_file():
            continue
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        assert beside not in text or name == ".ci/run", f"{name} names {beside}"
        assert not personal.search(text), (
            f"{name} names a folder of one machine: {personal.search(text)}"
        )


def test_the_readme_is_of_one_screen():
    assert len(README.splitlines()) <= 150


def test_every_command_line_is_one_that_its_program_takes():
    """Keys of recipes, choices of suites: a run is composed, nothing is trained."""
    joined = TEXTS.replace("\\\n", " ").replace("data.root=<folder>", "data.root=folder")
    for line in re.findall(r"(?:python|torchrun \S+) -m experiments\.train ([^#`\n]*)", joined):
        words = [word for word in shlex.split(line) if "<" not in word]
        if "--help" not in words:
            compose("train", words)
    suites = re.findall(r"experiments\.suite \w+ (\w+)(?![\w.])", TEXTS)
    assert {*suites} - {"SUITE"} <= {*suite_names()}
    assert suites


def test_what_extending_shows_is_what_the_files_say(tmp_path):
    text = (ROOT / "docs" / "extending.md").read_text()
    shown = [*code_blocks("yaml", text), *code_blocks("python", text)]
    for block in shown:
        first, rest = block.split("\n", 1)
        name = first.removeprefix("# ")
        if name == "mine.yaml":
            (tmp_path / name).write_text(rest)
            assert len(read_suite(str(tmp_path / name)).cells) == 3
        else:
            assert rest.rstrip("\n") in (ROOT / name).read_text(), name
    assert len(shown) == 4


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def test_the_quickstart_word_for_word(tmp_path, capsys):
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = network()
    names = {
        "model": model,
        "make_model": network,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "criterion": nn.CrossEntropyLoss(),
        "loader": [(torch.randn(8, 3, 8, 8), torch.randint(4, (8,))) for _ in range(4)],
        "folder": tmp_path,
    }
    blocks = code_blocks("python", (ROOT / "docs" / "quickstart.md").read_text())
    for block in blocks:
        exec(compile(block, "quickstart.md", "exec"), names)
    assert "of the MACs can be cut" in capsys.readouterr().out
    example = names["loader"][0][0][:1]
    assert macs(names["model"], example) <= 0.5 * macs(network(), example)
    assert torch.equal(names["again"].eval()(example), names["model"].eval()(example))
    assert (tmp_path / "small.onnx").is_file()


def test_the_own_loop_of_the_readme_prunes_and_exports_a_network():
    (block,) = [block for block in code_blocks("python") if "PSAP(" in block]
    torch.manual_seed(0)
    model = network()
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(4, (8,))) for _ in range(4)]
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "criterion": nn.CrossEntropyLoss(),
        "loader": batches,
    }
    exec(compile(block, "README.md", "exec"), names)
    example = batches[0][0][:1]
    assert 0 < macs(names["small"], example) <= 0.5 * macs(model, example)
    torch.testing.assert_close(names["small"].eval()(example), model.eval()(example))


def test_an_old_python_and_a_missing_venv_module_give_one_sentence(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("needs make")
    for name in ("Makefile", "pyproject.toml", "requirements.txt", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    pretended = {"old": "sys.version_info = (3, 10)", "bare": "sys.modules['ensurepip'] = None"}
    for name, trick in pretended.items():
        python = tmp_path / name
        inner = f"import sys; {trick}; exec(sys.argv.pop(1))"
        command = f'exec {shlex.quote(sys.executable)} -c {shlex.quote(inner)} "$2"'
        python.write_text(f"#!/bin/sh\n{command}\n")
        python.chmod(0o755)
        make = ["make", "demo", f"PYTHON={python}"]
        done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True)
        said = {"old": "Python 3.11 or newer is needed", "bare": "lacks the venv module"}[name]
        assert done.returncode == 2
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / ".venv").exists()
