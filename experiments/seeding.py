"""Random numbers: every stream has a name, and its seed is a stable function of that name."""

import hashlib

import torch


def stream_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on `parts` only: the same on every machine and in every process."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator of its own for the stream named by `parts`."""
    return torch.Generator().manual_seed(stream_seed(*parts))


def seed_everything(seed: int) -> None:
    """Seed torch's default generators and choose deterministic kernels; called before anything is made."""
    torch.manual_seed(stream_seed(seed, "default"))
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def seed_rank(seed: int, rank: int) -> None:
    """Give every rank but the first a default generator of its own, once all have made the same network."""
    if rank:
        torch.manual_seed(stream_seed(seed, "default", rank))
