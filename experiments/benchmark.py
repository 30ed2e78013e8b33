"""What the suite costs: `python -m experiments.benchmark [section ...] [--out runs/bench/report.json]`.

Writes `{"machine": {...}, "figures": {NAME: {"median": x, "spread": [low, high], "n": k}}}` and prints a table; what
each figure means stands in its section's module, experiments/benchmarks/<section>.py. Without sections: all but
mobilenet and memory, and gpu only where there is one; under 6 minutes on two idle cores.

pruning   what a pruning step, its pulse and the hook between steps cost
training  a training step on CIFAR-10, and its augmentation beside PIL's
files     checkpoint, resume and export of ResNet-50
startup   how long commands take before they do anything
growth    how an epoch's and a pruning step's cost grow with depth, batch, pruned layers and processes
loader    photographs read, per second and core, beside plain torchvision
latency   exported ResNet-50, dense and pruned on three backends
mobilenet the same for MobileNetV2
gpu       epochs on a GPU, captured and eager, and several runs side by side
memory    peak memory of PSAP training against dense training of ResNet-50 (6 minutes on two cores)
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

from experiments.benchmarks import Figures
from experiments.benchmarks.files import files
from experiments.benchmarks.gpu import gpu
from experiments.benchmarks.growth import growth
from experiments.benchmarks.latency import latency, latency_table, mobilenet
from experiments.benchmarks.loader import loader
from experiments.benchmarks.memory import memory
from experiments.benchmarks.pruning import pruning
from experiments.benchmarks.startup import startup
from experiments.benchmarks.training import training
from experiments.harness.devices import device_name
from experiments.harness.entry import plain_exits
from experiments.harness.record import code_version

ALL = (pruning, training, files, startup, growth, loader, latency, mobilenet, gpu, memory)
SECTIONS = {section.__name__: section for section in ALL}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="section")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/report.json"))
    given = parser.parse_args()
    left_out = {"mobilenet", "memory"} | (set() if torch.cuda.is_available() else {"gpu"})
    sections = given.sections or [name for name in SECTIONS if name not in left_out]
    if unknown := sorted(set(sections) - SECTIONS.keys()):
        parser.error(f"there is no section {unknown[0]!r}: choose from {', '.join(SECTIONS)}")
    torch.manual_seed(0)
    machine = {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "python": platform.python_version(), **code_version()}
    if torch.cuda.is_available():
        machine["gpu"] = device_name(torch.device("cuda"))
    figures: Figures = {}
    for section in sections:
        began = time.perf_counter()
        with plain_exits():
            found = SECTIONS[section]()
        print(f"{section}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        for name, values in found.items():
            low, high = values["spread"]
            print(f"{name:48} {values['median']:10.3f}   [{low:.3f}, {high:.3f}]   n={values['n']}", flush=True)
        figures |= found
    if {"latency", "mobilenet"} & {*sections}:
        print(latency_table(figures))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
