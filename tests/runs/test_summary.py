"""What a finished run says to a person."""

import json

import pytest

from experiments.runs.summary import RunSummary, summary_text

SUMMARY = RunSummary(
    dataset="image_folder",
    image_size=32,
    train_images=160,
    model="resnet18",
    method="psap",
    epochs=1,
    seed=0,
    suite=None,
    cell=None,
    start_top1=None,
    top1=80.0,
    top5=100.0,
    masked_top1=80.0,
    test_images=40,
    macs=1_000_000,
    macs_cut=0.5,
    params=1_000_000,
    export_max_relative_error=0.0,
    train_macs=1,
    train_seconds=2.0,
    train_seconds_dense_ratio=None,
    prune_seconds=1.0,
    config_hash="01234567",
)


@pytest.mark.parametrize(
    ("classes", "result"),
    [(5, "top-1 80.00 % on 40"), (6, "top-1 80.00 %, top-5 100.00 % on 40")],
)
def test_the_top_5_of_five_classes_is_left_out(classes, result, tmp_path):
    (tmp_path / "export").mkdir()
    spec = {"network": {"classes": classes}}
    (tmp_path / "export" / "spec.json").write_text(json.dumps(spec))
    assert result in summary_text(SUMMARY, tmp_path)
