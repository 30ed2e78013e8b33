"""What saving, loading and exporting torchvision's ResNet-50 costs, half of its MACs pruned.

checkpoint_seconds_resnet50: writing weights, momentum and the pruner's snapshots, safe against a kill.
resume_seconds: reading them back into a network, an optimiser and a pruner.
export_seconds_resnet50: building the small network and writing its folder.
"""

import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from experiments.benchmarks import Figures, figure, seconds, sgd
from experiments.training import checkpoint
from psap_core import PSAP, export, save_exported
from psap_core.files import write_atomically

REPETITIONS = 3


def files() -> Figures:
    from torchvision.models import resnet50

    model = resnet50()
    optimizer = sgd(model)
    F.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([0, 1])).backward()
    optimizer.step()
    pruner = PSAP(
        model,
        optimizer,
        torch.zeros(1, 3, 224, 224),
        scope="all",
        target_macs_cut=0.5,
        total_epochs=4,
        fan="out",
        protection=False,
        start=1,
        ramp_end=2,
        freeze=3,
    )
    for _ in range(2):
        pruner.end_epoch([], lambda batch: torch.zeros(()))
    parts = {"model": model, "optimizer": optimizer, "method": pruner}
    saving, loading, exporting = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "last.pt")

        def save() -> None:
            state = {name: part.state_dict() for name, part in parts.items()}
            write_atomically(path, checkpoint.checkpoint_bytes(state))

        def load() -> None:
            state = checkpoint.load_checkpoint(path)
            for name, part in parts.items():
                part.load_state_dict(state[name])

        def write(place: Path) -> None:
            save_exported(place, export(model, pruner.plan), pruner.plan, {})

        for number in range(REPETITIONS):
            saving.append(seconds(save))
            loading.append(seconds(load))
            exporting.append(seconds(partial(write, Path(folder, str(number)))))
    return {
        "checkpoint_seconds_resnet50": figure(saving),
        "resume_seconds": figure(loading),
        "export_seconds_resnet50": figure(exporting),
    }
