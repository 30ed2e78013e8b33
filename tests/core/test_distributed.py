"""Two ranks with unequal data make the same plans through reduced gradients, and are caught if they do not."""

import subprocess
import sys

import pytest

from tests.limits import HANG_SECONDS

RANK = """
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from psap_core import PSAP, InputError
from tests.core.networks import Small, loss_on, sgd, small_example

rank, reduced, scope = int(sys.argv[1]), sys.argv[3] == "reduced", sys.argv[4]
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
torch.manual_seed(0)
model = Small()
wrapper = DistributedDataParallel(model)
optimizer = sgd(model)
pruner = PSAP(model, optimizer, small_example(), target_macs_cut=0.5, total_epochs=6, start=1, ramp_end=4, freeze=5,
              min_filters=1, pulse_batches=3, margin=1.0, scope=scope)
net = wrapper if reduced else model
try:
    for epoch in range(6):
        for batch in range(3):
            optimizer.zero_grad()
            loss_on(wrapper, side=8, batch=4 + 4 * rank, seed=1000 * rank + 10 * epoch + batch).backward()
            optimizer.step()
        seeds = [1000 * rank + 10 * epoch + k + 5 for k in range(3)]
        step = pruner.end_epoch(seeds, lambda seed: loss_on(net, side=8, seed=seed))
        if step:
            print(step.plan.digest, flush=True)
except InputError as error:
    print(f"refused: {error}", flush=True)
distributed.destroy_process_group()
"""


def two_ranks(tmp_path, mode: str, scope: str) -> list[list[str]]:
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), tmp_path / "store", mode, scope],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    return [rank.communicate(timeout=HANG_SECONDS)[0].splitlines() for rank in ranks]


@pytest.mark.parametrize(
    "scope",
    ["coupled", *(pytest.param(scope, marks=pytest.mark.long) for scope in ("all", "inner"))],
)
def test_ranks_with_unequal_data_make_the_same_plans(tmp_path, scope: str) -> None:
    first, second = two_ranks(tmp_path, "reduced", scope)
    assert len(first) == 5
    assert first == second


def test_a_difference_between_ranks_is_caught(tmp_path) -> None:
    for printed in two_ranks(tmp_path, "own", "all"):
        assert printed[-1].startswith("refused: the ranks made different plans")
