"""Does eq. 5 foresee what giving a filter back does? `python -m experiments.pulse_check [recipe key=value ...]`

    python -m experiments.pulse_check experiment=cifar10_small_study method=psap --seeds 0 1 2 --after 5 10 15

Trains eagerly, in float32, and stops after these epochs and their pruning steps (0: at the start) to look at every live
filter. It divides every layer's live filters into GROUPS by lot. For one group after the other it suspends all of the
group and lets a pulse measure their utilities on `--batches` batches; then it gives each filter back alone, exactly, to
see by how much the loss of as many other batches falls. The training goes on as if nothing had been. (PSAP's own pulse
looks at filters with small norms, these are all.) Writes `{"machine": {...}, "recipe": [...], "batches": k, "filters":
[{seed, epoch, layer, filter, norm, gamma, utility, standard_error, reduction}, ...]}` after every seed: norm and
|gamma| as they were saved, the reduction of the loss. (`layer` is the channel group's name.)
"""

import argparse
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import seeding
from experiments.configuration import compose
from experiments.exits import plain_exits
from experiments.methods.base import BatchesOf, Callback, Method, Metrics
from experiments.methods.registry import make_method
from experiments.runs.provenance import code_version
from experiments.schema import Config, DataConfig, PSAPConfig
from experiments.training.devices import configure, device_name
from experiments.training.distributed import World
from experiments.training.loop import Loop, Position
from experiments.training.optim import learning_rate
from experiments.training.progress import RunProgress
from experiments.training.setup import set_up
from experiments.training.steps import Steps
from psap_core import InputError
from psap_core.scoring import filter_norms, joint_scores
from psap_core.supervision import pulse
from psap_core.suspension import (
    FilterTensors,
    Snapshot,
    restore_,
    silence_,
    suspend_,
    tensors_by_group,
)

GROUPS = 5
Rows = list[dict[str, Any]]
Batch = tuple[Tensor, Tensor]


def check_filters(
    model: nn.Module,
    tensors: Mapping[str, FilterTensors],
    chosen: Mapping[str, Sequence[int]],
    pulse_batches: Sequence[Batch],
    other_batches: Sequence[Batch],
) -> Rows:
    """Utility and true loss reduction of every chosen filter; the network comes out as it was.

    Args:
        model: the network, in the modes in which it is trained.
        tensors: group name to its live tensors, every channel group.
        chosen: the same groups to filters, which must be live.
        pulse_batches: images and labels of which the utilities are.
        other_batches: those of which the reductions are.
    """
    norms = {}
    for name, group in tensors.items():
        norms[name] = joint_scores([filter_norms(writer.rows) for writer in group.filter_rows()])
    saved = {name: suspend_(tensors[name], filters, Snapshot()) for name, filters in chosen.items()}
    try:
        count = len(pulse_batches)
        supervision = pulse(model, tensors, saved, pulse_batches, partial(loss, model), count)
        without = mean_loss(model, other_batches)
        rows = []
        for name, filters in chosen.items():
            group = tensors[name]
            for f in filters:
                snapshot = saved[name].select([f])
                restore_(group, snapshot)
                reduction = without - mean_loss(model, other_batches)
                silence_(group, [f])
                utility, error = supervision.utility[name][f]
                rows.append(
                    {
                        "layer": name,
                        "filter": f,
                        "norm": norms[name][f].item(),
                        "gamma": _gamma(group, snapshot),
                        "utility": utility,
                        "standard_error": error,
                        "reduction": reduction,
                    }
                )
    finally:
        for name, snapshot in saved.items():
            restore_(tensors[name], snapshot)
    return rows


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Over the batches, in the model's modes; its statistics come out as they were."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    losses = [loss(model, batch).item() for batch in batches]
    for buffer, before in kept:
        buffer.copy_(before)
    return sum(losses) / len(losses)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def _gamma(group: FilterTensors, snapshot: Snapshot) -> float:
    """|gamma| of the one filter of a snapshot; where several BatchNorms silence it, the root of the sum of squares."""
    gammas = []
    for name in group.silencers:
        if name.endswith("weight") and group.parameters[name].tensor.ndim == 1:
            gammas.append(snapshot.rows[name].flatten())
    return torch.linalg.vector_norm(torch.cat(gammas)).item() if gammas else 0.0


class Checked(Callback):
    """A method that is interrupted by checks after some epochs; half of a check's batches are the pulse's."""

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: BatchesOf,
        seed: int,
        after: Collection[int],
    ) -> None:
        self.method, self.model, self.optimizer, self.batches = method, model, optimizer, batches
        self.seed, self.after = seed, after
        self.rows: Rows = []

    def before_train(self) -> None:
        self.method.before_train()
        self._check(0)

    def end_epoch(self, epochs_done: int) -> Metrics:
        metrics = self.method.end_epoch(epochs_done)
        self._check(epochs_done)
        return metrics

    def _check(self, epochs_done: int) -> None:
        if epochs_done not in self.after:
            return
        draw = seeding.generator(self.seed, "utility check", epochs_done)
        tensors = tensors_by_group(self.model, self.method.groups, self.optimizer)
        orders = {}
        for part in self.method.plan.layers:
            live = sorted({*range(part.filters)} - {*part.pruned})
            orders[part.name] = [live[place] for place in torch.randperm(len(live), generator=draw)]
        batches = [*self.batches(epochs_done)]
        for group in range(GROUPS):
            chosen = {name: order[group::GROUPS] for name, order in orders.items()}
            rows = check_filters(self.model, tensors, chosen, batches[::2], batches[1::2])
            self.rows += [{"seed": self.seed, "epoch": epochs_done} | row for row in rows]


def train_and_check(cfg: Config, after: Collection[int], batches: int) -> Rows:
    """Train as configured until the last check, on the configured device; what all checks found.

    Raises:
        InputError: the recipe's data is not made for devices, its method is not PSAP, its network has dropout, or an
            epoch has too few batches.
    """
    if type(cfg.data) is not DataConfig or not isinstance(cfg.method, PSAPConfig):
        raise InputError("the check needs the digits or CIFAR-10, and method=psap")
    world = World()
    setup = set_up(cfg, configure(cfg.runtime, world), world)
    model = setup.model
    if any(isinstance(module, nn.Dropout) for module in model.modules()):
        raise InputError(
            "the check needs a network without dropout: losses that differ by chance say nothing"
        )
    parts = setup.batches_for_a_pulse
    if parts < 2 * batches:
        raise InputError(f"--batches={batches} needs {2 * batches} batches, an epoch has {parts}")

    def check_batches(epochs_done: int) -> Iterator[Batch]:
        return islice(setup.micro_batches("utility check", epochs_done), 2 * batches)

    method = make_method(setup.method_context(lambda *_: None))
    checked = Checked(method, model, setup.optimizer, check_batches, cfg.seed, after)
    steps = Steps(
        model,
        setup.optimizer,
        setup.images,
        world,
        setup.device,
        None,
        method.after_step,
        setup.loss,
    )
    title = f"{cfg.name} {cfg.method.name} seed {cfg.seed}"
    with RunProgress(
        title, max(after), setup.images.batches, 0, curve=setup.curve, quiet=False
    ) as progress:
        Loop(
            model=model,
            steps=steps,
            world=world,
            callback=checked,
            epochs=max(after),
            learning_rate=lambda epoch: learning_rate(cfg.optim, epoch, cfg.epochs),
            evaluate=lambda: setup.accuracy(model, setup.curve).top1,
            log=progress.epoch,
            save=lambda position: None,
            stop_requested=lambda: False,
            advance=progress.advance,
            position=Position(),
        ).train()
    return checked.rows


def check_seeds(
    recipe: Sequence[str], seeds: Sequence[int], after: Collection[int], batches: int, out: Path
) -> None:
    """Check one seed after the other; every one's filters are written when it is done.

    Raises:
        InputError: an argument is out of its range, or see `train_and_check`.
    """
    if any(override.startswith("seed=") for override in recipe) or len({*seeds}) < len(seeds):
        raise InputError("seeds stand behind --seeds, each once")
    if batches < 2:
        raise InputError(f"--batches={batches} must be at least 2")
    configs: list[Config] = [compose("train", [*recipe, f"seed={seed}"]) for seed in seeds]
    if not all(0 <= epoch <= configs[0].epochs for epoch in after):
        raise InputError(f"--after must be completed epochs, from 0 to {configs[0].epochs}")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise InputError(f"--out={out} is a folder")
    rows: Rows = []
    for cfg in configs:
        rows += train_and_check(cfg, after, batches)
        device = configure(cfg.runtime, World())
        machine = {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        report = {"machine": machine | code_version(), "recipe": [*recipe], "batches": batches}
        text = ",\n".join(
            json.dumps({key: _short(value) for key, value in row.items()}) for row in rows
        )
        out.write_text(json.dumps(report)[:-1] + f', "filters": [\n{text}\n]}}\n')
        print(f"{out}: {len(rows)} filters", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="*", help="as for experiments.train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--after", type=int, nargs="+", required=True, metavar="EPOCH")
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/utility.json"))
    options = parser.parse_intermixed_args()
    with plain_exits():
        check_seeds(options.recipe, options.seeds, options.after, options.batches, options.out)


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
