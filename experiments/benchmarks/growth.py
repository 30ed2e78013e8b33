"""How the cost of an epoch with a pruning step grows with the work, on CIFAR-10-sized images, 50,000 an epoch.

A measurement trains a few batches of ResNet-20 and makes a pruning step to half of the MACs, with a pulse of 4 batches.
An epoch is its training steps (their median time as often as it has batches) and the pruning step.

growth_<what>_<how much>_epoch_seconds, growth_<what>_<how much>_step_seconds: of an epoch, and of its pruning step;
what: depth (20, 56, 110), batch (32, 64, 128), layers (of ResNet-56, in scope inner and all) and ranks (1, 2: processes
that share a batch, one thread each). Where it is not said: depth 20, batch 32, all layers.
"""

import json
import os
import statistics
import subprocess
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks import Figures, cifar_resnet, figure, seconds, sgd
from experiments.training import distributed
from psap_core import PSAP
from psap_core.groups import Scope

IMAGES, BATCH, STEPS, PULSE_BATCHES = 50_000, 32, 4, 4
DEPTHS, BATCHES, RANKS = (20, 56, 110), (32, 64, 128), (1, 2)
SCOPES: dict[str, Scope] = {"27": "inner", "55": "all"}  # pruned layers of ResNet-56


def growth() -> Figures:
    points = {f"depth_{depth}": measured(depth) for depth in DEPTHS}
    points |= {f"batch_{batch}": measured(20, batch) for batch in BATCHES}
    points |= {f"layers_{number}": measured(56, scope=scope) for number, scope in SCOPES.items()}
    points |= {f"ranks_{ranks}": _with(ranks) for ranks in RANKS}
    return {
        f"growth_{name}_{part}_seconds": figure([value])
        for name, timing in points.items()
        for part, value in zip(("epoch", "step"), timing, strict=True)
    }


def measured(depth: int, batch: int = BATCH, scope: Scope = "all") -> tuple[float, float]:
    """Seconds of an epoch and of its pruning step, on the first of all ranks."""
    with distributed.join() as world:
        torch.manual_seed(world.rank)
        model = cifar_resnet(depth)
        net, optimizer = world.wrap(model), sgd(model)
        images, labels = (
            torch.randn(batch // world.size, 3, 32, 32),
            torch.randint(10, (batch // world.size,)),
        )
        pruner = PSAP(
            model,
            optimizer,
            images[:1],
            target_macs_cut=0.5,
            total_epochs=8,
            start=1,
            ramp_end=1,
            freeze=2,
            pulse_batches=PULSE_BATCHES,
            scope=scope,
        )

        def loss_of_batch(batch: tuple[Tensor, Tensor]) -> Tensor:
            images, labels = batch
            return F.cross_entropy(net(images), labels)

        def train() -> None:
            optimizer.zero_grad()
            loss_of_batch((images, labels)).backward()
            optimizer.step()

        durations = [seconds(train) for _ in range(STEPS)][1:]
        step = pruner.end_epoch([(images, labels)] * PULSE_BATCHES, loss_of_batch)
        assert step is not None
        return -(-IMAGES // batch) * statistics.median(durations) + step.seconds, step.seconds


def _with(ranks: int) -> tuple[float, float]:
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={ranks}",
    ]
    command = [*launch, "-m", "experiments.benchmarks.growth"]
    epoch, step = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    )
    return epoch, step


def main() -> None:
    """One rank of a measurement; the first one prints it."""
    torch.set_num_threads(1)
    timing = measured(20)
    if os.environ["RANK"] == "0":
        print(json.dumps(timing))


if __name__ == "__main__":
    main()
