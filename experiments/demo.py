"""The main job on real images without a download: four ways to a ResNet-20 with 60 % of its MACs removed.

    python -m experiments.demo [overrides]

Trains dense, SFP, a thin network and PSAP on the handwritten digits (finished runs are not trained again),
measures the exported networks, and writes report.json and two pictures to runs/demo/: bought_and_paid.png, what pruning
bought and what it cost, and what_happened.png, what PSAP measured and decided.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from experiments import train
from experiments.exits import plain_exits
from experiments.models import image_shape, open_exported
from experiments.runs.summary import read_summary
from experiments.training.latency import ROUNDS, latencies_ms
from psap_core.surgery import ScatteredBatchNorm

METHODS = ("dense", "sfp", "thin", "psap")
BATCH = 256
VECTOR = 8  # float32 lanes of AVX2; other filter counts leave lanes empty
NOT_FALLEN = 0.9  # of the dense network's latency: the rest is within the noise of a busy machine


@dataclass(frozen=True)
class MethodResult:
    """One method of the report; latencies are medians of ROUNDS forward passes of the exported network."""

    method: str
    test_images: int
    top1: float
    top1_noise: float  # as `noise` says
    macs: int
    macs_cut: float
    params: int
    latency_ms: float  # one image
    latency_batch_ms: float  # BATCH images
    train_seconds: float
    export_max_relative_error: float


@dataclass(frozen=True)
class Facts:
    """What an exported network's latency is made of.

    Attributes:
        convolution_share: share of the time spent in convolutions, for one image and for a batch.
        filters: filters of its convolutions.
        scattered: residual outputs that it widens again to the full stream.
    """

    convolution_share: tuple[float, float]
    filters: tuple[int, ...]
    scattered: int


def noise(top1: float, images: int) -> float:
    """Points of top-1 by which two networks that are right equally often differ in one of twenty draws of test images.

    The draws are independent; `top1` in percent is the accuracy of both, of which Laplace's estimate is taken.
    """
    right = (top1 / 100 * images + 1) / (images + 2)
    return 100 * 1.96 * math.sqrt(2 * right * (1 - right) / images)


def convolution_share(network: nn.Module, images: Tensor) -> float:
    """Share of the time of a forward pass of `images` [N, C, H, W] that is spent in convolutions, on a CPU."""
    started, seconds = 0.0, 0.0

    def start(*_: object) -> None:
        nonlocal started
        started = time.perf_counter()

    def stop(*_: object) -> None:
        nonlocal seconds
        seconds += time.perf_counter() - started

    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    with torch.inference_mode():
        network(images)  # warm
        hooks = [layer.register_forward_pre_hook(start) for layer in convolutions]
        hooks += [layer.register_forward_hook(stop) for layer in convolutions]
        began = time.perf_counter()
        for _ in range(ROUNDS):
            network(images)
        total = time.perf_counter() - began
    for hook in hooks:
        hook.remove()
    return seconds / total


def why_not_faster(rows: list[MethodResult], facts: dict[str, Facts]) -> list[str]:
    """One sentence for every latency of a pruned network that did not fall; `facts` goes by method."""
    dense = next(row for row in rows if row.method == "dense")
    sentences = []
    for row in rows:
        fact = facts[row.method]
        odd = sum(filters % VECTOR != 0 for filters in fact.filters)
        reasons = [f"it starts as many convolutions ({len(fact.filters)})"]
        reasons += (
            [f"{odd} of them with a number of filters that is no multiple of {VECTOR}"]
            if odd
            else []
        )
        reasons += (
            [f"{fact.scattered} residual outputs are widened again"] if fact.scattered else []
        )
        for i, images, now, before in (
            (0, "one image", row.latency_ms, dense.latency_ms),
            (1, f"{BATCH} images", row.latency_batch_ms, dense.latency_batch_ms),
        ):
            if row.method == "dense" or now <= NOT_FALLEN * before:
                continue
            inside, was_inside = (
                fact.convolution_share[i] * now,
                facts["dense"].convolution_share[i] * before,
            )
            sentences.append(
                f"{row.method}, {images}: {now:.2f} ms, dense {before:.2f} ms, with {row.macs / dense.macs:.0%} of "
                f"the MACs. Convolutions take {inside:.2f} ms (dense {was_inside:.2f}), everything else "
                f"{now - inside:.2f} (dense {before - was_inside:.2f}): {', '.join(reasons)}."
            )
    return sentences


def measure(folders: dict[str, Path]) -> tuple[list[MethodResult], list[str]]:
    """The rows of finished runs, method to folder, and why a latency did not fall."""
    networks = {
        method: open_exported(folder / "export")[0].eval() for method, folder in folders.items()
    }
    image = torch.rand(1, *image_shape(folders["dense"] / "export"))
    batch = image.repeat(BATCH, 1, 1, 1)
    one_ms, batch_ms = latencies_ms(networks, image), latencies_ms(networks, batch)
    rows, facts = [], {}
    for method, folder in folders.items():
        summary = read_summary(folder)
        rows.append(
            MethodResult(
                method=method,
                test_images=summary.test_images,
                top1=summary.top1,
                top1_noise=noise(summary.top1, summary.test_images),
                macs=summary.macs,
                macs_cut=summary.macs_cut,
                params=summary.params,
                latency_ms=one_ms[method],
                latency_batch_ms=batch_ms[method],
                train_seconds=summary.train_seconds,
                export_max_relative_error=summary.export_max_relative_error,
            )
        )
        modules = list(networks[method].modules())
        facts[method] = Facts(
            (
                convolution_share(networks[method], image),
                convolution_share(networks[method], batch),
            ),
            tuple(module.out_channels for module in modules if isinstance(module, nn.Conv2d)),
            sum(isinstance(module, ScatteredBatchNorm) for module in modules),
        )
    return rows, why_not_faster(rows, facts)


def print_table(rows: list[MethodResult], console: Console) -> None:
    """What pruning bought, then what it cost, and how much of that is noise."""
    table = Table(title="exported networks, last epoch, one seed", box=SIMPLE)
    table.add_column("method")
    headings = ("MACs", "cut", "params", "1, ms", f"{BATCH}, ms", "trained, s", "top-1, %")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row.method,
            f"{row.macs / 1e6:.2f} M",
            f"{row.macs_cut:.1%}",
            f"{row.params:,}",
            f"{row.latency_ms:.2f}",
            f"{row.latency_batch_ms:.1f}",
            f"{row.train_seconds:.0f}",
            f"{row.top1:.2f}",
        )
    console.print(table)
    dense = next(row for row in rows if row.method == "dense")
    print(
        f"{dense.test_images} test images: differences below {dense.top1_noise:.1f} points mean nothing. One seed does "
        "not rank methods."
    )


def run_demo(overrides: list[str]) -> Path:
    """Train what is missing, print the table, write the report; returns its folder."""
    console = Console()
    folders = {}
    for number, method in enumerate(METHODS, start=1):
        console.print(f"[bold]{method}[/bold] ({number} of {len(METHODS)})")
        folders[method] = train.run(["experiment=demo_digits", f"method={method}", *overrides])
    rows, reasons = measure(folders)
    out = folders["dense"].parents[2] / "demo"  # beside the experiments, in the folder of all runs
    out.mkdir(exist_ok=True)
    (out / "report.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    comparison, inside = out / "bought_and_paid.png", out / "what_happened.png"
    draw = [sys.executable, "-m", "analysis.figures.overview"]
    for picture in (
        [str(comparison), "--report", str(out / "report.json")],
        [str(inside), *map(str, folders.values())],
    ):
        subprocess.run([*draw, *picture], check=True, stdout=subprocess.DEVNULL)

    print_table(rows, console)
    print(
        f"ms for one image and for a batch of {BATCH}: median of {ROUNDS}, networks in turn, "
        f"threads: {torch.get_num_threads()}"
    )
    print(
        "trained, s: one method after the other; what else the machine did meanwhile is in these times."
    )
    for reason in reasons:
        print(reason)
    print(f"\nPSAP's exported network: {folders['psap'] / 'export'}")
    print(f"report: {out / 'report.json'}")
    print(f"pictures: {comparison}, {inside}")
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="as in epochs=3")
    with plain_exits():
        run_demo(parser.parse_args().overrides)
