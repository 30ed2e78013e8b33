"""What a process computes on: device, threads, number formats, and the processes that read for it."""

import os
import platform
import socket

import torch

from experiments.schema import Config, RuntimeConfig
from experiments.training.distributed import World
from psap_core import InputError

MAX_THREADS = 1024  # far more crash the process


def configure(runtime: RuntimeConfig, world: World) -> torch.device:
    """Set torch's threads and say which device this process uses: with several processes, each its own GPU."""
    for name, value, least in (("threads", runtime.threads, 1), ("workers", runtime.workers, 0)):
        if value is not None and value < least:
            raise InputError(f"runtime.{name}={value} must be at least {least}")
    if runtime.threads is not None:
        if runtime.threads > MAX_THREADS:
            raise InputError(f"runtime.threads={runtime.threads} must be at most {MAX_THREADS}")
        torch.set_num_threads(runtime.threads)
    choices = ("auto", "cpu", "cuda")
    if runtime.device not in choices:
        raise InputError(f"runtime.device={runtime.device!r} must be one of {', '.join(choices)}")
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise InputError("runtime.device=cuda, but torch finds no CUDA device")
    if runtime.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise InputError(
            f"process {world.local_rank + 1} of this machine has no GPU of its own, there are {gpus}"
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def require_gpu(cfg: Config, device: torch.device) -> None:
    """Refuse to train ImageNet on a CPU, where an epoch takes days, unless that is asked for.

    Raises:
        InputError: the data are ImageNet, runtime.device is auto, and there is no GPU.
    """
    if cfg.data.name == "imagenet" and cfg.runtime.device == "auto" and device.type == "cpu":
        raise InputError(
            f"training on ImageNet needs a GPU, and torch finds none on {socket.gethostname()}: go where there is one, "
            "or add runtime.device=cpu"
        )


def has_bfloat16(device: torch.device) -> bool:
    """Does the device compute in bfloat16? A CPU without such instructions becomes an order slower."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def reading_workers(runtime: RuntimeConfig, world: World) -> int:
    """Processes that read photographs beside each training process."""
    if runtime.workers is not None:
        return runtime.workers
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world.size))
    return (
        max(1, len(os.sched_getaffinity(0)) // here)
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture, the instructions that torch uses of it, and cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores"
