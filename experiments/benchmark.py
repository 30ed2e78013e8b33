"""What the suite costs: `python -m experiments.benchmark [section ...] [--out runs/bench/report.json]`.

Writes `{"machine": {...}, "figures": {NAME: {"median": x, "spread": [low, high], "n": k}}}` and prints a table; what
each figure means stands in its section's module, experiments/benchmarks/<section>.py. Without sections: all but
mobilenet, memory, scopes, the two compactions and zoo, and gpu only where there is one; about 6 minutes on two cores.

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
scopes    ResNet-50 with 52 % of its MACs cut in scopes coupled and all, beside an evenly thinner one
compaction  whole trainings of ResNet-50 that get small at the freeze, beside dense ones (10 minutes on two cores)
compaction_small  the same of the ResNet-20 that docs/results.md is about (half an hour on two cores)
zoo       whether torchvision's and timm's convolutional networks can be pruned (an hour on two cores)
"""

import argparse
import json
import pkgutil
import platform
import sys
import time
from pathlib import Path
from typing import Any

SECTIONS = (
    "pruning",
    "training",
    "files",
    "startup",
    "growth",
    "loader",
    "latency",
    "mobilenet",
    "gpu",
    "memory",
    "scopes",
    "compaction",
    "compaction_small",
    "zoo",
)
# Sections without a module of their name.
MODULES = {
    "mobilenet": "latency",
    "compaction_small": "compaction",
}
LEFT_OUT = {
    "mobilenet",
    "memory",
    "scopes",
    "compaction",
    "compaction_small",
    "zoo",
}  # unless they are named


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="section")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/report.json"))
    options = parser.parse_args()
    if unknown := sorted({*options.sections} - {*SECTIONS}):
        parser.error(f"there is no section {unknown[0]!r}: choose from {', '.join(SECTIONS)}")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        if options.out.is_dir():
            raise IsADirectoryError("it is a folder")
    except OSError as error:
        parser.error(f"--out={options.out} cannot be written: {error}")

    import torch  # takes seconds

    from experiments.benchmarks.latency import latency_table
    from experiments.runs.provenance import code_version
    from experiments.training.devices import device_name

    has_gpu = torch.cuda.is_available()
    sections = options.sections or [
        name for name in SECTIONS if name not in LEFT_OUT and (has_gpu or name != "gpu")
    ]
    if "gpu" in sections and not has_gpu:
        parser.error("the section gpu needs a CUDA device")
    torch.manual_seed(0)
    machine = {
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **code_version(),
    }
    if has_gpu:
        machine["gpu"] = device_name(torch.device("cuda"))
    figures: dict[str, dict[str, Any]] = {}
    for section in sections:
        began = time.perf_counter()
        module = MODULES.get(section, section)
        section_figures = pkgutil.resolve_name(f"experiments.benchmarks.{module}:{section}")()
        print(f"{section}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        for name, values in section_figures.items():
            low, high = values["spread"]
            print(
                f"{name:48} {values['median']:10.3f}   [{low:.3f}, {high:.3f}]   n={values['n']}",
                flush=True,
            )
        figures |= section_figures
    if {"latency", "mobilenet"} & {*sections}:
        print(latency_table(figures))
    options.out.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
