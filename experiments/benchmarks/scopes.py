"""How much time saved MACs save, by scope: torchvision's ResNet-50 with some 52 % of its MACs removed.

coupled    streams get thinner: plain smaller modules
coupled_8  the same, kept counts in multiples of 8
all        what feeds a sum is scattered into its full width
thin       every width times 0.6875: the evenly thinner network, whose cut the others are given

One ratio for all groups, filters of smallest norm; speed does not depend on the weights, which are random.

macs_ratio_<network>: dense over pruned MACs.
train_step_ms_<network>, train_step_speedup_<network>: a training step, SGD with momentum, batch 16 at 128x128; the
    speed-up is dense over pruned, in turns.
inference_b<batch>_<backend>_ms_<network>, inference_b<batch>_<backend>_speedup_<network>: a forward pass at 224x224.
inference_b<batch>_speedup_<network>: of the backend with the largest median.
<figure>_share_of_thin: speed-up over the evenly thinner network's speed-up, from the medians.
"""

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import models
from experiments.benchmarks import Figures, figure, seconds, sgd
from experiments.schema import Fan, ModelConfig
from psap_core import PrunePlan, export, export_onnx, macs
from psap_core.allocation import filter_counts, filter_floors
from psap_core.cost import macs_cost_model
from psap_core.groups import Scope, find_groups
from psap_core.inputs import describe
from psap_core.plan import make_plan
from psap_core.scoring import filter_norms, joint_scores
from psap_core.suspension import apply_, filter_tensors

WIDTH = 0.6875
TRAIN_BATCH, TRAIN_SIZE, TRAIN_ROUNDS = 16, 128, 7
SIZE = 224
ROUNDS = {1: 15, 16: 5}
Run = Callable[[Tensor], object]


@dataclass(frozen=True)
class Network:
    """A network with the plan that made it (of the dense and the thin one: an empty plan)."""

    model: nn.Module
    plan: PrunePlan


def scopes() -> Figures:
    networks = _networks()
    example = torch.zeros(1, 3, SIZE, SIZE)
    dense_macs = macs(networks["dense"].model, example)
    figures: Figures = {}
    for name, network in networks.items():
        if name != "dense":
            figures[f"macs_ratio_{name}"] = figure([dense_macs / macs(network.model, example)])
    figures |= _training(networks)
    figures |= _inference(networks)
    return figures


def _networks() -> dict[str, Network]:
    torch.manual_seed(0)
    dense = models.build(ModelConfig("resnet50", 1.0, None, Fan("out")), 3, 1000)
    thin = models.build(ModelConfig("resnet50", WIDTH, None, Fan("out")), 3, 1000)
    example = torch.zeros(1, 3, SIZE, SIZE)
    cut = 1 - macs(thin, example) / macs(dense, example)
    nothing = make_plan((), {}, macs_cost_model(dense, (), example), describe(example), "coupled")
    return {
        "dense": Network(dense, nothing),
        "coupled": _pruned(dense, "coupled", cut, 1),
        "coupled_8": _pruned(dense, "coupled", cut, 8),
        "all": _pruned(dense, "all", cut, 1),
        "thin": Network(thin, nothing),
    }


def _pruned(dense: nn.Module, scope: Scope, cut: float, round_to: int) -> Network:
    """One ratio for all groups, the smallest norms; verified against the masked network by `export`."""
    example = torch.zeros(1, 3, SIZE, SIZE)
    groups = find_groups(dense, example, scope=scope)
    cost = macs_cost_model(dense, groups, example)
    floors = filter_floors(cost.filters, round_to=round_to)
    kept = filter_counts([0.0] * len(groups), cost, cost.budget(cut), floors, 0.0, round_to)
    lowest = {}
    for group, count in zip(groups, kept, strict=True):
        writers = filter_tensors(dense, group).filter_rows()
        norms = joint_scores([filter_norms(writer.rows) for writer in writers])
        lowest[group.name] = norms.argsort()[: group.filters - count].tolist()
    plan = make_plan(groups, lowest, cost, describe(example), scope, cut)
    masked = copy.deepcopy(dense)
    apply_(masked, groups, plan)
    return Network(export(masked, plan), plan)


def _training(networks: Mapping[str, Network]) -> Figures:
    images = torch.randn(TRAIN_BATCH, 3, TRAIN_SIZE, TRAIN_SIZE)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (TRAIN_BATCH,))
    steps = {name: _step(network.model, images, labels) for name, network in networks.items()}
    return _in_turns(steps, TRAIN_ROUNDS, "train_step")


def _step(network: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], object]:
    model = copy.deepcopy(network).to(memory_format=torch.channels_last).train()
    optimizer = sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def _inference(networks: Mapping[str, Network]) -> Figures:
    backends = {
        "eager": {name: _eager(network) for name, network in networks.items()},
        "onnx": {name: _onnx(network) for name, network in networks.items()},
    }
    figures: Figures = {}
    for batch, rounds in ROUNDS.items():
        images = torch.randn(batch, 3, SIZE, SIZE)
        for backend, runs in backends.items():
            calls = {name: partial(run, images) for name, run in runs.items()}
            figures |= _in_turns(calls, rounds, f"inference_b{batch}_{backend}")
        for name in networks:
            if name != "dense":
                keys = [f"inference_b{batch}_{backend}_speedup_{name}" for backend in backends]
                best = max((figures[key] for key in keys), key=lambda speedup: speedup["median"])
                figures[f"inference_b{batch}_speedup_{name}"] = best
        figures |= _share_of_thin(figures, f"inference_b{batch}", networks)
    return figures


def _eager(network: Network) -> Run:
    model = copy.deepcopy(network.model).eval().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def run(images: Tensor) -> object:
        return model(images.to(memory_format=torch.channels_last))

    return run


def _onnx(network: Network) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(network.model, path, network.plan)
        session = onnxruntime.InferenceSession(path.read_bytes(), options)
    return lambda images: session.run(None, {"images": images.numpy()})


def _in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, title: str) -> Figures:
    """Milliseconds of every call and its speed-up over the dense one's, one round after the other."""
    rows = []
    for _ in range(rounds + 1):
        rows.append({name: 1000 * seconds(function) for name, function in calls.items()})
    del rows[0]  # the first warms up
    figures: Figures = {}
    for name in calls:
        figures[f"{title}_ms_{name}"] = figure([row[name] for row in rows])
        if name != "dense":
            figures[f"{title}_speedup_{name}"] = figure([row["dense"] / row[name] for row in rows])
    return figures | _share_of_thin(figures, title, calls)


def _share_of_thin(figures: Figures, title: str, names: Mapping[str, object]) -> Figures:
    thin = figures[f"{title}_speedup_thin"]["median"]
    shares: Figures = {}
    for name in names:
        if name not in ("dense", "thin"):
            speedup = figures[f"{title}_speedup_{name}"]["median"]
            shares[f"{title}_speedup_{name}_share_of_thin"] = figure([speedup / thin])
    return shares
