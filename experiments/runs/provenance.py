"""Which code and which libraries made a run."""

import hashlib
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VERSIONS_OF = ("torch", "torchvision", "safetensors", "hydra-core", "scikit-learn", "wandb")


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in VERSIONS_OF:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def code_version() -> dict[str, str | None]:
    """Commit, and the digest of uncommitted changes (None: there are none); None outside a checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.decode(errors="replace").strip()

    changes = git("diff", "HEAD")
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty_diff_sha256": hashlib.sha256(changes.encode()).hexdigest() if changes else None,
    }
