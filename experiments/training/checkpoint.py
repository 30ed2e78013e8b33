"""One checkpoint per run: a dictionary without pickled code, replaced only when the next one is whole."""

import io
from pathlib import Path
from typing import Any

import torch

from experiments.runs.files import write_atomically
from psap_core import InputError

FORMAT = "psap-checkpoint-2"


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state`: tensors, numbers, strings, lists, dictionaries."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU.

    Raises:
        InputError: the file is truncated, or no checkpoint of this suite.
    """
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # foreign bytes make torch.load raise anything
        raise InputError(
            f"{path} is truncated or not a checkpoint: {_first_line(error)}"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(f"{path} is not a checkpoint of format {FORMAT!r}")
    return state


def generators(device: torch.device) -> dict[str, Any]:
    """State of this process's default generators."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_generators(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:  # None: saved by a run on a CPU
        torch.cuda.set_rng_state(state["cuda"], device)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
