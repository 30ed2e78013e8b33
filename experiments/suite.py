"""Many runs as one experiment: a suite is a list of cells, each a recipe and overrides, times seeds.

`python -m experiments.suite plan <suite>`            its runs: index, cell, seed, folder
`python -m experiments.suite status <suite>`          where each of them stands
`python -m experiments.suite launch <suite>`          train all that are not done: here (--jobs N at a time), as a Slurm
                                                      array (--launcher slurm), or print the commands (--launcher print)
`python -m experiments.suite show <suite> <index>`    the training command's overrides of one run, one a line
`python -m experiments.suite run <suite> <index>`     train one run, here
`python -m experiments.suite latency <suite>`         measure the exported networks of its finished runs, here

A suite is a name in experiments/suites, or a path of such a file. Overrides after these arguments hold for
every run; tables leave out runs whose data, model, method or optim are not those of the suite's file. The
index counts the seeds of the first cell, then those of the second. Of a part of a suite: `plan`, `status` and
`launch` take `--cells 'resnet20 *54'` and `--seeds 0,1`.
"""

import argparse
import json
import sys
from dataclasses import asdict

from experiments.exits import plain_exits
from experiments.runs.summary import read_summary
from experiments.suites.overview import print_plan, print_status
from experiments.suites.runs import SuiteRuns, runs_of


def _launch(runs: SuiteRuns, launcher: str, jobs: int | None, devices: str | None) -> None:
    from experiments.suites import launch

    match launcher:
        case "local":
            gpus = devices.split(",") if devices else []
            sys.exit(launch.local(runs, max(1, len(gpus)) if jobs is None else jobs, gpus))
        case "slurm":
            launch.slurm(runs)
        case "print":
            launch.to_print(runs)


def _show(runs: SuiteRuns, index: int) -> None:
    print("\n".join(runs[index].overrides))


def _run(runs: SuiteRuns, index: int) -> None:
    from experiments import train

    print(json.dumps(asdict(read_summary(train.run(runs[index].overrides)))))


def _latency(runs: SuiteRuns) -> None:
    from experiments.suites.latency import suite_latencies

    print(json.dumps(suite_latencies(runs), indent=1))


def _parser(suite_name: str | None) -> argparse.ArgumentParser:
    """Of all commands; they ask for a suite where none is named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("plan", "status", "launch", "show", "run", "latency"):
        command = commands.add_parser(name)
        if suite_name is None:
            command.add_argument("suite")
        if name in ("show", "run"):
            command.add_argument("index", type=int)
        if name in ("plan", "status", "launch"):
            command.add_argument(
                "--cells", default="*", help="only cells of such names, as in 'resnet20 *54'"
            )
            command.add_argument("--seeds", help="only these seeds, as in 0,1")
        if name == "launch":
            command.add_argument("--launcher", choices=("local", "slurm", "print"), default="local")
            command.add_argument(
                "--jobs", type=int, help="runs at a time (default: one on each of --devices, or 1)"
            )
            command.add_argument("--devices", help="GPUs that share the jobs, as in 0,1")
    return parser


def _parsed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """What the command line gives, and its overrides; ends the process where it is wrong."""
    options, overrides = parser.parse_known_args()
    if unknown := [word for word in overrides if word.startswith("-") or "=" not in word]:
        parser.error(f"unknown option {unknown[0]}")
    if (
        options.command == "launch"
        and options.launcher != "local"
        and (options.jobs is not None or options.devices)
    ):
        parser.error(
            "--jobs and --devices are of this machine's processes: leave them out, or leave out --launcher"
        )
    return options, overrides


def _obey(runs: SuiteRuns, options: argparse.Namespace) -> None:
    match options.command:
        case "plan":
            print_plan(runs)
        case "status":
            print_status(runs)
        case "launch":
            _launch(runs, options.launcher, options.jobs, options.devices)
        case "show":
            _show(runs, options.index)
        case "run":
            _run(runs, options.index)
        case "latency":
            _latency(runs)


def main(suite_name: str | None = None) -> None:
    """The command; an artefact's entry point names its suite, everybody else gives one."""
    options, overrides = _parsed(_parser(suite_name))
    with plain_exits():
        runs = runs_of(suite_name or options.suite, overrides)
        if "cells" in options:
            runs = runs.choose(options.cells, options.seeds)
        _obey(runs, options)


if __name__ == "__main__":
    main()
