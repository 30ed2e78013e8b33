"""One of two ranks that train on unequal data: python -m tests.core.ranks RANK STORE."""

import json
import sys

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from psap_core import PSAP, InputError
from tests.core.networks import Small, loss_on, sgd, small_example

rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)


def train(reduced, scope):
    """What a training says: the digest of every plan, or why it was refused."""
    torch.manual_seed(0)
    model = Small()
    wrapper = DistributedDataParallel(model)
    optimizer = sgd(model)
    pruner = PSAP(
        model,
        optimizer,
        small_example(),
        target_macs_cut=0.5,
        total_epochs=6,
        start=1,
        ramp_end=4,
        freeze=5,
        min_filters=1,
        pulse_batches=3,
        margin=1.0,
        scope=scope,
    )
    net = wrapper if reduced else model
    for epoch in range(6):
        for batch in range(3):
            optimizer.zero_grad()
            loss_on(
                wrapper, side=8, batch=4 + 4 * rank, seed=1000 * rank + 10 * epoch + batch
            ).backward()
            optimizer.step()
        seeds = [1000 * rank + 10 * epoch + k + 5 for k in range(3)]
        try:
            step = pruner.end_epoch(seeds, lambda seed: loss_on(net, side=8, seed=seed))
        except InputError as error:
            yield f"refused: {error}"
            return
        if step:
            yield step.plan.digest


says = {scope: [*train(True, scope)] for scope in ("coupled", "all", "inner")}
print(json.dumps({**says, "gradients of its own": [*train(False, "all")]}))
distributed.destroy_process_group()
