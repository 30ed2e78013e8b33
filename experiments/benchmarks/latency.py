"""Latency of exported networks, dense and pruned on the same backend, beside the MACs ratio.

Half of the filters of every pruned layer, those of smallest norm, are removed from torchvision's ResNet-50 (inside its
blocks: scope `inner`, the stem excluded; and scope `all`, whose residual outputs are scattered) or MobileNetV2 (scope
`inner`). Latency does not depend on the weights: they are random. Input 224x224, float32, CPU.

macs_ratio_<network>: dense over pruned MACs.
latency_ms_<network>_b<batch>_<backend>_{dense,pruned}: milliseconds of a forward pass.
latency_speedup_<network>_b<batch>_<backend>: dense over pruned, in turns; without backend: the largest median.
"""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor

from experiments.benchmarks import Figures, figure, seconds
from psap_core import PrunePlan, export, export_onnx, macs
from psap_core.cost import macs_cost_model
from psap_core.groups import Scope, find_groups
from psap_core.inputs import describe
from psap_core.plan import make_plan
from psap_core.scoring import filter_norms, joint_scores
from psap_core.suspension import apply_, filter_tensors

Networks = dict[str, tuple[Scope, tuple[str, ...]]]  # figure name: scope, excluded layers
RESNET50: Networks = {"resnet50": ("inner", ("conv1",)), "resnet50_all": ("all", ())}
MOBILENET_V2: Networks = {"mobilenet_v2": ("inner", ())}
ROUNDS = {1: 31, 16: 3}
SIZE = 224
Run = Callable[[Tensor], object]


def latency() -> Figures:
    return _latency("resnet50", RESNET50)


def mobilenet() -> Figures:
    return _latency("mobilenet_v2", MOBILENET_V2)


def _latency(network: str, networks: Networks) -> Figures:
    from torchvision.models import get_model

    figures: Figures = {}
    example = torch.zeros(1, 3, SIZE, SIZE)
    backends = {"eager": _eager, "compiled": _compiled, "onnx": _onnx}
    torch.manual_seed(0)
    dense = get_model(network, weights=None).eval()
    dense_runs: dict[str, Run] = {}
    for name, (scope, exclude) in networks.items():
        pruned, plan = _pruned(dense, scope, exclude)
        figures[f"macs_ratio_{name}"] = figure([macs(dense, example) / macs(pruned, example)])
        dense_runs = dense_runs or {
            backend: make(dense, plan) for backend, make in backends.items()
        }
        runs = {
            backend: (dense_runs[backend], make(pruned, plan)) for backend, make in backends.items()
        }
        for batch, rounds in ROUNDS.items():
            images, speedups = torch.randn(batch, 3, SIZE, SIZE), []
            for backend, pair in runs.items():
                rows = [
                    [1000 * seconds(partial(run, images)) for run in pair]
                    for _ in range(rounds + 1)
                ][1:]
                key = f"{name}_b{batch}_{backend}"
                figures[f"latency_ms_{key}_dense"] = figure([row[0] for row in rows])
                figures[f"latency_ms_{key}_pruned"] = figure([row[1] for row in rows])
                figures[f"latency_speedup_{key}"] = figure([row[0] / row[1] for row in rows])
                speedups.append(figures[f"latency_speedup_{key}"])
            figures[f"latency_speedup_{name}_b{batch}"] = max(
                speedups, key=lambda speedup: speedup["median"]
            )
    return figures


def _pruned(
    dense: nn.Module, scope: Scope, exclude: tuple[str, ...]
) -> tuple[nn.Module, PrunePlan]:
    """A network's pruned export (which equals the masked network to 1e-9, or export refuses)."""
    example = torch.zeros(1, 3, SIZE, SIZE)
    groups = find_groups(dense, example, scope=scope, exclude=exclude)
    lowest = {}
    for group in groups:
        writers = filter_tensors(dense, group).filter_rows()
        norms = joint_scores([filter_norms(writer.rows) for writer in writers])
        lowest[group.name] = norms.argsort()[: group.filters // 2].tolist()
    cost = macs_cost_model(dense, groups, example)
    plan = make_plan(groups, lowest, cost, describe(example), scope)
    masked = copy.deepcopy(dense)
    apply_(masked, groups, plan)
    return export(masked, plan), plan


def _eager(network: nn.Module, plan: PrunePlan) -> Run:
    laid_out = copy.deepcopy(network).to(memory_format=torch.channels_last)
    return lambda images: _inferred(laid_out, images.to(memory_format=torch.channels_last))


def _compiled(network: nn.Module, plan: PrunePlan) -> Run:
    laid_out = copy.deepcopy(network).to(memory_format=torch.channels_last)
    compiled = torch.compile(laid_out, dynamic=False)

    def run(images: Tensor) -> object:
        with inductor.patch(
            freezing=True
        ):  # weights are constants, as in ONNX; compile's `options` do not do that
            return _inferred(compiled, images.to(memory_format=torch.channels_last))

    return run


@torch.inference_mode()
def _inferred(network: Run, images: Tensor) -> object:
    return network(images)


def _onnx(network: nn.Module, plan: PrunePlan) -> Run:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        export_onnx(network, path, plan)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        # So long its threads spin, then they sleep.
        options.add_session_config_entry("session.intra_op.spin_duration_us", "200")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def latency_table(figures: Figures) -> str:
    """The figures as a markdown table, medians, and the range of the speed-ups."""
    lines = [
        "| network | MACs | batch | backend | dense ms | pruned ms | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in [name for name in (RESNET50 | MOBILENET_V2) if f"macs_ratio_{name}" in figures]:
        ratio = figures[f"macs_ratio_{name}"]["median"]
        for batch in ROUNDS:
            for backend in ("eager", "compiled", "onnx"):
                key = f"{name}_b{batch}_{backend}"
                ms = [figures[f"latency_ms_{key}_{kind}"]["median"] for kind in ("dense", "pruned")]
                cells = [
                    name,
                    f"{ratio:.2f}x fewer",
                    str(batch),
                    backend,
                    *(f"{value:.1f}" for value in ms),
                ]
                speedup = figures[f"latency_speedup_{key}"]
                low, high = speedup["spread"]
                lines.append(
                    f"| {' | '.join(cells)} | {speedup['median']:.2f}x [{low:.2f}, {high:.2f}] |"
                )
    return "\n".join(lines)
