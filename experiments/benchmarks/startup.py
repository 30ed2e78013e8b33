"""How long commands take before they do anything.

import_seconds: importing psap_core.
help_seconds: `python -m experiments.train --help`.
done_seconds: `python -m experiments.train` for a run that is done: it prints the summary.
import_torch_seconds: importing torch alone, for comparison.
"""

import subprocess
import sys
import tempfile
from functools import partial

from experiments.benchmarks import Figures, figure, seconds

REPETITIONS = 2
RUN = [
    "experiment=digits_resnet20",
    "method=dense",
    "model.width=0.25",
    "data.train_images=64",
    "epochs=1",
    "optim.batch_size=64",
    "tracking.mode=disabled",
]


def startup() -> Figures:
    with tempfile.TemporaryDirectory() as folder:
        train = [sys.executable, "-m", "experiments.train"]
        done = [*train, *RUN, f"runs_dir={folder}"]
        _run(done)
        commands = {
            "import_torch_seconds": [sys.executable, "-c", "import torch"],
            "import_seconds": [sys.executable, "-c", "import psap_core; psap_core.PSAP"],
            "help_seconds": [*train, "--help"],
            "done_seconds": done,
        }
        turns = [
            {name: seconds(partial(_run, command)) for name, command in commands.items()}
            for _ in range(REPETITIONS)
        ]
    return {name: figure([turn[name] for turn in turns]) for name in commands}


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)
