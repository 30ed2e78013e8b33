"""Checkpoints: a dictionary without pickled code, behind a line that holds the SHA-256 of its bytes."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from psap_core import InputError
from psap_core.files import read_plain, sha256

FORMAT = "psap-checkpoint-3"


def checkpoint_bytes(state: dict[str, Any]) -> bytes:
    """The content of a checkpoint's file: tensors, numbers, strings, lists, dictionaries."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    return f"{FORMAT} {sha256(content)}\n".encode() + content


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `checkpoint_bytes` made, on the CPU.

    Raises:
        InputError: the file is damaged, or no checkpoint of this suite.
    """
    first, _, content = read_plain(path).partition(b"\n")
    name, _, digest = first.decode(errors="replace").partition(" ")
    if name != FORMAT:
        raise InputError(f"{path} is damaged, or not a checkpoint of format {FORMAT!r}")
    if digest != sha256(content):
        raise InputError(f"{path} is damaged: its content is not that of its SHA-256")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes make it raise anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no checkpoint of this suite: {reason}") from error
    if not isinstance(state, dict):
        raise InputError(f"{path} is no checkpoint of this suite: it holds no dictionary")
    return state


def load_newest(
    paths: Sequence[Path], say: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The first of these checkpoints that is whole, with its place; None: there is none at all.

    Args:
        paths: the newest first; a missing one is passed over.
        say: is told of damaged ones.

    Raises:
        InputError: all that are there are damaged.
    """
    present = [path for path in paths if path.exists()]
    if not present:
        return None
    *newer, oldest = present
    for path in newer:
        try:
            return path, load_checkpoint(path)
        except (InputError, OSError) as error:
            say(f"{error}; going back to the checkpoint before it")
    return oldest, load_checkpoint(oldest)


def generators(device: torch.device) -> dict[str, Any]:
    """State of this process's default generators."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_generators(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:  # None: saved by a run on a CPU
        torch.cuda.set_rng_state(state["cuda"], device)
