"""The line of an epoch, where stderr is no terminal."""

import pytest

from experiments.training.progress import RunProgress


@pytest.mark.parametrize("curve", ["validation", "test"])
def test_an_epochs_line_says_of_which_images_its_accuracy_is(curve, capsys):
    with RunProgress("digits psap", 4, 5, 0, curve=curve, quiet=False) as progress:
        progress.epoch({"epoch": 1, "train/loss": 0.5, "eval/top1": 65.2})
    said = capsys.readouterr().err
    assert said == f"digits psap  epoch 1/4  loss 0.500  {curve} top1 65.20\n"
