"""Does channel pruning work on every convolutional network? torchvision's and timm's, randomly initialised, on a CPU.

`python -m experiments.benchmark zoo` tries them all (an hour on two cores); `python -m experiments.benchmarks.zoo
[NAME ...]` some of them. Every network is one line of runs/bench/zoo.jsonl as soon as it is done; a later run leaves
out what is there unless it is named. `--page docs/networks.md` writes the table of what is there and tries nothing.

Scope `coupled`, two random images. Statistics, affines, biases and every parameter with an entry for each channel are
drawn at random first, so that nothing that is removed was zero already. 30 % of every group's filters, drawn at random,
are masked; the network without them must compute the same.

zoo_<package>_networks: how many.
zoo_<package>_exact_pct: the share whose export differs by at most 1e-9 and has the MACs that its plan counts.
zoo_<package>_reach_80_pct: the share of which 80 % of the MACs can be cut, one filter left in every group.
zoo_largest_error: over all networks, export and loaded export, relative to the largest output, in float64.
zoo_analysis_over_forward: seconds of the analysis, which runs the network twice, over those of one forward pass.
zoo_<package>_torch_pruning_<works, exact>_pct: Torch-Pruning's MagnitudePruner at 30 % of every group, the same network
    and images: it gives a network that runs; that computes what the dense one does with the same entries zeroed.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks import Figures, figure
from experiments.runs.provenance import code_version
from psap_core import PrunePlan, load_exported, save_exported
from psap_core.allocation import filter_floors
from psap_core.cost import layer_table, macs, macs_cost_model
from psap_core.groups import ChannelGroup, GroupSearch, search_groups
from psap_core.inputs import describe, tensors_in
from psap_core.plan import make_plan
from psap_core.surgery import smaller_copy
from psap_core.suspension import apply_

OUT = Path("runs/bench/zoo.jsonl")
SHARE, EXACT, REACH = 0.3, 1e-9, 0.8
CLASSES = {"torchvision": (1000, 21), "timm": (1000,)}  # of what their last layers give
RIVAL_SECONDS = 120
TORCHVISION = """
alexnet vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19_bn resnet18 resnet34 resnet50 resnet101 resnet152
resnext50_32x4d resnext101_32x8d wide_resnet50_2 densenet121 densenet161 densenet169 densenet201 googlenet@96
inception_v3@128 squeezenet1_0 squeezenet1_1 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet0_75
mnasnet1_0 mnasnet1_3 shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0 efficientnet_b0
efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b7 efficientnet_v2_s efficientnet_v2_m
regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf
convnext_tiny convnext_small fcn_resnet50 deeplabv3_resnet50 deeplabv3_mobilenet_v3_large lraspp_mobilenet_v3_large
vit_b_16@224 swin_t
"""
TIMM = """
bat_resnext26ts@256 eca_resnext26ts gcresnext26ts gcresnet33ts seresnet33ts resnet32ts resnet51q resnet50_clip@128
resnet50_clip_gap resnet50_mlp mobileone_s0 mobileone_s4 gernet_s regnetz_b16 regnetz_b16_evos regnetz_d8_evos repvgg_a0
repvgg_b1g4 repvgg_d2se botnet26t_256@128 eca_botnext26ts_256@128 sebotnet33ts_256@128 halonet26t@256
eca_halonext26ts@256 lambda_resnet26t@256 lambda_resnet26rpt_256@256 lamhalobotnet50ts_256@256 coat_lite_tiny
convmixer_768_32 convnext_atto convnext_atto_ols convnext_atto_rms convnext_tiny_hnf convnextv2_atto cpubone_nano
cpubone_b1_dwnorm csatv2@128 cs3darknet_focus_s cs3darknet_s cs3sedarknet_l cs3edgenet_x cs3sedarknet_xdw cspdarknet53
cspresnet50 cspresnext50 darknet17 sedarknet21 darknetaa53 cspnext_tiny davit_tiny densenet121 densenetblur121d dla34
dla46_c dla60x dla60_res2net dla60_res2next dpn48b dpn68 edgenext_xx_small efficientformer_l1@224
efficientformerv2_s0@224 efficientnet_b0 efficientnet_b0_gn efficientnet_b0_g8_gn efficientnet_b0_g16_evos
efficientnet_blur_b0 efficientnet_cc_b0_4e efficientnet_es efficientnet_lite0 efficientnet_h_b5 efficientnet_x_b3
efficientnetv2_rw_t gc_efficientnetv2_rw_t fbnetc_100 mixnet_s mnasnet_050 mobilenet_edgetpu_v2_xs mobilenetv1_100
mobilenetv2_050 semnasnet_050 spnasnet_100 test_efficientnet_ln tf_efficientnet_b0 tf_efficientnetv2_b0 tf_mixnet_s
tinynet_e efficientvim_m1@224 efficientvit_b0 efficientvit_l1 efficientvit_m0 fasternet_t0 fastvit_t8 fastvit_sa12
fastvit_mci0 focalnet_tiny_srf ghostnet_050 ghostnetv2_100 ghostnetv3_050 hardcorenas_a hgnet_tiny hgnetv2_b0
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2@128 inception_v3@128 inception_v4@128 lcnetv2_small
levit_conv_128s@224 lowformer_b0 mambaout_femto coatnet_pico_rw_224@224 coatnext_nano_rw_224@224
coatnet_bn_0_rw_224@224 maxvit_pico_rw_256@128 maxxvitv2_nano_rw_256@128 convformer_s18 caformer_s18 poolformer_s12
poolformerv2_s12 fbnetv3_b lcnet_035 mobilenetv3_small_050 mobilenetv3_rw mobilenetv4_conv_small_035
mobilenetv4_conv_aa_medium mobilenetv4_conv_blur_medium mobilenetv4_hybrid_medium@128 tf_mobilenetv3_small_minimal_100
mobilenetv5_base@128 mobilevit_xxs@128 mobilevitv2_050@128 nasnetalarge@128 pnasnet5large@128 nextvit_small nf_resnet26
nf_regnet_b0 eca_nfnet_l0 dm_nfnet_f0 rdnet_tiny regnetv_040 regnetx_002 regnety_002 regnety_040_sgn regnetz_005
repghostnet_050 repvit_m0_9 res2net50_14w_8s res2net50d res2next50 resnest14d resnest26d resnest50d_4s2x40d
resnest50d_1s4x24d resnet10t resnet18 resnet18d resnet26t resnet50_gn resnetaa34d resnetblur18 resnetrs50
resnext50_32x4d seresnet18 seresnext26d_32x4d seresnextaa101d_32x8d senet154 wide_resnet50_2 ecaresnet26t
ecaresnetlight ecaresnext26t_32x4d resnetv2_18 resnetv2_50t resnetv2_50d_gn resnetv2_50d_evos resnetv2_50d_frn
resnetv2_50x1_bit rexnet_100 rexnetr_100 selecsls42 selecsls60b legacy_senet154 legacy_seresnet18
legacy_seresnext26_32x4d shvit_s1 skresnet18 skresnext50_32x4d starnet_s050 starnet_s1 swiftformer_xs tresnet_m vgg11
vgg11_bn vit_small_resnet26d_224@224 eca_vovnet39b ese_vovnet19b_dw ese_vovnet19b_slim ese_vovnet39b_evos vovnet39a
legacy_xception xception41 xception41p
"""  # the smallest of every module with convolutions, and those with another attention, normalisation or pooling
DEFAULT_SIDE = {"torchvision": 64, "timm": 96}


@dataclass(frozen=True)
class NetworkResult:
    """What was found of one network; None: it could not be found.

    Attributes:
        side: height and width of the images.
        groups: channel groups.
        reach: largest share of the MACs that can be cut.
        error, loaded_error: of the export, and of what was saved and loaded into a fresh network.
        macs_gap: MACs of the exported network that its plan did not count.
        changed: what masking changes, relative to the largest output: the comparison is not blind.
        analysis, forward: seconds.
        left: reason of the layers with the largest share of the MACs that is left alone, and that share.
        failure: what went wrong.
        rival: what Torch-Pruning made of it: `exact`, `differs by ...`, or the error; empty: it was not run.
        commit: of the code that examined it; with `+` where something was not committed.
    """

    package: str
    name: str
    side: int
    groups: int = 0
    reach: float = 0.0
    error: float | None = None
    loaded_error: float | None = None
    macs_gap: int = 0
    changed: float | None = None
    analysis: float = 0.0
    forward: float = 0.0
    left: str = ""
    failure: str = ""
    rival: str = ""
    commit: str = ""

    @property
    def is_exact(self) -> bool:
        """Nothing was exported or counted wrongly: a network without a group is left as it is."""
        if self.failure or self.macs_gap:
            return False
        return not self.groups or max(self.error or 0.0, self.loaded_error or 0.0) <= EXACT


# ---------------------------------------------------------------------------- the networks


def network_names() -> list[str]:
    """`package:name` of every network that is tried."""
    packages = {"torchvision": TORCHVISION, "timm": TIMM}
    return [
        f"{key}:{entry.partition('@')[0]}"
        for key, text in packages.items()
        for entry in text.split()
    ]


def side_of(package: str, name: str) -> int:
    for entry in (TORCHVISION if package == "torchvision" else TIMM).split():
        known, _, side = entry.partition("@")
        if known == name and side:
            return int(side)
    return DEFAULT_SIDE[package]


def build_network(package: str, name: str, side: int) -> nn.Module:
    """The network in evaluation mode, randomly initialised, everything per channel drawn at random."""
    torch.manual_seed(0)
    model: nn.Module
    if package == "torchvision":
        import torchvision

        options: dict[str, Any] = {"weights": None}
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False
        if name.startswith(("fcn", "deeplab", "lraspp")):
            options["weights_backbone"] = None
        model = torchvision.models.get_model(name, **options)
    else:
        import timm

        try:
            model = timm.create_model(name, pretrained=False, img_size=side)
        except TypeError:  # it takes any size
            model = timm.create_model(name, pretrained=False)
    draw_(model, side)
    return model.eval()


@torch.no_grad()
def draw_(model: nn.Module, side: int) -> None:
    """Random affines, biases and other parameters with one long dimension; statistics around those of random images."""
    for module in model.modules():
        for key, parameter in module.named_parameters(recurse=False):
            if sum(size > 1 for size in parameter.shape) <= 1:
                is_shift = key in ("bias", "beta", "tau")
                low, high = (-0.5, 0.5) if is_shift else (0.5, 1.5)
                parameter.uniform_(low, high)
            elif not parameter.any():
                parameter.normal_(std=0.05)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with suppress(Exception):  # some train at one size only; their statistics stay 0 and 1
        model.train()(torch.randn(4, 3, side, side))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        if norm.running_var is not None and norm.running_mean is not None:
            norm.running_mean += norm.running_var.sqrt() * (
                torch.rand_like(norm.running_mean) - 0.5
            )
            norm.running_var *= torch.rand_like(norm.running_var) + 0.5


# ---------------------------------------------------------------------------- one network


def examine(package: str, name: str) -> NetworkResult:
    side = side_of(package, name)
    row: dict[str, Any] = {"package": package, "name": name, "side": side, "commit": _commit()}
    try:
        row |= _measured(package, name, side)
    except Exception as error:
        row["failure"] = _sentence(error)
    return NetworkResult(**row)


def _commit() -> str:
    version = code_version()
    commit = (version["commit"] or "")[:7]
    return commit if version["dirty_diff_sha256"] is None else f"{commit}+"


def _measured(package: str, name: str, side: int) -> dict[str, Any]:
    model, images = build_network(package, name, side), torch.randn(2, 3, side, side)
    _outputs(model, images)  # what is set up in a first pass
    forward, _ = _timed(lambda: _outputs(model, images))
    analysis, search = _timed(lambda: search_groups(model, images, scope="coupled"))
    row: dict[str, Any] = {
        "groups": len(search.groups),
        "analysis": analysis,
        "forward": forward,
        "left": _largest_reason(search, model, images),
    }
    if not search.groups:
        return row
    cost = macs_cost_model(model, search.groups, images)
    row["reach"] = 1 - cost.cost(filter_floors(cost.filters, 1, 0.0)) / cost.dense
    pruned = _drawn(search.groups)
    plan = make_plan(search.groups, pruned, cost, describe(images), "coupled")
    row["macs_gap"] = macs(smaller_copy(model, search.groups, plan), images) - plan.macs
    model, images = model.double(), images.double()
    dense = _outputs(model, images)
    apply_(model, search.groups, plan)
    masked = _outputs(model, images)
    row["changed"] = difference(dense, masked)
    small = smaller_copy(model, search.groups, plan)
    row["error"] = difference(masked, _outputs(small, images))
    loaded = _saved_and_loaded(small, plan, build_network(package, name, side).double())
    row["loaded_error"] = difference(masked, _outputs(loaded, images))
    return row


def _drawn(groups: Sequence[ChannelGroup]) -> dict[str, list[int]]:
    """30 % of every group's filters, at least one."""
    pruned = {}
    for group in groups:
        count = max(1, round(SHARE * group.filters))
        pruned[group.name] = sorted(torch.randperm(group.filters)[:count].tolist())
    return pruned


def _saved_and_loaded(small: nn.Module, plan: PrunePlan, fresh: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        save_exported(folder, small, plan)
        return load_exported(folder, fresh).eval()


@torch.no_grad()
def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    return [tensor for tensor in tensors_in(model(images)) if tensor.is_floating_point()]


def difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """max|a - b| / max|a| over all outputs; infinite where shapes differ or something is not finite."""
    gap, size = 0.0, 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or not (a.isfinite().all() and b.isfinite().all()):
            return float("inf")
        gap = max(gap, float((a - b).abs().max()))
        size = max(size, float(a.abs().max()))
    return gap / max(size, 1e-300)


def _largest_reason(search: GroupSearch, model: nn.Module, images: Tensor) -> str:
    """Why most of the MACs that are left alone are: a part of the MACs of every layer, and its reason."""
    table = {layer.name: layer.macs for layer in layer_table(model, images)}
    shares: Counter[str] = Counter()
    for layer, reason in search.left_alone.items():
        shares[reason] += table.get(layer, 0)
    if not shares or not sum(shares.values()):
        return ""
    reason, macs = shares.most_common(1)[0]
    return f"{reason} ({100 * macs / sum(table.values()):.0f} % of the MACs)"


def _timed(function: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    result = function()
    return time.perf_counter() - began, result


def _sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


# ---------------------------------------------------------------------------- Torch-Pruning


def rival_apart(package: str, name: str) -> str:
    """In a process of its own, which may crash or be stopped."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_tell_rival, args=(sender, package, name, side_of(package, name))
    )
    process.start()
    sender.close()
    told = receiver.poll(RIVAL_SECONDS)
    try:
        return str(receiver.recv()) if told else f"not done in {RIVAL_SECONDS} s"
    except EOFError:
        return "its process ended"
    finally:
        if process.pid is not None and process.is_alive() and not told:
            os.kill(process.pid, signal.SIGKILL)
        process.join()


def _tell_rival(sender: Any, package: str, name: str, side: int) -> None:
    try:
        sender.send(rival(build_network(package, name, side).double(), package, side))
    except Exception as error:
        sender.send(_sentence(error))


def rival(model: nn.Module, package: str, side: int) -> str:
    """What Torch-Pruning makes of a float64 network: `exact`, or how far it is from the masked one.

    It prunes a copy in which every entry of a parameter or buffer is its own number, so that what is left says what
    was removed; the masked network is the dense one with those entries zero.
    """
    import torch_pruning

    images = torch.randn(2, 3, side, side, dtype=torch.float64)
    _outputs(model, images)
    numbered = copy.deepcopy(model)
    for tensor in (*numbered.parameters(), *numbered.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
    last = [module for module in numbered.modules() if _gives_classes(module, package)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.MagnitudePruner(
            numbered,
            images,
            importance=torch_pruning.importance.RandomImportance(),
            pruning_ratio=SHARE,
            ignored_layers=last,
        )
        pruner.step()
    masked, removed = _masked_as(model, numbered)
    if not removed:
        return "removes nothing"
    error = difference(_outputs(masked, images), _outputs(numbered, images))
    return "exact" if error <= EXACT else f"differs by {error:.0e}"


@torch.no_grad()
def _masked_as(model: nn.Module, numbered: nn.Module) -> tuple[nn.Module, int]:
    """The network with every entry zero that the numbered one lacks, whose entries get their values back."""
    masked = copy.deepcopy(model)
    removed = 0
    tensors = dict([*masked.named_parameters(), *masked.named_buffers()])
    for name, left in [*numbered.named_parameters(), *numbered.named_buffers()]:
        tensor = tensors[name]
        if not left.is_floating_point():
            continue
        index = left.detach().long()
        if index.numel() and int(index.max()) >= tensor.numel():
            raise ValueError(f"cannot be compared: {name} is not a part of what it was")
        values = tensor.flatten()[index.flatten()]
        removed += tensor.numel() - left.numel()
        if not name.endswith(("running_mean", "running_var")):
            tensor.copy_(
                torch.zeros_like(tensor)
                .flatten()
                .index_copy(0, index.flatten(), values)
                .view_as(tensor)
            )
        left.data = values.view(left.shape)
    return masked, removed


def _gives_classes(module: nn.Module, package: str) -> bool:
    count = getattr(module, "out_features", getattr(module, "out_channels", None))
    return isinstance(module, (nn.Linear, nn.Conv2d)) and count in CLASSES[package]


# ---------------------------------------------------------------------------- all of them


def zoo() -> Figures:
    return summary(try_networks(network_names(), OUT, again=False))


def try_networks(chosen: Sequence[str], out: Path, *, again: bool) -> list[NetworkResult]:
    """Try networks, then Torch-Pruning on the same, and give the rows of all that were ever tried."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        for name in chosen:
            if again or name not in _known(out):
                _write(out, examine(*name.split(":")))
        for name in chosen:
            row = _known(out)[name]
            if not row.rival:
                _write(out, replace(row, rival=rival_apart(row.package, row.name)))
    return read(out)


def _known(out: Path) -> dict[str, NetworkResult]:
    return {f"{row.package}:{row.name}": row for row in read(out)}


def _write(out: Path, row: NetworkResult) -> None:
    print(_line(row), flush=True)
    with out.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread: the process that is forked must not wait for others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def read(out: Path) -> list[NetworkResult]:
    """The last row of every network, in the order of the lists."""
    if not out.exists():
        return []
    rows = [NetworkResult(**json.loads(line)) for line in out.read_text().splitlines()]
    latest = {f"{row.package}:{row.name}": row for row in rows}
    return [latest[name] for name in network_names() if name in latest]


def summary(rows: Sequence[NetworkResult]) -> Figures:
    figures: Figures = {}
    for package in ("torchvision", "timm"):
        own = [row for row in rows if row.package == package]
        tried = [row for row in own if row.rival]
        if not own:
            continue
        kinds = {
            "exact": [row.is_exact for row in own],
            "reach_80": [row.reach >= REACH and row.is_exact for row in own],
            "torch_pruning_works": [row.rival.startswith(("exact", "differs")) for row in tried],
            "torch_pruning_exact": [row.rival == "exact" for row in tried],
        }
        figures[f"zoo_{package}_networks"] = figure([len(own)])
        for kind, hits in kinds.items():
            if hits:
                figures[f"zoo_{package}_{kind}_pct"] = figure([100 * sum(hits) / len(hits)])
    errors = [max(row.error or 0.0, row.loaded_error or 0.0) for row in rows]
    figures["zoo_largest_error"] = figure([max(errors)])
    figures["zoo_analysis_over_forward"] = figure(
        [row.analysis / row.forward for row in rows if row.forward]
    )
    return figures


# ---------------------------------------------------------------------------- the page


INTRODUCTION = """# Which networks can be pruned

torchvision's and timm's convolutional families, one by one: how much of each network can be cut, and whether its export
is exact.

The networks are randomly initialised, in scope `coupled`. 30 % of every group's filters are removed, and the exported
network must compute what the masked one does, to 1e-9 in float64; so must what was saved and loaded again.
`python -m experiments.benchmark zoo` tries them all ([zoo.py](../experiments/benchmarks/zoo.py)),
`python -m experiments.benchmarks.zoo --page docs/networks.md` writes this page. The
[rows](../analysis/recorded/benchmark/cpu_2_cores_zoo.jsonl) are of commit COMMIT.
"""
LEGEND = """
px: height and width of the images; cut: largest share of the MACs that can go, %; error, loaded: of the export and of
what was saved and loaded; analysis, forward: seconds, one thread, x86; Torch-Pruning: its MagnitudePruner at 30 %,
compared with the dense network in which all that it removes is zero, given 120 seconds on a busy host.
"""


def page(rows: Sequence[NetworkResult]) -> str:
    """docs/networks.md."""
    versions = [f"{name} {version(name)}" for name in ("torchvision", "timm", "torch-pruning")]
    figures = {key: value["median"] for key, value in summary(rows).items()}
    ratio = sorted(row.analysis / row.forward for row in rows if row.forward)
    longest = max(row.analysis for row in rows)
    packages = [name for name in CLASSES if any(row.package == name for row in rows)]
    commits = ", ".join(sorted({row.commit for row in rows if row.commit}))
    parts = [
        INTRODUCTION.replace("COMMIT", commits or "unknown"),
        *(_summary_line(package, rows) for package in packages),
        "",
        f"Largest error {figures['zoo_largest_error']:.0e}. The analysis takes "
        f"{ratio[len(ratio) // 2]:.0f} forward passes (median), at most {longest:.0f} s. "
        f"Versions: {', '.join(versions)}.",
        LEGEND,
    ]
    for package in packages:
        own = [row for row in rows if row.package == package]
        parts += [f"## {package}", "", *_table(own), ""]
    low = [row for row in rows if row.reach < REACH or row.failure]
    parts += [
        "## Below 80 %, and why",
        "",
        "| network | cut | most of what is left |",
        "|---|---|---|",
    ]
    parts += [f"| {row.name} | {100 * row.reach:.0f} | {row.failure or row.left} |" for row in low]
    return "\n".join([*parts, ""])


def _summary_line(package: str, rows: Sequence[NetworkResult]) -> str:
    own = [row for row in rows if row.package == package]
    exact = sum(row.is_exact for row in own)
    reach = sum(row.is_exact and row.reach >= REACH for row in own)
    tried = [row for row in own if row.rival]
    works = sum(row.rival.startswith(("exact", "differs")) for row in tried)
    rival_exact = sum(row.rival == "exact" for row in tried)
    return (
        f"- {package}: {len(own)} networks, {exact} exact, {reach} of them down to a fifth of their MACs or less "
        f"({100 * reach / len(own):.0f} %). Torch-Pruning was tried on {len(tried)}: it gives a network that runs for "
        f"{works}, one that is exact for {rival_exact}."
    )


def _table(rows: Sequence[NetworkResult]) -> list[str]:
    lines = [
        "| network | px | groups | cut | error | loaded | analysis | forward | Torch-Pruning |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row.name,
            row.side,
            row.groups,
            f"{100 * row.reach:.1f}",
            _small(row.error),
            _small(row.loaded_error),
        ]
        rival = row.rival.replace("|", "/")[:80] or "not run"
        cells += [f"{row.analysis:.1f}", f"{row.forward:.2f}", rival]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return lines


def _small(number: float | None) -> str:
    return "" if number is None else f"{number:.0e}"


def _line(row: NetworkResult) -> str:
    numbers = f"cut {row.reach:.3f} error {_small(row.error)} {_small(row.loaded_error)} changed {_small(row.changed)}"
    times = f"analysis {row.analysis:.1f} s, forward {row.forward:.2f} s"
    return f"{row.package}:{row.name} {row.groups} groups {numbers} {times}; {row.failure or row.left}; {row.rival}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", metavar="NAME", help="resnet18, or timm:resnet18")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", type=Path, help="write the table of what is in --out")
    options = parser.parse_args()
    if options.page:
        options.page.write_text(page(read(options.out)))
        return
    known = network_names()
    chosen = [name for name in known if {name, name.partition(":")[2]} & {*options.networks}]
    if unknown := [
        n for n in options.networks if not any(n in (k, k.partition(":")[2]) for k in known)
    ]:
        parser.error(f"there is no network {unknown[0]!r} in the lists")
    try_networks(chosen or known, options.out, again=bool(chosen))


if __name__ == "__main__":
    main()
