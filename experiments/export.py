"""Check a finished run's exported network, and write it as ONNX too.

    python -m experiments.export run=runs/digits_resnet20/<hash>/seed0
    python -m experiments.export run=<run folder> onnx=true
    python -m experiments.export run=<run folder> onnx=true runtime.device=cpu

Training has exported the network already; this rebuilds it from spec.json and weights.safetensors alone.
"""

from pathlib import Path

import torch

from experiments import models
from experiments.entry import entry_point
from experiments.models.onnx_file import write_onnx
from experiments.runs.summary import read_finished
from experiments.schema import ONNX_PACKAGES, ExportConfig
from experiments.training.devices import configure
from experiments.training.distributed import World
from psap_core import InputError, macs, params
from psap_core.checks import require_packages


def check_export(cfg: ExportConfig) -> Path:
    """Rebuild the exported network of `cfg.run`, compare it with the run's summary; returns its folder.

    Raises:
        InputError: the folder is no finished run, its network is not the one that the summary describes, or a package
            that ONNX needs is missing.
    """
    if cfg.onnx:
        require_packages("onnx=true", *ONNX_PACKAGES)
    configure(cfg.runtime, World())
    folder = Path(cfg.run) / "export"
    summary = read_finished(Path(cfg.run))
    small, _ = models.open_exported(folder)
    shape = models.image_shape(folder)
    counts = {"macs": macs(small, torch.zeros(1, *shape)), "params": params(small)}
    if differing := [key for key, value in counts.items() if getattr(summary, key) != value]:
        key = differing[0]
        raise InputError(
            f"{folder} has {counts[key]} {key}, the run's summary says {getattr(summary, key)}"
        )
    print(f"{folder}: {counts['macs']:,} MACs, {counts['params']:,} parameters, as in summary.json")
    if cfg.onnx:
        print(write_onnx(folder, small))
    return folder


@entry_point("export")
def main(cfg: ExportConfig) -> None:
    check_export(cfg)


if __name__ == "__main__":
    main()
