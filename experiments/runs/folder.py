"""The run folder: everything that a run leaves behind."""

import fcntl
import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf

from experiments.runs.files import parse_json, read_json, write_atomically
from experiments.runs.identity import config_hash, identity
from experiments.runs.provenance import code_version, versions
from experiments.runs.summary import RunSummary, read_summary
from experiments.schema import Config
from psap_core import InputError

FIXED_FACTS = {
    "data_sha256": "the data of SHA-256",
    "world_size": "a number of processes of",
    "autocast": "the autocast type",
    "compile": "torch.compile",
}
LOCK_SECONDS = 10  # patience with whoever holds the folder


class State(StrEnum):
    """Where a run stands, as its folder says."""

    done = "done"
    running = "running"  # a process holds its lock
    failed = "failed"  # by an error, which it remembers
    rejected = "rejected"  # before it began; it remembers why
    interrupted = "interrupted"  # by a signal, with a checkpoint; the same command continues it
    incomplete = (
        "incomplete"  # killed, or running on another machine; the same command continues it
    )
    not_launched = "not launched"


class Record:
    """The folder runs_dir/name/hash8/seed<k> of one run; `begin` makes it.

    Raises:
        InputError: the folder holds another configuration, or `name` is no folder's name.
    """

    def __init__(self, cfg: Config) -> None:
        if cfg.name in ("", "..") or Path(cfg.name).name != cfg.name:
            raise InputError(f"name={cfg.name!r} must be a plain folder name")
        self.config_hash = config_hash(cfg)
        self.seed = cfg.seed
        self.folder = Path(cfg.runs_dir) / cfg.name / self.config_hash / f"seed{cfg.seed}"
        self._lock: IO[str] | None = None
        self._refuse_foreign()

    @property
    def done(self) -> bool:
        return (self.folder / "done").exists()

    @property
    def begun(self) -> bool:
        return (self.folder / "manifest.json").exists()

    @property
    def state(self) -> State:
        """Where the run stands."""
        if self.done:
            return State.done
        if self._locked_by_another():
            return State.running
        if (self.folder / "failed").exists():
            return State.failed if self.begun else State.rejected
        if (self.folder / "interrupted").exists():
            return State.interrupted
        return State.incomplete if self.begun else State.not_launched

    def _locked_by_another(self) -> bool:
        if self._lock is not None or not (self.folder / ".lock").is_file():
            return False
        with (self.folder / ".lock").open() as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint" / "last.pt"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    def begin(self, cfg: Config, facts: Mapping[str, Any]) -> None:
        """Make the folder, lock it until `close`, and write config.yaml and manifest.json.

        The manifest holds `facts`, every device that its first process had, and one more entry in its list of sessions.

        Raises:
            InputError: a file stands in the folder's place, another process uses it or has just finished the run,
                or the run began with other data or another number of processes.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(
                f"the run folder {self.folder} cannot be made: a file stands in its place"
            ) from error
        self._lock = self._take_lock()
        if self.done:
            raise InputError(f"another process has just finished the run in {self.folder}")
        self._forget_ending()
        earlier = []
        if (path := self.folder / "manifest.json").exists():
            manifest = read_json(path, "sessions", "device")
            for key, what in FIXED_FACTS.items():
                if key in facts and manifest.get(key) != facts[key]:
                    raise InputError(
                        f"{self.folder} began with {what} {manifest.get(key)}, here it is {facts[key]}: bring that "
                        "back, or move the folder away"
                    )
            earlier = manifest["sessions"]
            devices = dict.fromkeys([*manifest["device"].split("; "), facts["device"]])
            facts = {**facts, "device": "; ".join(devices)}
        write_atomically(
            self.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(cfg)).encode()
        )
        session = {"started": _now(), "command": sys.orig_argv, **code_version()}
        own = {"config_hash": self.config_hash, "seed": self.seed, "identity": identity(cfg)}
        manifest = {**own, **facts, "versions": versions()}
        self._write_json("manifest.json", manifest | {"sessions": [*earlier, session]})

    def _take_lock(self) -> IO[str]:
        """Lock the folder; what a killed run leaves behind may hold it for some seconds."""
        lock = (self.folder / ".lock").open("w")
        patience = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > patience:
                    lock.close()
                    raise InputError(f"another process is training in {self.folder}") from error
                time.sleep(0.1)
            else:
                return lock

    def close(self) -> None:
        """Let other processes have the folder; the end of this process does it too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append one epoch's metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(metrics, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[dict[str, float]]:
        """All epochs' metrics."""
        if not self.metrics.exists():
            return []
        return [
            parse_json(line, self.metrics, "epoch")
            for line in self.metrics.read_bytes().splitlines()
        ]

    def metrics_bytes(self) -> int:
        return self.metrics.stat().st_size if self.metrics.exists() else 0

    def cut_metrics(self, size: int) -> None:
        """Forget what was logged after the checkpoint that knew `size` bytes."""
        if not 0 <= size <= self.metrics_bytes():
            raise InputError(
                f"{self.metrics} is shorter than its checkpoint says: it was edited or damaged"
            )
        if self.metrics.exists():
            os.truncate(self.metrics, size)
            self.rows()  # refuses damaged ones now, not when all epochs are trained

    def manifest(self) -> dict[str, Any]:
        """What `begin` wrote of code, libraries and machine."""
        return read_json(self.folder / "manifest.json")

    def save_step(self, kind: str, epochs_done: int, text: str) -> None:
        """Keep what a pruning step made: a file per epoch in the folder `kind`, plans or pulses."""
        folder = self.folder / kind
        folder.mkdir(exist_ok=True)
        write_atomically(folder / f"epoch_{epochs_done:04d}.json", text.encode())

    def save_summary(self, summary: RunSummary) -> None:
        self._write_json("summary.json", asdict(summary))

    def interrupt(self) -> None:
        """Mark the run as stopped by a signal, with a checkpoint."""
        write_atomically(self.folder / "interrupted", f"{time.time_ns()}".encode())

    @property
    def interrupted_at(self) -> str:
        """When it was, in ns: two interruptions of a run differ."""
        return (self.folder / "interrupted").read_text()

    def fail(self, reason: str) -> None:
        """Remember the error that ended the run, or kept it from beginning; not if another process trains or did it."""
        if not self.done and not self._locked_by_another():
            with suppress(FileExistsError, NotADirectoryError):
                self.folder.mkdir(parents=True, exist_ok=True)
                (self.folder / "interrupted").unlink(missing_ok=True)
                write_atomically(self.folder / "failed", reason.encode())

    @property
    def error(self) -> str:
        """Why a run has failed or was refused."""
        return (self.folder / "failed").read_text()

    def adopt(self, suite: str | None, cell: str | None) -> None:
        """Say of a finished run that was trained for no table for which one it counts."""
        summary = read_summary(self.folder)
        if suite is not None and summary.suite is None:
            config = OmegaConf.load(self.folder / "config.yaml")
            config.update({"suite": suite, "cell": cell})
            write_atomically(self.folder / "config.yaml", OmegaConf.to_yaml(config).encode())
            self.save_summary(replace(summary, suite=suite, cell=cell))

    def _forget_ending(self) -> None:
        for ending in ("interrupted", "failed"):
            (self.folder / ending).unlink(missing_ok=True)

    def finish(self) -> None:
        """Mark the run as done; the last thing that is written."""
        self._write_json("manifest.json", self.manifest() | {"finished": _now()})
        write_atomically(self.folder / "done", b"")

    def _refuse_foreign(self) -> None:
        path = self.folder / "manifest.json"
        if path.exists():
            manifest = read_json(path, "config_hash", "seed")
            if (manifest["config_hash"], manifest["seed"]) != (self.config_hash, self.seed):
                raise InputError(
                    f"{self.folder} holds the run of another configuration ({manifest['config_hash']}, seed "
                    f"{manifest['seed']}): move it away, nothing is overwritten"
                )

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        write_atomically(self.folder / name, (json.dumps(content, indent=1) + "\n").encode())


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
