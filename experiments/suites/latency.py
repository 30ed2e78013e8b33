"""How fast exported networks are on this machine: forward passes in eager PyTorch on the CPU."""

from collections import defaultdict
from typing import Any

import torch

from experiments.models import image_shape, open_exported
from experiments.runs.provenance import code_version
from experiments.suites.runs import SuiteRun, SuiteRuns
from experiments.training.devices import device_name
from experiments.training.latency import ROUNDS, latencies_ms
from psap_core import InputError


def suite_latencies(suite_runs: SuiteRuns) -> dict[str, Any]:
    """Latency of every finished run's exported network, one image at a time: cell name to seed to milliseconds.

    Raises:
        InputError: no run is done.
    """
    groups: dict[tuple[int, ...], list[SuiteRun]] = defaultdict(list)
    for run in suite_runs.all:
        if run.record.done:
            groups[image_shape(run.record.folder / "export")].append(run)
    if not groups:
        raise InputError(f"no run of {suite_runs.suite.name} is done: launch it first")
    latencies: dict[str, dict[str, float]] = defaultdict(dict)
    for shape, runs in groups.items():
        networks = {
            run.index: open_exported(run.record.folder / "export")[0].eval() for run in runs
        }
        measured = latencies_ms(networks, torch.rand(1, *shape))
        for run in runs:
            latencies[run.cell.name][str(run.seed)] = measured[run.index]
    machine = {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        **code_version(),
    }
    return {**machine, "rounds": ROUNDS, "latency_ms": latencies}
