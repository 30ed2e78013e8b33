import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from analysis.published import read_published
from analysis.suites import plan_suite, plan_suites, setting_of
from experiments import configuration
from experiments.configuration import CONF, _hydra, compose, typed
from experiments.runs.files import DataError
from experiments.runs.identity import settings
from experiments.suites.spec import read_suite, suite_names

RECIPES = sorted(path.stem for path in (Path(CONF) / "experiment").glob("*.yaml"))


@pytest.fixture(scope="module")
def planned():
    return plan_suites()


def cells_with_new_overrides():
    """Of all suites' cells those that override something that no earlier one does, or choose another method."""
    seen = set()
    for suite in map(read_suite, suite_names()):
        for cell in suite.cells:
            kinds = {o if o.startswith("method=") else o.split("=")[0] for o in cell.overrides}
            if not kinds <= seen:
                marks = () if len(seen) < 8 else pytest.mark.long
                seen |= kinds
                name = f"{suite.name}-{cell.name}"
                yield pytest.param(cell.recipe, cell.overrides, id=name, marks=marks)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        *((recipe, ()) for recipe in RECIPES if recipe.endswith("resnet20")),
        *cells_with_new_overrides(),
        *(
            pytest.param(recipe, (), marks=pytest.mark.long)
            for recipe in RECIPES
            if not recipe.endswith("resnet20")
        ),
    ],
)
def test_what_is_composed_in_parts_is_what_hydra_composes(recipe, overrides):
    run = ["method.run=runs/x/y/seed0"] if "method=thin_plan" in overrides else []
    own = ["data.root=photographs", "model.name=resnet18"] if recipe == "image_folder" else []
    words = [f"experiment={recipe}", *overrides, *run, *own]
    ours = compose("train", words)
    assert ours == typed(_hydra("train", words))
    assert setting_of(settings(ours)).epochs == ours.epochs


def test_a_recipe_may_set_its_method(tmp_path, monkeypatch):
    shutil.copytree(CONF, tmp_path / "conf")
    recipe = (tmp_path / "conf" / "experiment" / "cifar10_small.yaml").read_text()
    recipe = recipe.replace("resnet20", "resnet20\n  - override /method: sfp")
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(recipe)
    monkeypatch.setattr(configuration, "CONF", str(tmp_path / "conf"))
    for method in ([], ["method=l2"]):
        words = ["experiment=mine", *method]
        assert compose("train", words) == typed(_hydra("train", words))
    assert compose("train", ["experiment=mine"]).method.name == "sfp"


def test_a_cell_has_default_switches_whatever_its_target_and_scope(planned):
    (suite,) = (suite for suite in planned if suite.name == "cifar16_scope_defaults")
    without = {cell.name for cell in suite.cells if not cell.has_default_switches}
    assert without == {
        f"coupled {part} {cut}" for part in ("without protection", "one ratio") for cut in (54, 85)
    }


def test_a_thin_network_of_a_plan_has_that_plans_target(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "title: mine\nseeds: [5]\ncells:\n"
        "  - {name: b, recipe: cifar10_resnet20, overrides: [method=thin_plan], plan_of: a}\n"
        "  - {name: a, recipe: cifar10_resnet20, overrides: [method=psap, target_macs_cut=0.3]}\n"
    )
    suite = plan_suite(read_suite(str(path)))
    assert (suite.name, suite.title, suite.seeds) == ("mine", "mine", (5,))
    assert [(cell.name, cell.target) for cell in suite.cells] == [("b", 0.3), ("a", 0.3)]
    assert suite.cells[0].setting.target is None


def test_a_goal_is_of_a_target(tmp_path):
    path = tmp_path / "mine.yaml"
    cell = "- {name: a, recipe: cifar10_resnet20, overrides: [method=%s], goal: 91.5}"
    path.write_text(f"title: mine\nseeds: [0]\ncells:\n  {cell % 'psap'}\n")
    assert plan_suite(read_suite(str(path))).cells[0].goal == 91.5
    path.write_text(f"title: mine\nseeds: [0]\ncells:\n  {cell % 'dense'}\n")
    with pytest.raises(DataError, match="the goal of cell 'a' is of no target"):
        plan_suite(read_suite(str(path)))


def test_our_networks_are_found_among_the_published_ones(planned):
    """By the names of the literature: every full-size network that a suite trains, and no other."""
    published = {tuple(pair) for pair in read_published()[["dataset", "model"]].to_numpy()}
    of_cells = {cell.setting for suite in planned for cell in suite.cells}
    names = {
        (setting.dataset_title, setting.model_title) for setting in of_cells if setting.full_size
    }
    assert names <= published
    assert {("CIFAR-10", "ResNet-20"), ("ImageNet", "ResNet-50")} <= names
    conf = {path.stem for path in (Path(CONF) / "model").glob("*.yaml")}
    titles = {replace(next(iter(of_cells)), model=model).model_title for model in conf}
    assert {"VGG-16", "MobileNetV2"} <= titles
