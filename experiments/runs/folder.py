"""The run folder: everything that a run leaves behind."""

import errno
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from experiments.runs.done import NAME, read_done, refuse_another_file, write_done
from experiments.runs.files import (
    EXPORTED_FILES,
    DataError,
    parse_json,
    parse_yaml,
    read_sealed,
)
from experiments.runs.identity import config_hash, differ_in_images_only, identity
from experiments.runs.provenance import code_version, versions
from experiments.runs.summary import RunSummary, read_summary
from experiments.schema import Config, OwnFolderConfig
from psap_core import InputError
from psap_core.files import (
    TEMPORARY,
    make_folder,
    read_plain,
    refuse_special,
    sealed,
    sha256,
    write_atomically,
)

FIXED_FACTS = {
    "data_sha256": "the data of SHA-256",
    "world_size": "a number of processes of",
    "autocast": "the autocast type",
    "compile": "torch.compile",
}
SESSIONS_OWN = ("config.yaml", "manifest.json")  # written anew by every session
LONGEST_NOTE = 10_000  # bytes of an error's sentence
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
    damaged = "damaged"  # a file of it is; move the folder away, or copy it again
    not_launched = "not launched"


class Written(NamedTuple):
    """What a run had written at some time.

    Attributes:
        files: by path below the folder, the SHA-256 of what was written there.
        metrics_bytes, metrics_sha256: of metrics.jsonl.
    """

    files: dict[str, str]
    metrics_bytes: int
    metrics_sha256: str


class Record:
    """The folder runs_dir/name/hash8/seed<k> of one run; `begin` makes it.

    Args:
        known_hash: of the configuration, where it was taken before.

    Raises:
        InputError: the folder holds another configuration, or `name` is no folder's name.
    """

    def __init__(self, cfg: Config, known_hash: str | None = None) -> None:
        if cfg.name in ("", "..") or Path(cfg.name).name != cfg.name:
            raise InputError(f"name={cfg.name!r} must be a plain folder name")
        self.config_hash = known_hash or config_hash(cfg)
        self.seed = cfg.seed
        self.folder = Path(cfg.runs_dir) / cfg.name / self.config_hash / f"seed{cfg.seed}"
        self._lock: int | None = None
        self._digests: dict[str, str] = {}
        self._logged = hashlib.sha256()
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
        if self._lock is not None:
            return False
        try:
            lock = _no_link(self.folder / ".lock", os.O_RDONLY)
        except OSError:  # none, or something else in its place
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    @property
    def checkpoints(self) -> tuple[Path, Path]:
        """The last one, and the one before it."""
        folder = self.folder / "checkpoint"
        return folder / "last.pt", folder / "previous.pt"

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
            make_folder(self.folder)
        except (FileExistsError, NotADirectoryError) as error:
            raise InputError(
                f"the run folder {self.folder} cannot be made: a file stands in its place"
            ) from error
        self._lock = self._take_lock()
        try:
            self._begin_session(cfg, facts)
        except BaseException:
            self.close()
            raise

    def _begin_session(self, cfg: Config, facts: Mapping[str, Any]) -> None:
        self.refuse_moved()
        if self.done:
            raise InputError(f"another process has just finished the run in {self.folder}")
        self._refuse_links()
        self._forget_ending()
        earlier = []
        if (path := self.folder / "manifest.json").exists():
            manifest = read_sealed(path, "sessions", "device")
            for key, what in FIXED_FACTS.items():
                if key in facts and manifest.get(key) != facts[key]:
                    raise InputError(
                        f"{self.folder} began with {what} {manifest.get(key)}, here it is {facts[key]}: bring that "
                        "back, or move the folder away"
                    )
            earlier = manifest["sessions"]
            devices = dict.fromkeys([*manifest["device"].split("; "), facts["device"]])
            facts = {**facts, "device": "; ".join(devices)}
        elif any(checkpoint.exists() for checkpoint in self.checkpoints):
            raise InputError(
                f"{self.folder} is half-written: manifest.json is missing; copy the run again, or move the folder away"
            )
        self._write("config.yaml", OmegaConf.to_yaml(OmegaConf.structured(cfg)).encode())
        facts = dict(facts)
        session = {
            "started": _now(),
            "command": sys.orig_argv,
            "threads": facts.pop("threads", None),
            **code_version(),
        }
        own = {"config_hash": self.config_hash, "seed": self.seed, "identity": identity(cfg)}
        manifest = {**own, **facts, "versions": versions()}
        self._write_json("manifest.json", sealed(manifest | {"sessions": [*earlier, session]}))

    def _take_lock(self) -> int:
        """Lock the folder; what a killed run leaves behind may hold it for some seconds."""
        path = self.folder / ".lock"
        try:
            lock = _no_link(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EINVAL, errno.EISDIR):
                raise InputError(f"{path} is no file of ours: remove it") from error
            raise
        patience = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > patience:
                    os.close(lock)
                    raise InputError(f"another process is training in {self.folder}") from error
                time.sleep(0.1)
            else:
                return lock

    def close(self) -> None:
        """Let other processes have the folder; the end of this process does it too."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def log(self, metrics: Mapping[str, float]) -> None:
        """Append one epoch's metrics."""
        self.refuse_moved()
        line = (json.dumps(metrics, allow_nan=False) + "\n").encode()
        with open(self.metrics, "ab", opener=_no_link) as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._logged.update(line)

    def rows(self) -> list[dict[str, float]]:
        """All epochs' metrics."""
        if not self.metrics.exists():
            return []
        return [
            parse_json(line, self.metrics, "epoch")
            for line in read_plain(self.metrics).splitlines()
        ]

    def written(self) -> Written:
        """What is there now, for a checkpoint."""
        size = self.metrics.stat().st_size if self.metrics.exists() else 0
        return Written(dict(self._digests), size, self._logged.hexdigest())

    def return_to(self, written: Written | None) -> None:
        """Forget what came after a checkpoint; None: forget all.

        Raises:
            DataError: a file is missing, or is not what the run wrote.
        """
        files, size, digest = written or Written({}, 0, sha256(b""))
        logged = read_plain(self.metrics) if self.metrics.exists() else b""
        if len(logged) < size:
            raise DataError(
                f"{self.metrics} is damaged or was edited: it is shorter than its checkpoint says"
            )
        kept = logged[:size]
        if sha256(kept) != digest:
            raise DataError(
                f"{self.metrics} is damaged or was edited: it is not what the run wrote"
            )
        for name, expected in files.items():
            if name not in SESSIONS_OWN:
                refuse_another_file(self.folder, name, expected)
                self._digests[name] = expected
        self.refuse_moved()
        write_atomically(self.metrics, kept)
        self._logged = hashlib.sha256(kept)

    def manifest(self) -> dict[str, Any]:
        """What `begin` wrote of code, libraries and machine."""
        return read_sealed(self.folder / "manifest.json")

    def threads(self) -> list[int | None]:
        """The different numbers of torch's CPU threads that the run's sessions had, the last one's last."""
        threads = [session.get("threads") for session in self.manifest()["sessions"]]
        return [*dict.fromkeys(threads[::-1])][::-1]

    def save_step(self, kind: str, epochs_done: int, text: str) -> None:
        """Keep what a pruning step made: a file per epoch in the folder `kind`, plans or pulses."""
        self._write(f"{kind}/epoch_{epochs_done:04d}.json", text.encode())

    def save_checkpoint(self, data: bytes) -> None:
        """Replace the last checkpoint, and keep the one before."""
        self.refuse_moved()
        last, previous = self.checkpoints
        make_folder(last.parent)
        _refuse_link(last.parent)
        write_atomically(last, data, previous=previous)

    def forget_newer_checkpoints(self, used: Path) -> None:
        """What is newer than the checkpoint that a run continues with is damaged: it must not replace that one."""
        for path in self.checkpoints:
            if path == used:
                return
            path.unlink(missing_ok=True)

    def export_folder(self) -> Path:
        """Where the exported network goes; raises InputError where something else may lie there."""
        self.refuse_moved()
        folder = self.folder / "export"
        _refuse_link(folder)
        return folder

    def add_export(self) -> None:
        """Count the files of the exported network, which are there now, among the run's."""
        for path in sorted((self.folder / "export").rglob("*")):
            if path.name in EXPORTED_FILES:
                name = path.relative_to(self.folder).as_posix()
                self._digests[name] = sha256(read_plain(path))

    def save_summary(self, summary: RunSummary) -> None:
        self._write_json("summary.json", asdict(summary))

    def interrupt(self) -> None:
        """Mark the run as stopped by a signal, with a checkpoint."""
        self.refuse_moved()
        moment = datetime.now(UTC).isoformat(timespec="microseconds")
        write_atomically(self.folder / "interrupted", moment.replace("+00:00", "Z").encode())

    @property
    def interrupted_at(self) -> str:
        """When it was, in UTC to the microsecond: two interruptions of a run differ."""
        return self._note("interrupted")

    def fail(self, reason: str) -> None:
        """Remember the error that ended the run, or kept it from beginning; not if another process trains or did it."""
        is_ours = not self._was_moved() if self._lock is not None else not self._locked_by_another()
        if is_ours and not self.done:
            with suppress(OSError):  # a full disk, say: the error itself is what must be said
                make_folder(self.folder)
                (self.folder / "interrupted").unlink(missing_ok=True)
                write_atomically(self.folder / "failed", reason.encode())

    @property
    def error(self) -> str:
        """Why a run has failed or was refused."""
        return self._note("failed")

    def _note(self, name: str) -> str:
        """The text in a small file of the run, whatever lies in its place."""
        path = self.folder / name
        try:
            with open(path, "rb", opener=_no_link) as file:
                return file.read(LONGEST_NOTE).decode(errors="replace")
        except OSError as error:
            return f"{path} cannot be read: {error.strerror}"

    def adopt(self, suite: str | None, cell: str | None) -> None:
        """Say of a finished run that was trained for no table for which one it counts."""
        if suite is None or read_summary(self.folder).suite is not None:
            return
        self._lock = self._take_lock()
        try:
            summary = read_summary(self.folder)
            if summary.suite is None:
                self._adopt(replace(summary, suite=suite, cell=cell))
        finally:
            self.close()

    def _adopt(self, summary: RunSummary) -> None:
        self._digests = read_done(self.folder)
        # Killed from here on, the run is one that the same command finishes.
        (self.folder / NAME).unlink()
        config = OmegaConf.create(parse_yaml(read_plain(self.folder / "config.yaml")))
        config.update({"suite": summary.suite, "cell": summary.cell})
        self._write("config.yaml", OmegaConf.to_yaml(config).encode())
        self.save_summary(summary)
        write_done(self.folder, self._digests)

    def _forget_ending(self) -> None:
        for ending in ("interrupted", "failed"):
            (self.folder / ending).unlink(missing_ok=True)

    def finish(self) -> None:
        """Mark the run as done; the last thing that is written."""
        self._write_json("manifest.json", sealed(self.manifest() | {"finished": _now()}))
        self._digests["metrics.jsonl"] = self._logged.hexdigest()
        self.refuse_moved()
        write_done(self.folder, self._digests)

    def _refuse_foreign(self) -> None:
        path = self.folder / "manifest.json"
        if path.exists():
            manifest = read_sealed(path, "config_hash", "seed")
            if (manifest["config_hash"], manifest["seed"]) != (self.config_hash, self.seed):
                raise InputError(
                    f"{self.folder} holds the run of another configuration ({manifest['config_hash']}, seed "
                    f"{manifest['seed']}): move it away, nothing is overwritten"
                )

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self._write(name, (json.dumps(content, indent=1) + "\n").encode())

    def _write(self, name: str, data: bytes) -> None:
        """Write a file of the run, which `done` will list."""
        self.refuse_moved()
        path = self.folder / name
        make_folder(path.parent)
        _refuse_link(path.parent)
        write_atomically(path, data)
        self._digests[name] = sha256(data)

    def _was_moved(self) -> bool:
        """Is the folder no longer the one that is locked?"""
        assert self._lock is not None
        ours = os.fstat(self._lock)
        try:
            there = os.stat(self.folder / ".lock", follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return True
        return (there.st_dev, there.st_ino) != (ours.st_dev, ours.st_ino)

    def refuse_moved(self) -> None:
        """Raise InputError where the folder is no longer the one that `begin` locked."""
        if self._was_moved():
            raise InputError(
                f"{self.folder} was moved or deleted while this process trained in it: it stops, and writes nothing "
                "where another run may lie"
            )

    def _refuse_links(self) -> None:
        """What the run writes stays in its folder. What a killed process left half-written goes."""
        mirror = self.folder / "wandb"  # which has links of its own inside
        for path in (self.folder, *self.folder.rglob("*")):
            if mirror not in path.parents:
                _refuse_link(path)
        for path in self.folder.rglob(TEMPORARY):
            if mirror not in path.parents:
                path.unlink()


def run_on_other_images(cfg: Config, record: Record) -> Record | None:
    """The run of the same name, seed and settings that trained on other images of one's own; the latest of several."""
    if not isinstance(cfg.data, OwnFolderConfig):
        return None
    own = identity(cfg)
    begun: list[tuple[str, str]] = []
    for path in record.folder.parents[1].glob(f"*/{record.folder.name}/manifest.json"):
        try:
            other = Record(cfg, path.parents[1].name)
            manifest = other.manifest()
            if differ_in_images_only(own, manifest["identity"]):
                begun.append((manifest["sessions"][-1]["started"], other.config_hash))
        except (InputError, OSError, LookupError, TypeError, AttributeError):
            continue  # damaged, in another run's place, or of an earlier version
    if not begun:
        return None
    _, latest = max(begun)
    return Record(cfg, latest)


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise InputError(f"{path} is a link, which is not followed: remove it")


def _no_link(path: Path | str, flags: int) -> int:
    """Opens a plain file, as `open` wants it done, but nothing that a link leads to."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    refuse_special(descriptor, Path(path))
    return descriptor


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
