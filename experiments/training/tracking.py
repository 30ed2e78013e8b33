"""Weights & Biases: a mirror of a run's folder. The only module that imports wandb, and only when it is used.

The mirror is written as the run goes, so a run that was killed can be synced. wandb cannot resume an offline run (a
second init makes a second folder), so a run that continues offline writes its mirror anew, from metrics.jsonl.
"""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from itertools import count
from typing import Any

from experiments.runs.folder import Record
from experiments.runs.provenance import provenance_of
from experiments.runs.summary import RunSummary
from experiments.schema import Config, TrackingMode
from psap_core import InputError

FLUSH_SECONDS = 1.0  # what a killed run loses; wandb's default is 15
DELETED = "previously created and deleted"  # how W&B's server says that an id is used up


class Tracker:
    """The mirror of one run, in <folder>/wandb. If it breaks, training goes on without it.

    Raises:
        InputError: tracking.mode=online without wandb, or wandb or its server refuses, or cannot be reached.
    """

    def __init__(self, cfg: Config, record: Record) -> None:
        self.cfg, self.record = cfg, record
        self.mode = cfg.tracking.mode
        if self.mode is TrackingMode.offline:
            shutil.rmtree(record.folder / "wandb", ignore_errors=True)
        self.run: Any = self._init() if self.mode is not TrackingMode.disabled else None

    def catch_up(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Log the recorded epochs that the mirror does not have."""
        if self.run is not None:
            known = self.run.starting_step  # the first epoch that W&B has not seen
            for row in rows:
                if row["epoch"] >= known:
                    self.log(row)

    def log(self, metrics: Mapping[str, float]) -> None:
        """One epoch."""
        with self._unharmed():
            if self.run is not None:
                self.run.log(dict(metrics), step=int(metrics["epoch"]), commit=True)

    def finish(self, summary: RunSummary, latency_ms: Callable[[], float]) -> None:
        """The run is complete: add its summary, and the exported network where that is asked for.

        `latency_ms` measures the exported network; it is called only where there is a mirror.
        """
        with self._unharmed():
            if self.run is not None:
                if self.cfg.tracking.artifact:
                    self.run.log_artifact(self._exported(summary))
                self.run.summary.update({**asdict(summary), "latency_ms": latency_ms()})
                self.run.finish()
        self.run = None

    def close(self) -> None:
        """Mark a run that was not completed as such."""
        with self._unharmed():
            if self.run is not None:
                self.run.finish(exit_code=1)
        self.run = None

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        """Whatever breaks the mirror is said once, and ends no training: its process may die, or the network."""
        try:
            yield
        except Exception as error:
            broken, self.run = self.run, None
            with suppress(Exception):  # what has arrived is kept whole, where that is possible
                broken.finish(exit_code=1)
            reason = " ".join(f"{type(error).__name__} {error}".split())
            print(
                f"the W&B mirror broke and is not written on ({reason}); metrics.jsonl has everything",
                file=sys.stderr,
            )

    def _exported(self, summary: RunSummary) -> Any:
        """The exported network, as an artifact."""
        import wandb

        artifact = wandb.Artifact(self._own_id, type="model", metadata=asdict(summary))
        artifact.add_dir(str(self.record.folder / "export"), policy="immutable")  # makes no copy
        return artifact

    @property
    def _own_id(self) -> str:
        return f"{self.record.config_hash}-s{self.cfg.seed}"

    def _init(self) -> Any:
        try:
            import wandb
        except ImportError as error:
            if self.mode is TrackingMode.online:
                raise InputError("tracking.mode=online needs wandb: pip install wandb") from error
            print(
                "wandb is not installed: no mirror is written, metrics.jsonl has everything",
                file=sys.stderr,
            )
            return None
        run_id = self._own_id
        for number in count(2):
            try:
                run = self._start(wandb, run_id)
            except (wandb.Error, ValueError) as error:
                if DELETED not in str(error):
                    raise InputError(
                        f"tracking.mode={self.mode.value}: wandb says: {' '.join(str(error).split())}"
                    ) from error
                deleted, run_id = run_id, f"{self._own_id}-{number}"
                print(
                    f"run {deleted} was deleted on W&B's server, and its id is used up: trying {run_id}",
                    file=sys.stderr,
                )
            else:
                break
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")
        return run

    def _start(self, wandb: Any, run_id: str) -> Any:
        cfg = self.cfg
        tags = [cfg.suite or cfg.name, cfg.data.name, cfg.model.name, *cfg.tracking.tags]
        provenance = provenance_of(self.record.manifest(), cfg.runtime.threads)
        own = {"config_hash": self.record.config_hash, "provenance": asdict(provenance)}
        return wandb.init(
            mode=self.mode.value,
            entity=cfg.tracking.entity,
            project=cfg.tracking.project,
            dir=str(self.record.folder),
            id=run_id,
            name=f"{cfg.suite or cfg.name}/{cfg.method.name}/s{cfg.seed}",
            group=cfg.cell or f"{cfg.name}/{cfg.method.name}/{self.record.config_hash}",
            job_type=cfg.method.name,
            tags=list(dict.fromkeys(tags)),
            notes=cfg.tracking.notes,
            config=asdict(cfg) | own,
            resume="allow" if self.mode is TrackingMode.online else None,
            settings=wandb.Settings(
                silent=True, console="off", x_transaction_log_flush_interval=FLUSH_SECONDS
            ),
        )
