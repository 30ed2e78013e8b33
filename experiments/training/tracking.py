"""Weights & Biases: a mirror of metrics.jsonl. The only module that imports wandb, and only when it is used.

Online runs are logged live and resumed by their id. wandb cannot resume an offline run (a second init makes a
second folder), so an offline mirror is written from metrics.jsonl in one go when the run ends.
"""

import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.schema import Config, TrackingMode
from psap_core import InputError


class Tracker:
    """The mirror of one run, in <folder>/wandb.

    Raises:
        InputError: tracking.mode=online without wandb, or its server refuses or cannot be reached.
    """

    def __init__(self, cfg: Config, config_hash: str, folder: Path) -> None:
        self.cfg, self.config_hash, self.folder = cfg, config_hash, folder
        self.mode = cfg.tracking.mode
        self.run = self._init() if self.mode is TrackingMode.online else None

    def log(self, metrics: Mapping[str, float]) -> None:
        """One epoch, live."""
        if self.run is not None:
            self.run.log(dict(metrics), step=int(metrics["epoch"]))

    def finish(self, rows: Iterable[Mapping[str, float]], summary: Mapping[str, Any]) -> None:
        """The run ended: write the offline mirror from all its `rows`, or complete the online one."""
        if self.mode is TrackingMode.offline:
            # Of an attempt that was killed right here.
            shutil.rmtree(self.folder / "wandb", ignore_errors=True)
            self.run = self._init()
            for row in rows:
                self.log(row)
        if self.run is not None:
            self.run.summary.update(dict(summary))
            self.run.finish()

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
        cfg = self.cfg
        try:
            run = wandb.init(
                mode=self.mode.value,
                project=cfg.tracking.project,
                dir=str(self.folder),
                id=f"{self.config_hash}-s{cfg.seed}",
                name=f"{cfg.suite or cfg.name}/{cfg.method.name}/s{cfg.seed}",
                group=cfg.cell or f"{cfg.name}/{cfg.method.name}/{self.config_hash}",
                job_type=cfg.method.name,
                tags=[cfg.suite or cfg.name, cfg.data.name, cfg.model.name],
                config=asdict(cfg) | {"config_hash": self.config_hash},
                resume="allow" if self.mode is TrackingMode.online else None,
                settings=wandb.Settings(
                    silent=True, console="off", x_disable_stats=True, x_disable_meta=True
                ),
            )
        except wandb.Error as error:
            raise InputError(
                f"tracking.mode={self.mode.value}: wandb says: {' '.join(str(error).split())}"
            ) from error
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")
        return run
