"""Does eq. 5 foresee what giving a filter back does? `python -m experiments.utility_check [recipe key=value ...]`

    python -m experiments.utility_check experiment=cifar10_small_study method=psap --seeds 0 1 2 --after 5 10 15

Trains as `experiments.train` does. After these epochs and their pruning steps (0: at the start) it suspends a SHARE of
every layer's live filters, drawn at random, and lets a pulse measure their utilities. Then it gives each of them back
alone, exactly, to see by how much the loss of the pulse's batches falls. At last all come back, and the training goes
on as if nothing had been. Writes `{"machine": {...}, "recipe": [...], "share": s, "batches": k, "filters": [{seed,
epoch, layer, filter, norm, gamma, utility, standard_error, reduction}, ...]}`: norm and |gamma| as they were saved, the
reduction of the loss.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.harness import data, models, seeding
from experiments.harness.batches import Sharing
from experiments.harness.callbacks import Method
from experiments.harness.data import Normalisation
from experiments.harness.devices import configure, device_name
from experiments.harness.distributed import World
from experiments.harness.entry import compose, plain_exits
from experiments.harness.loop import Callback, Loop, Metrics, Position, evaluate
from experiments.harness.optim import learning_rate, make_optimizer
from experiments.harness.progress import RunProgress
from experiments.harness.record import code_version
from experiments.harness.steps import Steps
from experiments.methods import make_method
from experiments.schema import Config, DataConfig
from psap_core import FilterTensors, InputError, Snapshot, filter_norms, filter_tensors, pulse, restore_, suspend_

SHARE = 0.2
Rows = list[dict[str, Any]]


def check(
    model: nn.Module, tensors: Mapping[str, FilterTensors], chosen: Mapping[str, Sequence[int]], batches: Sequence[Any]
) -> Rows:
    """Utility and true loss reduction of every chosen filter; the network comes out as it was.

    Args:
        model: the network, in the modes in which it is trained.
        tensors: layer name to its live tensors, every prunable layer.
        chosen: the same layers to filters, which must be live.
        batches: images and labels; the pulse and the true losses use all of them.
    """
    norms = {name: filter_norms(layer.parameters[f"{name}.weight"]) for name, layer in tensors.items()}
    saved = {name: suspend_(tensors[name], filters, Snapshot()) for name, filters in chosen.items()}
    try:
        losses = (F.cross_entropy(model(images), labels) for images, labels in batches)
        seen = pulse(model, tensors, saved, lambda: losses, len(batches))
        without = mean_loss(model, batches)
        rows = []
        for name, filters in chosen.items():
            layer, rows_of = tensors[name], saved[name].rows
            for place, f in enumerate(filters):
                gamma, beta = (rows_of[affine][place] for affine in layer.affine)
                _set_affine(layer, f, gamma, beta)
                reduction = without - mean_loss(model, batches)
                _set_affine(layer, f, 0.0, 0.0)
                utility, error = seen.utility[name][f]
                rows.append({"layer": name, "filter": f, "norm": norms[name][f].item(), "gamma": gamma.abs().item(),
                             "utility": utility, "standard_error": error, "reduction": reduction})  # fmt: skip
    finally:
        for name, snapshot in saved.items():
            restore_(tensors[name], snapshot)
    return rows


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Sequence[Any]) -> float:
    """Over the batches, in the model's modes; its statistics come out as they were."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    losses = [F.cross_entropy(model(images), labels).item() for images, labels in batches]
    for buffer, before in kept:
        buffer.copy_(before)
    return sum(losses) / len(losses)


@torch.no_grad()
def _set_affine(layer: FilterTensors, f: int, gamma: Tensor | float, beta: Tensor | float) -> None:
    layer.gamma[f], layer.beta[f] = gamma, beta


class Checked(Callback):
    """A method that is interrupted by checks after some epochs."""

    def __init__(self, method: Method, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, seed: int,
                 after: Sequence[int]) -> None:  # fmt: skip
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
        if epochs_done in self.after:
            draw = seeding.generator(self.seed, "utility check", epochs_done)
            tensors = {layer.name: filter_tensors(self.model, layer, self.optimizer) for layer in self.method.layers}
            chosen = {}
            for part in self.method.plan.layers:
                live = sorted({*range(part.filters)} - {*part.pruned})
                order = torch.randperm(len(live), generator=draw)[: max(1, round(SHARE * len(live)))]
                chosen[part.name] = [live[place] for place in order]
            rows = check(self.model, tensors, chosen, [*self.batches(epochs_done)])
            self.rows += [{"seed": self.seed, "epoch": epochs_done} | row for row in rows]


def train_and_check(cfg: Config, after: Sequence[int], batches: int) -> Rows:
    """Train as configured until the last check, on this process's device; what all checks found.

    Raises:
        InputError: the recipe's data is not made for devices.
    """
    if type(cfg.data) is not DataConfig:
        raise InputError("the check needs the digits or CIFAR-10")
    world = World()
    device = configure(cfg.runtime, world)
    seeding.seed_everything(cfg.seed)
    dataset = data.load_resident(cfg.data).to(device)
    channels, _, size = dataset.image_shape
    model, normalisation = models.start(cfg.model, channels, dataset.classes, new_classifier=True)
    model.to(device).to(memory_format=torch.channels_last)
    normalisation = normalisation or Normalisation(tuple(cfg.data.mean), tuple(cfg.data.std))
    optimizer = make_optimizer(model, cfg.optim)
    images = dataset.training(Sharing(cfg.optim.batch_size), normalisation, cfg.seed, device, 0)
    example = torch.zeros(1, channels, size, size, device=device)

    def drawn(stream: str, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return (part for batch in images.epoch(stream, epoch) for part in batch.parts)

    def pulse_losses(epochs_done: int) -> Iterator[Tensor]:
        return (F.cross_entropy(model(x), y) for x, y in drawn("pulse", epochs_done))

    def check_batches(epochs_done: int) -> Iterator[tuple[Tensor, Tensor]]:
        return (part for part, _ in zip(drawn("utility check", epochs_done), range(batches), strict=False))

    method = make_method(cfg, model, optimizer, example, pulse_losses, images.batches, lambda *_: None)
    checked = Checked(method, model, optimizer, check_batches, cfg.seed, after)
    title = f"{cfg.name} {cfg.method.name} seed {cfg.seed}"
    with RunProgress(title, max(after), images.batches, 0, quiet=False) as progress:
        Loop(
            model=model,
            steps=Steps(model, optimizer, images, world, device, None, method.after_step),
            world=world,
            callback=checked,
            epochs=max(after),
            learning_rate=lambda epoch: learning_rate(cfg.optim, epoch, cfg.epochs),
            evaluate=lambda: evaluate(model, dataset.evaluation("test", 0, 1, normalisation, device, 0), world).top1,
            log=progress.epoch,
            save=lambda: None,
            stop_requested=lambda: False,
            advance=progress.advance,
            position=Position(),
        ).train()
    return checked.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="*", help="as for experiments.train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--after", type=int, nargs="+", required=True, metavar="EPOCH")
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/utility.json"))
    given = parser.parse_intermixed_args()
    with plain_exits():
        configs = [compose("train", [*given.recipe, f"seed={seed}"]) for seed in given.seeds]
        given.out.parent.mkdir(parents=True, exist_ok=True)
        rows = [row for cfg in configs for row in train_and_check(cfg, given.after, given.batches)]
        machine = {"device": device_name(torch.device("cpu")), "torch": torch.__version__, **code_version()}
        report = {"machine": machine, "recipe": given.recipe, "share": SHARE, "batches": given.batches}
        text = ",\n".join(json.dumps({key: _short(value) for key, value in row.items()}) for row in rows)
        given.out.write_text(json.dumps(report)[:-1] + f', "filters": [\n{text}\n]}}\n')
        print(f"{given.out}: {len(rows)} filters", file=sys.stderr)


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
