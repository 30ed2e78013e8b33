"""Train one network with one method: `python -m experiments.train experiment=<recipe> [key=value ...] [--json]`.

    python -m experiments.train experiment=digits_resnet20 method=l1 target_macs_cut=0.5
    python -m experiments.train experiment=image_folder data.root=<folder> model.name=efficientnet_b0 onnx=true
    torchrun --nproc-per-node=4 -m experiments.train experiment=imagenet_resnet50

The same command again continues a run that was stopped, and prints the summary of one that is done.
SIGTERM, SIGUSR1 and Ctrl-C write a checkpoint after the current step and leave with exit code 75.
With --json the summary is one line of JSON.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from pathlib import Path

from experiments.configuration import compose
from experiments.entry import entry_point
from experiments.runs.checks import plain_name
from experiments.runs.done import refuse_damage, refuse_other_data
from experiments.runs.folder import Record, run_on_other_images
from experiments.runs.summary import read_summary, summary_text
from experiments.schema import ONNX_PACKAGES, Config, OwnFolderConfig, TargetConfig
from psap_core import InputError
from psap_core.checks import require_cut, require_packages

MOST_EPOCHS = 1_000_000


def run(overrides: Sequence[str]) -> Path:
    """Train (or continue, or find done) the run that these Hydra overrides describe; returns its folder."""
    return train(compose("train", overrides))


def train(cfg: Config) -> Path:
    """Train the configured run in its folder, and return the folder."""
    _refuse_impossible(cfg)
    record = Record(cfg)
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1

    def answer() -> None:
        refuse_damage(record.folder)
        _compare_data(cfg, record)
        record.adopt(cfg.suite, cfg.cell)

    if alone and record.done:
        answer()
    else:
        _say_other_images(cfg, record)
        # What only has to be answered imports no training.
        from experiments.training.run import train_here

        train_here(cfg, record, answer)
    if cfg.onnx and int(os.environ.get("RANK", 0)) == 0:
        _write_onnx(record.folder / "export")
    return record.folder


def _refuse_impossible(cfg: Config) -> None:
    """What can be said before anything is read, made or imported."""
    if not 1 <= cfg.epochs <= MOST_EPOCHS:
        raise InputError(f"epochs={cfg.epochs} must be from 1 to {MOST_EPOCHS:,}")
    if abs(cfg.seed) >= 2**63:
        raise InputError(f"seed={cfg.seed} must lie between -2^63 and 2^63")
    _refuse_other_than_names(cfg)
    for tag in cfg.tracking.tags:
        if not 1 <= len(tag) <= 64:  # W&B's limits
            raise InputError(f"tracking.tags: {tag!r} must have 1 to 64 characters")
    if isinstance(cfg.method, TargetConfig):
        require_cut("target_macs_cut", cfg.method.target_macs_cut)
    if isinstance(cfg.data, OwnFolderConfig):
        _refuse_runs_among_images(Path(cfg.runs_dir), Path(cfg.data.root))
    if cfg.onnx:
        require_packages("onnx=true", *ONNX_PACKAGES)


def _compare_data(cfg: Config, record: Record) -> None:
    """A finished run answers for the data that it was trained on; where there are none, for those."""
    import torch

    from experiments.data import is_there, load_dataset

    if not is_there(cfg.data):
        return
    try:
        present = load_dataset(cfg.data, torch.device("cpu")).digest
    except InputError:  # an empty folder, say
        return
    advice = f"name the former, not data.root={cfg.data.root}, or another runs_dir"
    refuse_other_data(record.folder, present, advice)


def _say_other_images(cfg: Config, record: Record) -> None:
    """A picture more in a folder of one's own makes another run of the same words."""
    is_first = int(os.environ.get("RANK", 0)) == 0
    if not is_first or any(path.exists() for path in record.checkpoints):
        return
    other = run_on_other_images(cfg, record)
    if other is not None:
        print(
            f"a run of the same settings lies in {other.folder}, {other.state.value}: it was trained on other images, "
            "and this one begins anew",
            file=sys.stderr,
        )


def _refuse_other_than_names(cfg: Config) -> None:
    """Suite and cell become names of folders."""
    for key, name in (("suite", cfg.suite), ("cell", cfg.cell)):
        if name is not None and not plain_name(name):
            raise InputError(f"{key}={name!r} must be words of letters, digits, _ % . + and -")


def _refuse_runs_among_images(runs_dir: Path, root: Path) -> None:
    if runs_dir.resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"runs_dir={runs_dir} lies in data.root={root}, where every folder is a class: name another folder"
        )


def _write_onnx(folder: Path) -> None:
    """Write and check the ONNX file of an export folder."""
    from experiments.models import open_exported
    from experiments.models.onnx_file import write_onnx

    print("writing export/model.onnx", file=sys.stderr)
    small, _ = open_exported(folder)
    try:
        print(write_onnx(folder, small), file=sys.stderr)
    except InputError as error:
        raise InputError(
            f"the trained network lies in {folder}, without ONNX file: {error}"
        ) from error


@entry_point("train", "json")
def main(cfg: Config, json: bool) -> None:
    folder = train(cfg)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    summary = read_summary(folder)
    print(dumps(asdict(summary)) if json else summary_text(summary, folder))


if __name__ == "__main__":
    main()
