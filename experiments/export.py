"""Check a finished run's exported network, and write it as ONNX too.

`python -m experiments.export run=<run folder> [onnx=true]`

Training has exported the network already; this rebuilds it from spec.json and weights.safetensors alone.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from experiments import models
from experiments.entry import entry_point
from experiments.runs.summary import read_summary
from experiments.schema import ExportConfig
from experiments.training.devices import configure
from experiments.training.distributed import World
from psap_core import InputError, export_onnx, macs, params
from psap_core.exported import read_plans

ONNX_TOLERANCE = 1e-4  # relative to the largest logit; ONNX Runtime computes in float32


def check_export(cfg: ExportConfig) -> Path:
    """Rebuild the exported network of `cfg.run`, compare it with the run's summary; returns its folder.

    Raises:
        InputError: the folder is no finished run, its network is not the one that the summary describes, or a package
            that ONNX needs is missing.
    """
    if cfg.onnx and (
        missing := [
            name for name in ("onnx", "onnxruntime", "onnxscript") if find_spec(name) is None
        ]
    ):
        raise InputError(f"onnx=true needs {', '.join(missing)}: pip install {' '.join(missing)}")
    configure(cfg.runtime, World())
    folder = Path(cfg.run) / "export"
    summary = read_summary(Path(cfg.run))
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
        path = folder / "model.onnx"
        export_onnx(small, path, read_plans(folder)[-1])
        error = onnx_error(small, path, shape)
        if not error <= ONNX_TOLERANCE:
            raise InputError(
                f"{path} computes something else than the exported network: it differs by {error:.1e}"
            )
        print(f"{path}: largest relative difference {error:.1e} in ONNX Runtime")
    return folder


@torch.no_grad()
def onnx_error(small: nn.Module, path: Path, input_shape: tuple[int, ...]) -> float:
    """max|a - b| / max|a| of the network and its ONNX file on three random inputs, float32, CPU."""
    import onnxruntime

    images = torch.randn(3, *input_shape, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = small.cpu().eval()(images)
    (onnx_logits,) = session.run(None, {"images": images.numpy()})
    return float((logits - torch.from_numpy(onnx_logits)).abs().max() / logits.abs().max())


@entry_point("export")
def main(cfg: ExportConfig) -> None:
    check_export(cfg)


if __name__ == "__main__":
    main()
