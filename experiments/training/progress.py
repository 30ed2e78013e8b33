"""Progress on stderr: a bar with the time left for the whole run or suite; one line per epoch without a terminal."""

import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from psap_core.files import read_plain


def _bar(live: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        disable=not live,
    )


class SuiteProgress:
    """Counts the epochs of runs that other processes train: metrics.jsonl of each, and its epochs."""

    def __init__(self, epochs: Mapping[Path, int]) -> None:
        self.files = list(epochs)
        self.bar = _bar(sys.stderr.isatty())
        self.task = self.bar.add_task(
            "epochs of all runs", total=sum(epochs.values()), completed=self._done()
        )

    def __enter__(self) -> "SuiteProgress":
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def update(self) -> None:
        """Look how far the runs are."""
        if not self.bar.disable:
            self.bar.update(self.task, completed=self._done())

    def _done(self) -> int:
        return sum(map(epochs_written, self.files))


def epochs_written(metrics: Path) -> int:
    """Those of a metrics.jsonl; none where it is not there, or something else lies in its place."""
    try:
        return read_plain(metrics).count(b"\n")
    except OSError:
        return 0


class RunProgress:
    """Counts optimiser steps over all epochs of a run; a context manager.

    Args:
        curve: validation or test, the images that an epoch's accuracy is of.
        quiet: show nothing.
    """

    def __init__(
        self,
        label: str,
        epochs: int,
        steps_per_epoch: int,
        steps_done: int,
        *,
        curve: str,
        quiet: bool,
    ) -> None:
        self.label = label
        self.epochs = epochs
        self.curve = curve
        self.live = sys.stderr.isatty() and not quiet
        self.bar = _bar(self.live)
        self.task = self.bar.add_task(label, total=epochs * steps_per_epoch, completed=steps_done)

    def __enter__(self) -> "RunProgress":
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def advance(self) -> None:
        self.bar.advance(self.task)

    def epoch(self, metrics: Mapping[str, float]) -> None:
        """An epoch is complete."""
        line = (
            f"{self.label}  epoch {int(metrics['epoch'])}/{self.epochs}  "
            f"loss {metrics['train/loss']:.3f}  {self.curve} top1 {metrics['eval/top1']:.2f}"
        )
        if "psap/macs_cut" in metrics:
            line += f"  macs cut {100 * metrics['psap/macs_cut']:.1f} %"
        if self.live:
            self.bar.update(self.task, description=line)
        else:
            print(line, file=sys.stderr, flush=True)
