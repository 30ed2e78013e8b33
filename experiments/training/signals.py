"""Signals that ask a training for a checkpoint."""

import signal
import sys
from types import FrameType


class StopSignals:
    """While entered, SIGTERM, SIGHUP, SIGUSR1 and a first Ctrl-C only set `received`; the loop asks after every step.

    A Ctrl-C that the loop has not answered by the end ends what comes next.
    """

    def __init__(self) -> None:
        self.received = False
        self._ctrl_c = False

    def __enter__(self) -> "StopSignals":
        numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, raised: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._ctrl_c and raised is None:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            self._ctrl_c = True
            signal.signal(number, signal.default_int_handler)
            print(
                "stopping after this step, with a checkpoint; Ctrl-C again: at once",
                file=sys.stderr,
            )
