"""Several processes as one training: torchrun starts them, DistributedDataParallel joins their gradients."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from experiments.exits import ProcessLost
from psap_core import InputError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a training, and which of them this one is; alone, every method is free.

    Attributes:
        rank: number of this process; only the first writes files.
        size: number of processes.
        local_rank: number of this process on its machine, and of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a CPU tensor over the ranks."""
        if self.size > 1:
            distributed.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Is the flag set on some rank?"""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))))

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        values = [value] * self.size
        if self.size > 1:
            distributed.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every rank is here."""
        self.any(False)

    def first(self, make: Callable[[], T]) -> T | None:
        """What the first rank makes while the others wait; None on the others.

        Raises:
            InputError: on every rank, where the first one refuses.
        """
        made, refusal = None, None
        if self.is_first:
            try:
                made = make()
            except InputError as error:
                refusal = str(error)
        if refusals := list(filter(None, self.gather(refusal))):
            raise InputError(refusals[0])
        return made

    def say(self, text: str) -> None:
        """One line on stderr, of the first rank: what a run is about to do."""
        if self.is_first:
            print(text, file=sys.stderr, flush=True)

    def wrap(self, net: nn.Module) -> nn.Module:
        """The network whose backward pass averages gradients over the ranks."""
        return DistributedDataParallel(net) if self.size > 1 else net

    def settle(self, net: nn.Module, example: Tensor) -> None:
        """Let a wrapped network see a backward pass, after which DistributedDataParallel orders its sums anew.

        Otherwise more than two ranks would round a continued run's first step as they round no other.
        """
        if self.size > 1:
            net.eval()(example).sum().backward()
            net.zero_grad()

    def synchronised(self, net: nn.Module, now: bool) -> AbstractContextManager[None]:
        """Inside, a backward pass averages gradients over the ranks, or leaves them to a later one."""
        return (
            nullcontext() if now or not isinstance(net, DistributedDataParallel) else net.no_sync()
        )

    @torch.no_grad()
    def share_buffers_(self, model: nn.Module) -> None:
        """Every rank takes the first one's BatchNorm statistics."""
        for buffer in model.buffers() if self.size > 1 else ():
            distributed.broadcast(buffer, 0)


LOST = {  # what torch says of it
    "DataLoader worker": "a process that reads images was killed; too little memory asks for fewer runtime.workers",
    "Connection closed by peer": "another process of the training was killed",
    "Connection reset by peer": "another process of the training was killed",
}


@contextmanager
def lost_processes() -> Iterator[None]:
    """Errors that only say that another process is gone become ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        for words, meaning in LOST.items():
            if words in str(error):
                raise ProcessLost(meaning) from error
        raise


@contextmanager
def join() -> Iterator[World]:
    """The world that torchrun describes in the environment; a process started otherwise is alone."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World()
        return
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield World(distributed.get_rank(), size, int(os.environ["LOCAL_RANK"]))
    distributed.destroy_process_group()  # not after an error: the others may be gone
