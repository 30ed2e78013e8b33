"""PSAP as a callback of Lightning, on one device or several, with its state in Lightning's checkpoints.

    python examples/lightning_callback.py runs/lightning
    python examples/lightning_callback.py runs/lightning_ddp --processes 2

Removes half of the MACs of a small network on the handwritten digits. Started again with the same folder, it goes on
after its last checkpoint. Two processes train under DistributedDataParallel, and both make the same plan.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from psap_core import PSAP, export


class Pruning(L.Callback):
    """PSAP on `module.network`, which is what the module's forward calls."""

    def __init__(self, example: Tensor, criterion: Callable[..., Tensor], **settings: Any) -> None:
        self.example, self.criterion, self.settings = example, criterion, settings
        self.loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        example = self.example.to(module.device)
        self.pruner = PSAP(module.network, trainer.optimizers, example, **self.settings)
        if self.loaded is not None:  # Lightning has loaded network and optimizer before
            self.pruner.load_state_dict(self.loaded)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        def loss_of_batch(batch: Any) -> Tensor:
            images, labels = trainer.strategy.batch_to_device(batch)
            return self.criterion(trainer.model(images), labels)  # trainer.model: wrapped in DDP

        if trainer.is_last_batch:  # and not on_train_epoch_end, which comes after the validation
            self.pruner.end_epoch(trainer.train_dataloader, loss_of_batch)

    def state_dict(self) -> dict[str, Any]:
        return self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 8), (8, 16), (16, 32)):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
        self.network = nn.Sequential(*layers, *head)
        images, labels = load_digits(return_X_y=True)
        self.images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).div(16)
        self.labels = torch.tensor(labels)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)

    def training_step(self, batch: Any, index: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch: Any, index: int) -> None:
        images, labels = batch
        accuracy = (self(images).argmax(1) == labels).float().mean()
        self.log("accuracy", accuracy, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9, weight_decay=5e-4)

    def train_dataloader(self) -> DataLoader[Any]:
        train = TensorDataset(self.images[:1437], self.labels[:1437])
        return DataLoader(train, batch_size=128, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.images[1437:], self.labels[1437:]), batch_size=360)


def main(folder: Path, processes: int = 1, epochs: int = 20) -> tuple[nn.Module, nn.Module, PSAP]:
    """The masked network, the small one, and the pruner."""
    L.seed_everything(0)
    module = Digits()
    pruning = Pruning(
        module.images[:1],
        F.cross_entropy,
        target_macs_cut=0.5,
        total_epochs=epochs,
    )
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        max_epochs=epochs,
        callbacks=[pruning, ModelCheckpoint(folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(module, ckpt_path=last if last.exists() else None)
    plan = pruning.pruner.plan
    small = export(module.network, plan)
    accuracy = trainer.callback_metrics["accuracy"]
    cut = f"{plan.macs_cut:.1%} of the MACs cut, accuracy {accuracy:.1%}"
    print(f"process {trainer.global_rank}: {cut}, plan {plan.digest[:8]}")
    return module.network, small, pruning.pruner


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the checkpoints")
    parser.add_argument("--processes", type=int, default=1)
    main(**vars(parser.parse_args()))
