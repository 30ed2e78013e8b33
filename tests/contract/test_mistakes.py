"""What was probably meant."""

import pytest

from experiments.configuration import compose, explanation, quoted_path
from experiments.runs.files import weights_digest
from experiments.suites.spec import read_suite
from psap_core import InputError
from psap_core.settings import make_settings

RECIPE = "experiment=digits_resnet20"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([RECIPE, "lr=0.1"], "lr: there is no such key; did you mean optim.lr?"),
        ([RECIPE, "optim.lrr=0.1"], "optim.lrr: there is no such key; did you mean optim.lr?"),
        ([RECIPE, "batch_size=8"], "did you mean optim.batch_size?"),
        ([RECIPE, "device=cpu"], "did you mean runtime.device?"),
        ([RECIPE, "target_mac_cut=0.5"], "did you mean target_macs_cut?"),
        ([RECIPE, "method=taylr"], "method=taylr: there is no such method; did you mean taylor? "),
        ([RECIPE, "method=psap_schema"], "there is no such method; choose from dense, fpgm, l1"),
        (["experiment=digits_resnet2"], "there is no such recipe; did you mean digits_resnet20?"),
        ([RECIPE, "model=resnet65"], "there is no such model; did you mean resnet56?"),
        ([RECIPE, "model=mobilenetv3_small_050"], "model=timm model.name=mobilenetv3_small_050"),
        ([RECIPE, "model=resnet26"], "but timm has it: model=timm model.name=resnet26"),
        ([RECIPE, "run=runs/x"], "a run is named by the words that it is trained with"),
        (["+experiment=digits_resnet20"], "Multiple values for experiment"),
        (["method=psap"], "no recipe is chosen: add experiment=<cifar10_resnet110|"),
        ([RECIPE, "method=sfp", "method.compact=true"], "there are method.name, method.figures, "),
        ([RECIPE, "optim.optimizer=adam"], "optim.optimizer=adam: did you mean adamw? choose from"),
        ([RECIPE, "optim.schedule=zzz"], "optim.schedule=zzz: choose from steps, cosine"),
        (
            [RECIPE, "hydra.job_logging.root.level=INFO"],
            "Hydra's own settings are not changed here",
        ),
        ([RECIPE, "+hydra.callbacks.x._target_=os.system"], "Hydra's own settings are not"),
        ([RECIPE, "hydra/job_logging=disabled"], "Hydra's own settings are not changed here"),
        ([RECIPE, "+data@hydra.callbacks.x=digits"], "Hydra's own settings are not changed here"),
        (["experiment=../../elsewhere"], "experiment=../../elsewhere: it is a name, no path; "),
        ([RECIPE, "data='/elsewhere/data'"], "data='/elsewhere/data': it is a name, no path; "),
        ([RECIPE, "+experiment=/elsewhere"], "+experiment=/elsewhere: it is a name, no path; "),
        ([RECIPE, "name='a\0b'"], "it holds a null character"),
        ([RECIPE, "method=psap", "method.exclude=conv1"], "as in method.exclude=[conv1]"),
        ([RECIPE, "method=thin_plan"], "method.run is missing: add method.run=<folder of a fin"),
        ([RECIPE, "seed"], "seed: write key=value"),
        ([RECIPE, "=3"], "=3: write key=value"),
        ([RECIPE, "name=a(b"], "name=a(b: its value cannot be read; quotes inside quotes keep"),
        ([RECIPE, "seed=1.5"], "seed=1.5: it takes a whole number"),
        ([RECIPE, "optim.lr=fast"], "optim.lr=fast: it takes a number"),
        ([RECIPE, "method=psap", "method.freeze=x"], "method.freeze=x: it takes a number"),
        ([RECIPE, "onnx=maybe"], "onnx=maybe: it takes true or false"),
        ([RECIPE, "optim.milestones=[x]"], "optim.milestones=[x]: it takes a list of numbers"),
        ([RECIPE, "tracking.tags=null"], "tracking.tags=null: it takes a list of names"),
        ([RECIPE, "method=l1", "method.margin=0.1"], "there are method.name, method.figures, "),
    ],
    ids=lambda part: part[-1] if isinstance(part, list) else "",
)
def test_a_mistake_is_named_with_what_was_meant(words, sentence):
    with pytest.raises(InputError) as refused:
        compose("train", words)
    assert sentence in str(refused.value)
    assert "_schema" not in str(refused.value).replace("method=psap_schema", "")


@pytest.mark.parametrize(
    "legal",
    [
        ["~tracking.project"],
        ["optim.milestones.0=0.3"],
        ["method=psap.yaml"],
        ["data=digits"],
    ],
    ids=" ".join,
)
def test_a_legal_word_is_not_blamed_for_another(legal):
    """By name, where the epochs are the mistake."""
    words = [RECIPE, *legal, "epochs=x"]
    said = explanation(ValueError("epochs"), "train", words)
    assert said.startswith("epochs")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"target_mac_cut": 0.5}, "no setting 'target_mac_cut': did you mean target_macs_cut?"),
        ({"zzz": 1}, "no setting 'zzz': there are target_macs_cut, "),
        ({"target_macs_cut": 0.5}, "the setting 'total_epochs' is missing"),
        ({"target_macs_cut": 50, "total_epochs": 9}, "(did you mean 0.5?), not 50"),
    ],
)
def test_a_setting_of_psap_too(settings, sentence):
    with pytest.raises(InputError) as refused:
        make_settings(settings)
    assert sentence in str(refused.value)


def test_a_misspelt_key_of_a_suites_cell_is_named(tmp_path):
    file = tmp_path / "mine.yaml"
    cell = "{name: dense, recipe: digits_small, override: [method=dense]}"
    file.write_text(f"title: Mine\nseeds: [0]\ncells: [{cell}]\n")
    with pytest.raises(InputError, match=r"against and goal, not override$"):
        read_suite(str(file))


def test_a_runs_folder_for_weights_is_answered_with_its_export(tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "spec.json").touch()
    with pytest.raises(InputError, match=f"is a run's folder: take its export/, {tmp_path}/export"):
        weights_digest(str(tmp_path))


@pytest.mark.parametrize("path", ["/x/a (b)", "/x/it's", "/x/a,b", "/x/x=1", "/x/plain-1.0", "a b"])
def test_a_path_may_have_any_name(path):
    word = quoted_path(f"data.root={path}")
    assert compose("train", ["experiment=cifar10_resnet20", word]).data.root == path


def test_a_path_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/mine")
    assert quoted_path("runs_dir=~/my runs") == "runs_dir='/mine/my runs'"
    assert quoted_path("data.root='~'") == "data.root='~'"
    assert quoted_path("seed=~") == "seed=~"
