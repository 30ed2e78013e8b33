"""Which code, libraries and machine made a run."""

import hashlib
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

VERSIONS_OF = (
    "psap-core",
    "torch",
    "torchvision",
    "safetensors",
    "hydra-core",
    "scikit-learn",
    "wandb",
)


@dataclass(frozen=True)
class Provenance:
    """Where a run comes from.

    Attributes:
        commit: of the last session: seven digits, and `+` if there were uncommitted changes.
        sessions: how often it was begun or continued.
        started, finished: of the first and of the last session, UTC.
        device: all that its first process had.
        threads: torch's CPU threads; None: torch decided.
        processes: in how many it trained.
        step_mode: how a training step was done; None: not recorded.
        data_sha256: of the data set.
    """

    commit: str
    sessions: int
    started: str
    finished: str | None
    device: str
    threads: int | None
    processes: int
    autocast: str
    compiled: bool
    step_mode: str | None
    data_sha256: str
    versions: Mapping[str, str | None]


def provenance_of(manifest: Mapping[str, Any], threads: int | None) -> Provenance:
    """What the manifest of a run says."""
    first, last = manifest["sessions"][0], manifest["sessions"][-1]
    changed = "+" if last.get("dirty_diff_sha256") else ""
    return Provenance(
        commit=f"{(last.get('commit') or 'unknown')[:7]}{changed}",
        sessions=len(manifest["sessions"]),
        started=first["started"],
        finished=manifest.get("finished"),
        device=manifest["device"],
        threads=threads,
        processes=manifest["world_size"],
        autocast=manifest["autocast"],
        compiled=manifest["compile"],
        step_mode=manifest.get("fast"),
        data_sha256=manifest["data_sha256"],
        versions=manifest["versions"],
    )


def versions() -> dict[str, str | None]:
    """Of Python, of this suite and of the libraries that change results; None: not installed."""
    version_numbers: dict[str, str | None] = {"python": platform.python_version()}
    for package in VERSIONS_OF:
        try:
            version_numbers[package] = version(package)
        except PackageNotFoundError:
            version_numbers[package] = None
    return version_numbers


def code_version() -> dict[str, str | None]:
    """Commit, and the digest of uncommitted changes (None: there are none); None outside a checkout."""
    changes = _git("diff", "HEAD")
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty_diff_sha256": hashlib.sha256(changes.encode()).hexdigest() if changes else None,
    }


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.decode(errors="replace").strip()
