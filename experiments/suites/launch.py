"""Launching a suite's runs: here, several at a time; as job arrays; or not at all, only printing the commands.

Done runs are left alone, and so are running ones and those that are refused; all others are begun or continued.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from experiments.exits import EXIT_INTERRUPTED, Interrupted
from experiments.runs.folder import State
from experiments.suites.overview import print_status
from experiments.suites.runs import SuiteRun, SuiteRuns
from experiments.training.progress import SuiteProgress
from psap_core import InputError

POLL_SECONDS = 0.5
SCRIPT = "slurm/cifar10_table.sh"


def pending(runs: SuiteRuns) -> list[SuiteRun]:
    """The chosen runs that a launch has to do something about, those that take another's plan behind it.

    Raises:
        InputError: a run takes the plan of another one that is neither done nor chosen.
    """
    runs.refuse_twins()
    chosen = runs.chosen
    closed = State.damaged, State.running
    open_runs = [run for run in chosen if run.refusal is None and run.state not in closed]
    open_runs = [run for run in open_runs if not run.counts]
    for run in open_runs:
        if run.plan_of is not None and run.plan_of not in chosen and not run.plan_of.record.done:
            raise InputError(
                f"{run} takes the plan of {run.plan_of}, which is not done: choose that, too"
            )
    return sorted(open_runs, key=lambda run: run.plan_of is not None)


def to_print(runs: SuiteRuns) -> None:
    """Print the training command of every pending run."""
    for run in pending(runs):
        print(shlex.join(["python", "-m", "experiments.train", *run.overrides]))


def slurm(runs: SuiteRuns) -> None:
    """Submit the pending runs as a job array, and those that take another's plan as one behind it.

    Raises:
        InputError: there is no sbatch, it refuses, or an earlier submission of the suite is not over.
    """
    name = f"psap-{runs.suite.name}"
    queued = sorted(
        set(_slurm("squeue", "--me", "--noheader", "--format=%A", f"--name={name}").split())
    )
    if queued:
        raise InputError(
            f"jobs of {runs.suite.name} are queued or running: wait for them, or scancel {' '.join(queued)}"
        )
    earlier: list[str] = []
    waiting = pending(runs)
    own = [run for run in waiting if run.plan_of is None]
    behind_others = [run for run in waiting if run.plan_of is not None]
    for part in (own, behind_others):
        if part:
            array = ",".join(str(run.index) for run in part)
            behind = [f"--dependency=afterany:{earlier[0]}"] if earlier else []
            options = ["--parsable", f"--job-name={name}", *behind, f"--array={array}"]
            earlier = [_slurm("sbatch", *options, SCRIPT, runs.source, *runs.extra)]
            print(f"job {earlier[0]}: {len(part)} runs of {runs.suite.name}")


def _slurm(*command: str) -> str:
    """What a command of Slurm answers."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise InputError(
            f"there is no {command[0]} here: launch on a machine that submits to Slurm"
        ) from error
    if done.returncode:
        raise InputError(f"{command[0]} refused: {' '.join(done.stderr.split())}")
    return done.stdout.strip()


def local(runs: SuiteRuns, jobs: int, devices: Sequence[str]) -> int:
    """Train the pending runs in this machine's processes, `jobs` at a time; returns 1 unless all chosen ones are done.

    Raises:
        InputError: jobs is not positive.
        Interrupted: Ctrl-C or SIGTERM; every run has written a checkpoint. Another one kills them.
    """
    if jobs < 1:
        raise InputError(f"--jobs={jobs} must be at least 1")
    waiting = pending(runs)
    free = [devices[slot % len(devices)] if devices else None for slot in range(jobs)]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    training: dict[subprocess.Popen[bytes], tuple[SuiteRun, str | None]] = {}
    with (
        SuiteProgress({run.record.metrics: run.config.epochs for run in waiting}) as progress,
        _Stops() as stops,
    ):
        try:
            while (training or waiting) and not stops.count:
                for run in [run for run in waiting if _ready(run)][: len(free)]:
                    waiting.remove(run)
                    device = free.pop(0)
                    training[_start(run, device, threads)] = run, device
                if not training:
                    for run in waiting:
                        _say(f"{run}: waits for {run.plan_of}, which is not done")
                    break
                time.sleep(POLL_SECONDS)
                progress.update()
                for process in [process for process in training if process.poll() is not None]:
                    run, device = training.pop(process)
                    free.append(device)
                    _say(f"{run}: {_ended(run, process.returncode)}")
        finally:  # whatever ends the launcher lets its runs write their checkpoints
            _stop(training, stops)
        if stops.count:
            raise Interrupted
    print_status(runs)
    return 0 if all(run.state is State.done for run in runs.chosen) else 1


def _say(text: str) -> None:
    """One line on stdout; a full disk or a closed pipe behind it ends no training."""
    with suppress(OSError):
        print(text, flush=True)


def log_file(run: SuiteRun) -> Path:
    """Where a run that is trained here writes what it says."""
    folder = Path(run.config.runs_dir) / "logs" / run.runs.suite.name
    return folder / f"{run.cell.name.replace(' ', '_')}-seed{run.seed}.log"


def _ready(run: SuiteRun) -> bool:
    return run.plan_of is None or run.plan_of.record.done


def _start(run: SuiteRun, device: str | None, threads: str) -> "subprocess.Popen[bytes]":
    """Begin to train; in a process group of its own, so that Ctrl-C reaches only the launcher."""
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    path = log_file(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "experiments.train", *run.overrides]
    with path.open("ab") as log:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            process_group=0,
        )


class _Stops:
    """While entered, Ctrl-C, SIGTERM and SIGHUP are only counted: no process is started and then forgotten."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> "_Stops":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self.count:
            return  # a closing terminal may send several; nobody is in a hurry
        self.count += 1


def _stop(processes: Collection["subprocess.Popen[bytes]"], stops: _Stops) -> None:
    """Let runs write their checkpoints and leave; kill them at one more Ctrl-C or SIGTERM."""
    before = stops.count
    for process in processes:
        process.terminate()
    while any(process.poll() is None for process in processes):
        if stops.count > before:
            for process in processes:
                process.kill()
        time.sleep(0.05)


def _ended(run: SuiteRun, code: int) -> str:
    """How a run has ended, in words; one that was refused or broke remembers it."""
    state = run.record.state
    if code in (0, EXIT_INTERRUPTED) or state in (State.done, State.running):  # by another launcher
        return state.value
    if code < 0:
        return f"killed by {signal.Signals(-code).name}; launched again, it continues"
    if state not in (State.failed, State.rejected):
        said = log_file(run).read_text(errors="replace").splitlines() or [
            f"it left with exit code {code}"
        ]
        run.record.fail(said[-1])
    return f"{run.record.state.value}: {run.record.error} ({log_file(run)})"
