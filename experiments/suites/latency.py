"""How fast exported networks are on this machine: forward passes in eager PyTorch on the CPU."""

import statistics
import time
from collections import defaultdict
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from experiments.models import image_shape, open_exported
from experiments.runs.provenance import code_version
from experiments.suites.runs import SuiteRun, SuiteRuns
from experiments.training.devices import device_name
from psap_core import InputError

ROUNDS = 30
Name = TypeVar("Name", bound=Hashable)


def latencies_ms(networks: Mapping[Name, nn.Module], images: Tensor) -> dict[Name, float]:
    """Median milliseconds of a forward pass of `images` [N, C, H, W], over ROUNDS.

    The networks take turns, in alternating order, so that a machine that slows down slows all of them.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in networks}
    with torch.inference_mode():
        for number in range(-3, ROUNDS):  # the first three warm up
            for name in reversed([*networks]) if number % 2 else networks:
                began = time.perf_counter()
                networks[name](images)
                if number >= 0:
                    seconds[name].append(time.perf_counter() - began)
    return {name: 1000 * statistics.median(times) for name, times in seconds.items()}


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
