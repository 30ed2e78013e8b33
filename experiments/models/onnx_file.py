"""An exported network as an ONNX file that computes the same."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from psap_core import InputError, export_onnx
from psap_core.exported import read_plans
from psap_core.files import read_plain, write_atomically

TOLERANCE = 1e-4  # relative to the largest logit; ONNX Runtime computes in float32


def write_onnx(folder: Path, small: nn.Module) -> str:
    """Write model.onnx into an export folder, compare it with its network, and say what it is like.

    Raises:
        InputError: the file computes something else.
    """
    path = folder / "model.onnx"
    plan = read_plans(folder)[-1]
    _, *shape = plan.inputs["shape"]
    with TemporaryDirectory() as elsewhere:
        unchecked = Path(elsewhere) / path.name
        export_onnx(small, unchecked, plan)
        error = onnx_error(small, unchecked, tuple(shape))
        if not error <= TOLERANCE:
            raise InputError(
                f"{path} is not written: ONNX computes something else than the exported network, it differs by "
                f"{error:.1e}"
            )
        write_atomically(path, read_plain(unchecked))
    megabytes = path.stat().st_size / 1e6
    return f"{path}: {megabytes:.1f} MB, largest relative difference {error:.1e} in ONNX Runtime"


@torch.no_grad()
def onnx_error(small: nn.Module, path: Path, input_shape: tuple[int, ...]) -> float:
    """max|a - b| / max|a| of the network and its ONNX file on three random inputs, float32, CPU."""
    import onnxruntime

    images = torch.randn(3, *input_shape, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    logits = small.cpu().eval()(images)
    (onnx_logits,) = session.run(None, {"images": images.numpy()})
    return float((logits - torch.from_numpy(onnx_logits)).abs().max() / logits.abs().max())
