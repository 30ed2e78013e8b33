"""Peak resident memory of training torchvision's ResNet-50, batch 32 at 224 pixels, each in a process of its own.

peak_memory_gib_{dense,psap}: largest resident set; PSAP with two pruning steps to half of the MACs, pulses included.
psap_memory_overhead_pct: how much more PSAP needs.
"""

import resource
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks import Figures, figure, sgd
from psap_core import PSAP

BATCH, SIZE, REPETITIONS = 32, 224, 2
EPOCHS = 3  # of one training step each: enough for every allocation to have happened


def memory() -> Figures:
    peaks: dict[str, list[float]] = {"dense": [], "psap": []}
    for _ in range(REPETITIONS):
        for method, method_peaks in peaks.items():
            command = [sys.executable, "-m", "experiments.benchmarks.memory", method]
            method_peaks.append(
                float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            )
    more = [
        100 * (psap / dense - 1) for dense, psap in zip(peaks["dense"], peaks["psap"], strict=True)
    ]
    figures = {
        f"peak_memory_gib_{method}": figure(method_peaks) for method, method_peaks in peaks.items()
    }
    return figures | {"psap_memory_overhead_pct": figure(more)}


def main() -> None:
    """Train, and print the peak in GiB."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model = resnet50()
    optimizer = sgd(model)
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(1000, (BATCH,))

    def loss_of_batch(batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    pruner = None
    if sys.argv[1] == "psap":
        pruner = PSAP(
            model,
            optimizer,
            images[:1],
            scope="all",
            target_macs_cut=0.5,
            total_epochs=EPOCHS,
            fan="out",
            pulse_batches=2,
            start=1,
            ramp_end=2,
            freeze=3,
        )
    for _ in range(EPOCHS):
        optimizer.zero_grad()
        loss_of_batch((images, labels)).backward()
        optimizer.step()
        if pruner is not None:
            pruner.end_epoch([(images, labels)] * 2, loss_of_batch)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


if __name__ == "__main__":
    main()
