"""Runs that are killed with SIGKILL where it hurts: `python -m tests.training.killed_runs JSON`.

JSON is a list of [point, overrides]. One process imports torch and forks a child per run; a child dies at its
point, a module's function of POINTS, called for the given time.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sklearn.datasets  # noqa: F401  (here and not in every child: it takes a second)
import torch._dynamo  # noqa: F401  (the same)

import psap_core.pruner
from experiments import train
from experiments.runs.folder import Record
from experiments.training import tracking
from experiments.training.progress import RunProgress


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(
    number: int, owner: Any, name: str, before_death: Callable[..., None] = lambda *_: None
) -> None:
    """Replace owner.name by itself, dying at its call `number` (the first is 1)."""
    original, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            before_death(*arguments)
            kill()
        return original(*arguments, **options)

    setattr(owner, name, counted)


def half_written(record: Any, data: bytes) -> None:
    path, _ = record.checkpoints
    path.with_name(f".{path.name}.0.tmp").write_bytes(data[: len(data) // 2])


def kill_children(*_: Any) -> None:
    """wandb's process, which writes the mirror, after it had the time to."""
    time.sleep(2 * tracking.FLUSH_SECONDS)
    for task in Path("/proc/self/task").iterdir():
        for child in (task / "children").read_text().split():
            os.kill(int(child), signal.SIGKILL)


POINTS: dict[str, Callable[[], None]] = {
    "mid-epoch": lambda: at_call(8, RunProgress, "advance"),
    "mid-epoch, compact": lambda: at_call(18, RunProgress, "advance"),
    "in a pulse": lambda: at_call(2, psap_core.pruner, "pulse"),
    "weights zeroed, plan not saved": lambda: at_call(2, Record, "save_step"),
    "logged, no checkpoint yet": lambda: at_call(2, Record, "save_checkpoint"),
    "half a checkpoint written": lambda: at_call(2, Record, "save_checkpoint", half_written),
    "fourth epoch not logged, all processes": lambda: at_call(4, Record, "log", kill_children),
    "export done, summary not": lambda: at_call(1, Record, "save_summary"),
}


def main() -> None:
    for point, overrides in json.loads(sys.argv[1]):
        if (child := os.fork()) == 0:
            POINTS[point]()
            train.run(overrides)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
            raise SystemExit(f"{point}: {overrides} was not killed")


if __name__ == "__main__":
    main()
