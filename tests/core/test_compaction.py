"""After the freeze the network can train small: what it learns is what the masked one would have learned."""

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from psap_core import PSAP, InputError, compact_, export
from psap_core.surgery import cut_
from tests.core.networks import Small, loss_on, sgd, small_example

FREEZE, EPOCHS = 3, 5
SETTINGS: dict[str, Any] = {
    "target_macs_cut": 0.5, "min_filters": 1, "pulse_batches": 2,
    "total_epochs": EPOCHS, "start": 1, "ramp_end": 2, "freeze": FREEZE,
}  # fmt: skip
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd_nesterov": sgd,
    # A bias in front of a BatchNorm has no gradient but rounding, which a smaller eps would divide by its own size.
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-6, weight_decay=0.1),
}
SCOPES = ["coupled", "all", "inner"]
QUICK = [("sgd_nesterov", "coupled"), ("adamw", "all")]


class Run:
    """A training in float64, whose batches are a function of their position."""

    def __init__(self, optimizer: str, scope: str) -> None:
        torch.manual_seed(0)
        self.model = Small().double()
        self.optimizer = OPTIMIZERS[optimizer](self.model)
        example = small_example().double()
        self.pruner = PSAP(self.model, self.optimizer, example, scope=scope, **SETTINGS)

    def steps(self, count: int, seed: int) -> None:
        for step in range(count):
            self.optimizer.zero_grad()
            self.loss_of_batch(1000 * seed + step).backward()
            self.optimizer.step()

    def loss_of_batch(self, seed: int) -> Tensor:
        return loss_on(self.model, side=8, seed=seed)

    def epoch(self) -> None:
        done = self.pruner.epochs_done
        self.steps(3, seed=done)
        self.pruner.end_epoch(range(1000 * done + 500, 1000 * done + 510), self.loss_of_batch)

    def until(self, epochs: int) -> "Run":
        while self.pruner.epochs_done < epochs:
            self.epoch()
        return self

    def state(self) -> list[dict[str, Any]]:
        parts = [self.model.state_dict(), self.optimizer.state_dict(), self.pruner.state_dict()]
        file = io.BytesIO()
        torch.save(parts, file)
        file.seek(0)
        loaded: list[dict[str, Any]] = torch.load(file, weights_only=True)
        return loaded


def assert_same_network(small: nn.Module, masked: nn.Module) -> None:
    theirs = dict(masked.state_dict())
    assert small.state_dict().keys() == theirs.keys()
    for name, tensor in small.state_dict().items():
        assert tensor.shape == theirs[name].shape
        gap = (tensor - theirs[name]).abs().max()
        assert gap <= 1e-9 * theirs[name].abs().max(), name


@pytest.mark.parametrize(
    ("optimizer", "scope"),
    [
        pytest.param(
            optimizer,
            scope,
            marks=() if (optimizer, scope) in QUICK else pytest.mark.long,
        )
        for optimizer in OPTIMIZERS
        for scope in SCOPES
    ],
)
def test_the_small_network_learns_what_the_masked_one_learns(optimizer: str, scope: str) -> None:
    masked = Run(optimizer, scope).until(FREEZE)
    small = Run(optimizer, scope).until(FREEZE)
    small.pruner.compact_()
    assert sum(p.numel() for p in small.model.parameters()) < sum(
        p.numel() for p in masked.model.parameters()
    )
    for run in (masked, small):
        run.steps(30, seed=99)
    assert_same_network(small.model, export(masked.model, masked.pruner.plan))
    cut_(masked.model, masked.pruner.groups, masked.pruner.plan, [masked.optimizer])
    states = [[*run.optimizer.state.values()] for run in (small, masked)]
    for ours, theirs in zip(*states, strict=True):
        for kind, value in ours.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(value, theirs[kind], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("saved_at", [2, FREEZE, FREEZE + 1])
@pytest.mark.parametrize(
    "scope",
    ["coupled", *(pytest.param(scope, marks=pytest.mark.long) for scope in ("all", "inner"))],
)
def test_a_run_resumes_on_either_side_of_the_compaction(scope: str, saved_at: int) -> None:
    whole = Run("sgd_nesterov", scope).until(FREEZE)
    whole.pruner.compact_()
    whole.until(EPOCHS)

    first = Run("sgd_nesterov", scope).until(min(saved_at, FREEZE))
    if saved_at >= FREEZE:
        first.pruner.compact_()
        first.until(saved_at)
    model, optimizer, pruner = first.state()
    second = Run("sgd_nesterov", scope)
    if pruner["is_compact"]:
        second.pruner.load_state_dict(pruner)
    second.model.load_state_dict(model)
    second.optimizer.load_state_dict(optimizer)
    if not pruner["is_compact"]:
        second.pruner.load_state_dict(pruner)
    assert second.pruner.epochs_done == saved_at
    second.until(FREEZE)
    second.pruner.compact_()
    second.until(EPOCHS)
    assert second.pruner.plan == whole.pruner.plan
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name
    momenta = [
        [s["momentum_buffer"] for s in run.optimizer.state.values()] for run in (second, whole)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*momenta, strict=True))


def test_compact_without_a_pruner_is_the_export_in_place() -> None:
    run = Run("adamw", "coupled").until(EPOCHS)
    small = export(run.model, run.pruner.plan)
    with pytest.raises(InputError, match="serves a PSAP"):  # its hook would meet smaller tensors
        compact_(run.model, run.pruner.plan, run.optimizer)
    run.pruner.use(torch.optim.SGD(run.model.parameters(), 0.01))
    compact_(run.model, run.pruner.plan, run.optimizer)
    assert all(
        torch.equal(a, b) for a, b in zip(run.model.parameters(), small.parameters(), strict=True)
    )
    for parameter, state in run.optimizer.state.items():
        assert all(value.shape in ((), parameter.shape) for value in state.values())
    run.steps(1, seed=0)


def test_a_live_filter_is_not_cut() -> None:
    run = Run("sgd_nesterov", "coupled").until(FREEZE)
    group, part = next(pair for pair in run.pruner.plan.match(run.pruner.groups) if pair[1].pruned)
    silencer = group.silencers[0]
    with torch.no_grad():
        run.model.get_parameter(silencer.tensor)[silencer.index[part.pruned[0]]] = 0.5
    before = copy.deepcopy(run.model.state_dict())
    with pytest.raises(InputError, match="a pruned filter came back to life"):
        run.pruner.compact_()
    with pytest.raises(InputError, match="weights do not fit the plan: 1 of the filters"):
        compact_(run.model, run.pruner.plan)
    assert all(torch.equal(before[name], tensor) for name, tensor in run.model.state_dict().items())


RANK = """
import sys
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tests.core.networks import loss_on
from tests.core.test_compaction import Run, FREEZE

rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
run = Run("sgd_nesterov", "coupled")
wrapper = DistributedDataParallel(run.model)
run.loss_of_batch = lambda seed: loss_on(wrapper, side=8, seed=2 * seed + rank)
run.until(FREEZE)
run.pruner.compact_()
wrapper = DistributedDataParallel(run.model)
run.until(FREEZE + 2)
print(run.pruner.plan.digest)
print(sum(p.double().sum().item() for p in run.model.parameters()))
distributed.destroy_process_group()
"""


@pytest.mark.long
def test_two_ranks_train_the_small_network(tmp_path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), tmp_path / "store"],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    printed = [rank.communicate()[0].splitlines() for rank in ranks]
    assert len(printed[0]) == 2
    assert printed[0] == printed[1]


def test_a_run_resumes_with_another_example_of_the_same_shape() -> None:
    first = Run("sgd_nesterov", "coupled").until(2)
    model, _, pruner = first.state()
    second = Run("sgd_nesterov", "coupled")
    other = PSAP(
        second.model, sgd(second.model), small_example().double() + 1, scope="coupled", **SETTINGS
    )
    second.model.load_state_dict(model)
    other.load_state_dict(pruner)
    assert other.plan == first.pruner.plan
