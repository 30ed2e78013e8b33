"""PSAP in a plain PyTorch loop: mixed precision, gradient clipping and accumulation, resume.

    python examples/plain_loop.py runs/plain_loop

Trains a small network on the handwritten digits and removes half of its MACs. Killed and started again with the same
folder, it goes on after its last complete epoch and ends the same; on a CPU bit for bit.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from psap_core import PSAP, export

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AMP = DEVICE == "cuda"  # works on a CPU too, slowly where that computes no bfloat16
DTYPE = torch.float16 if DEVICE == "cuda" else torch.bfloat16  # float16 needs the scaler
ACCUMULATED = 2  # batches to one step of the optimizer


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Training and test images [N, 1, 8, 8] in [0, 1], with labels [N]."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).div(16).to(DEVICE)
    y = torch.tensor(labels).to(DEVICE)
    return TensorDataset(x[:1437], y[:1437]), TensorDataset(x[1437:], y[1437:])


def make_network() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 8), (8, 16), (16, 32)):
        layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def accuracy(model: nn.Module, test: TensorDataset) -> float:
    images, labels = test.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def save(path: Path, parts: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    torch.save({name: part.state_dict() for name, part in parts.items()}, new)
    new.replace(path)  # whenever it is killed, a whole checkpoint is there


def load(path: Path, parts: dict[str, Any]) -> None:
    states = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(states[name])


def main(folder: Path, epochs: int = 20) -> tuple[nn.Module, nn.Module, PSAP]:
    """The masked network, the small one, and the pruner."""
    torch.manual_seed(0)
    train, test = digits()
    loader = DataLoader(train, batch_size=128, shuffle=True, drop_last=True)
    model = make_network().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    scaler = torch.amp.GradScaler(DEVICE, enabled=AMP and DEVICE == "cuda")

    def loss_of_batch(batch: list[Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    pruner = PSAP(
        model,
        optimizer,
        train.tensors[0][:1],
        target_macs_cut=0.5,
        total_epochs=epochs,
    )

    # The pruner comes last: when it is loaded, it checks that the weights fit.
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    parts["pruner"] = pruner
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        load(checkpoint, parts)

    for epoch in range(scheduler.last_epoch, epochs):
        torch.manual_seed(epoch)  # the same order of images after a kill
        model.train()
        for number, batch in enumerate(loader, start=1):
            with torch.autocast(DEVICE, dtype=DTYPE, enabled=AMP):
                loss = loss_of_batch(batch) / ACCUMULATED
            scaler.scale(loss).backward()
            if number % ACCUMULATED == 0 or number == len(loader):
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        pruner.end_epoch(loader, loss_of_batch)
        scheduler.step()
        save(checkpoint, parts)
        cut = pruner.plan.macs_cut
        print(f"epoch {epoch + 1}: {cut:.1%} of the MACs cut, accuracy {accuracy(model, test):.1%}")

    small = export(model, pruner.plan)
    print(f"exported: {pruner.plan.macs:,} MACs an image, accuracy {accuracy(small, test):.1%}")
    return model, small, pruner


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the checkpoint")
    main(parser.parse_args().folder)
