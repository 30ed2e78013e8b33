"""Trainings of one and two ranks on the same global batches, in float64; prints plans and utilities as JSON.

One process imports torch and forks every rank of every job.
"""

import json
import os
import socket
from collections.abc import Iterator

import sklearn.datasets  # noqa: F401  (here and not in every child: it takes a second)
import torch
import torch._dynamo  # the same
import torch.nn.functional as F
from torch import nn

from experiments import data
from experiments.configuration import compose
from experiments.data import tensor_images
from experiments.data.base import Batch, Normalisation, Sharing
from experiments.methods.base import Callback, Metrics
from experiments.models import build
from experiments.training.distributed import join
from experiments.training.loop import Loop, Position
from experiments.training.steps import Steps
from psap_core import PSAP

JOBS = {  # name: ranks, micro-batches, fixed statistics?
    "one rank, fixed statistics": (1, 1, True),
    "two ranks, fixed statistics": (2, 1, True),
    "two micro-batches, fixed statistics": (1, 2, True),
    "two ranks, batch statistics": (2, 1, False),
}
EPOCHS = 6
CPU = torch.device("cpu")


class Double:
    """Images in float64."""

    def __init__(self, images: tensor_images.TensorLoader) -> None:
        self.images, self.batches = images, images.batches

    def __len__(self) -> int:
        return len(self.images)

    def epoch(self, stream: str, epoch: int, first: int = 0) -> Iterator[Batch]:
        for batch in self.images.epoch(stream, epoch, first):
            yield batch._replace(parts=[(x.double(), y) for x, y in batch.parts])


def train(accumulate: int, fixed_statistics: bool) -> list[str]:
    """Digests of five pruning steps on this rank, with the sum of what their pulses saw."""
    cfg = compose(
        "train", ["experiment=digits_resnet20", "model.width=0.25", "data.train_images=192"]
    )
    torch.manual_seed(0)
    model = build(cfg.model, 1, 10).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and fixed_statistics:
            module.eval()
            module.train = lambda mode=True: None
    found: list[str] = []

    def loss_of_batch(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        pixels, labels = batch
        return F.cross_entropy(net(pixels), labels)

    class Prune(Callback):
        def end_epoch(self, epochs_done: int) -> Metrics:
            epoch = images.epoch("pulse", epochs_done)
            batches = (part for batch in epoch for part in batch.parts)
            step = pruner.end_epoch(batches, loss_of_batch)
            if step is not None:
                utilities = [u for of_group in step.utility.values() for u, _ in of_group.values()]
                found.append(f"{step.plan.digest} {sum(map(abs, utilities)):.5e}")
            return {}

    with join() as world:
        net = world.wrap(model)
        sharing = Sharing(64, world.rank, world.size, accumulate)
        split = data.load_resident(cfg.data)
        images = Double(split.training(sharing, Normalisation((0.3053,), (0.376,)), 0, CPU, 0))
        optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True)
        pruner = PSAP(
            model,
            optimizer,
            torch.zeros(1, 1, 8, 8).double(),
            target_macs_cut=0.5,
            total_epochs=EPOCHS,
            start=1,
            ramp_end=4,
            freeze=5,
            pulse_batches=2 * accumulate,
            scope="coupled",
        )
        steps = Steps(net, optimizer, images, world, CPU, None, lambda: None)
        Loop(
            model,
            steps,
            world,
            Prune(),
            EPOCHS,
            lambda epoch: 0.02,
            lambda: 0.0,
            lambda metrics: None,
            lambda position: None,
            lambda: False,
            lambda: None,
            Position(),
        ).train()
    return found


def main() -> None:
    torch.set_num_threads(1)
    result: dict[str, list[list[str]]] = {}
    for name, (ranks, *job) in JOBS.items():
        with socket.create_server(("127.0.0.1", 0)) as free:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        pipes = []
        for rank in range(ranks):
            read, write = os.pipe()
            pipes.append(read)
            if os.fork() == 0:
                os.environ |= {"WORLD_SIZE": str(ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
                os.write(write, json.dumps(train(*job)).encode())
                os._exit(0)
            os.close(write)
        result[name] = [json.loads(os.fdopen(read).read()) for read in pipes]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
