from dataclasses import replace

import pytest
import yaml
from omegaconf import OmegaConf

from analysis.collect import DataError
from analysis.published import read_published
from analysis.suites import EXPERIMENTS, compose, read_suite, read_suites, setting_of
from experiments import entry

RECIPES = sorted(path.stem for path in (EXPERIMENTS / "conf" / "experiment").glob("*.yaml"))


def cells_with_new_overrides():
    """Of all suites' cells those that override something that no earlier one does, or choose another method."""
    seen = set()
    for path in sorted((EXPERIMENTS / "conf" / "suite").glob("*.yaml")):
        for cell in yaml.safe_load(path.read_text())["cells"]:
            kinds = {
                str(o) if str(o).startswith("method=") else str(o).split("=")[0]
                for o in cell["overrides"]
            }
            if not kinds <= seen:
                seen |= kinds
                yield pytest.param(
                    cell["recipe"], cell["overrides"], id=f"{path.stem}-{cell['name']}"
                )


@pytest.mark.parametrize(
    ("recipe", "overrides"), [*((recipe, []) for recipe in RECIPES), *cells_with_new_overrides()]
)
def test_cells_are_read_as_training_reads_them(recipe, overrides):
    run = ["method.run=runs/x/y/seed0"] if "method=thin_plan" in overrides else []
    trained = entry.compose("train", [f"experiment={recipe}", *map(str, overrides), *run])
    config = yaml.safe_load(OmegaConf.to_yaml(OmegaConf.structured(trained)))
    assert setting_of(compose(recipe, overrides)) == setting_of(config)


def test_all_suites_are_read_in_order_and_a_thin_network_of_a_plan_has_that_plans_target(tmp_path):
    assert [suite.name for suite in read_suites()] == sorted(
        p.stem for p in (EXPERIMENTS / "conf" / "suite").glob("*.yaml")
    )
    path = tmp_path / "mine.yaml"
    path.write_text(
        "seeds: [5]\ncells:\n"
        "  - {name: b, recipe: cifar10_resnet20, overrides: [method=thin_plan], plan_of: a}\n"
        "  - {name: a, recipe: cifar10_resnet20, overrides: [method=psap, target_macs_cut=0.3]}\n"
    )
    suite = read_suite(path)
    assert (suite.name, suite.title, suite.seeds) == ("mine", "mine", (5,))
    assert [(cell.name, cell.target) for cell in suite.cells] == [("b", 0.3), ("a", 0.3)]
    assert suite.cells[0].setting.target is None


@pytest.mark.parametrize("goal", ["high", "true", "0.92", "912", ".nan", "null", "'91'"])
def test_a_goal_is_a_top1_in_percent_at_a_target(goal, tmp_path):
    path = tmp_path / "mine.yaml"
    cell = "- {name: a, recipe: cifar10_resnet20, overrides: [%s], goal: %s}"
    path.write_text(f"seeds: [0]\ncells:\n  {cell % ('method=psap', 91.5)}\n")
    assert read_suite(path).cells[0].goal == 91.5
    for wrong in (cell % ("method=psap", goal), cell % ("method=dense", 91.5)):
        path.write_text(f"seeds: [0]\ncells:\n  {wrong}\n")
        with pytest.raises(
            DataError, match=r"the goal of cell 'a', .*, is no top-1 in percent at a target"
        ):
            read_suite(path)


def test_a_study_compares_cells_with_its_reference_or_with_what_they_name_and_has_effects(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "seeds: [5]\nreference: a\neffects: {pruning: [[a, b], [c, b]]}\ncells:\n"
        "  - {name: a, recipe: cifar10_small, overrides: [method=psap]}\n"
        "  - {name: b, recipe: cifar10_small, overrides: [method=dense]}\n"
        "  - {name: c, recipe: cifar10_small, overrides: [method=l1], against: b}\n"
    )
    suite = read_suite(path)
    assert [(cell.name, cell.against) for cell in suite.cells] == [
        ("a", None),
        ("b", "a"),
        ("c", "b"),
    ]
    assert suite.effects == {"pruning": [("a", "b"), ("c", "b")]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: [0]", "is no suite: KeyError 'cells'"),
        ("[", "cannot be read"),
        (
            "seeds: [0]\ncells: [{name: a, recipe: none, overrides: []}]",
            "cannot be read: .*none.yaml",
        ),
        (
            "seeds: [0]\ncells: [{name: a, recipe: cifar10_small, overrides: [], plan_of: b}]",
            "is no suite",
        ),
        (
            "seeds: [0]\nreference: b\ncells: [{name: a, recipe: cifar10_small, overrides: []}]",
            "is no suite: .*'b'",
        ),
        (
            "seeds: [0]\neffects: {e: []}\ncells: [{name: a, recipe: cifar10_small, overrides: []}]",
            ".* no pair",
        ),
        (
            "seeds: [0]\neffects: {e: [[a, b]]}\ncells: [{name: a, recipe: cifar10_small, overrides: []}]",
            ".*'b'",
        ),
    ],
)
def test_what_is_no_suite_is_refused(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(DataError, match=f"mine.yaml {message}"):
        read_suite(tmp_path / "mine.yaml")


def test_our_networks_are_found_among_the_published_ones():
    """By the names of the literature: every full-size network that a suite trains, and no other."""
    published = {tuple(pair) for pair in read_published()[["dataset", "model"]].to_numpy()}
    settings = {cell.setting for suite in read_suites() for cell in suite.cells}
    names = {
        (setting.dataset_title, setting.model_title) for setting in settings if setting.full_size
    }
    assert names <= published
    assert {("CIFAR-10", "ResNet-20"), ("ImageNet", "ResNet-50")} <= names
    conf = {path.stem for path in (EXPERIMENTS / "conf" / "model").glob("*.yaml")}
    titles = {replace(next(iter(settings)), model=model).model_title for model in conf}
    assert {"VGG-16", "MobileNetV2"} <= titles
