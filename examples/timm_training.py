"""PSAP in timm's training step: its network, optimizer, scheduler, mixup, clipping and averaged weights (EMA).

    python examples/timm_training.py

Removes half of the MACs of a small ResNet of timm's, on the handwritten digits. The network that is exported is the
averaged one.
"""

import timm
import torch
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from psap_core import PSAP, export


def digits(train_images: int) -> tuple[TensorDataset, TensorDataset]:
    """Training and test images [N, 1, 16, 16], each pixel of the digits four times; labels [N]."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).div(16)
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    y = torch.tensor(labels)
    train = TensorDataset(x[:train_images], y[:train_images])
    return train, TensorDataset(x[1437:], y[1437:])


def accuracy(model: nn.Module, test: TensorDataset) -> float:
    images, labels = test.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).float().mean())


def main(epochs: int = 20, train_images: int = 384) -> tuple[nn.Module, nn.Module, PSAP]:
    """The averaged masked network, the small one, and the pruner."""
    torch.manual_seed(0)
    train, test = digits(train_images)
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=5e-3, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=epochs, warmup_epochs=2)
    average = ModelEmaV3(model, decay=0.95)
    mixup = Mixup(mixup_alpha=0.1, num_classes=10, label_smoothing=0.05)
    criterion = SoftTargetCrossEntropy()

    def loss_of_batch(batch: list[Tensor]) -> Tensor:
        images, targets = mixup(*batch)
        return criterion(model(images), targets)

    freeze = epochs // 2  # from here on the plan is final
    pruner = PSAP(
        model,
        optimizer,
        train.tensors[0][:1],
        target_macs_cut=0.5,
        total_epochs=epochs,
        freeze=freeze,
        pulse_batches=4,
        fan="out",  # as timm initialises its ResNets
    )
    for epoch in range(epochs):
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            loss_of_batch(batch).backward()
            dispatch_clip_grad(model.parameters(), value=1.0)
            optimizer.step()
            average.update(model)
        was_final = pruner.plan_is_final
        pruner.end_epoch(loader, loss_of_batch)
        if not was_final:
            average.set(model)  # averages of weights from before the freeze do not fit the plan
        scheduler.step(epoch + 1)
        cut, top1 = pruner.plan.macs_cut, accuracy(average.module, test)
        print(f"epoch {epoch + 1}: {cut:.1%} of the MACs cut, accuracy {top1:.1%}")

    small = export(average.module, pruner.plan)
    print(f"exported: {pruner.plan.macs:,} MACs an image, accuracy {accuracy(small, test):.1%}")
    return average.module, small, pruner


if __name__ == "__main__":
    main()
