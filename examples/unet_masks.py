"""PSAP on a small U-Net that learns to find discs in noisy images, pruned while it trains.

    python examples/unet_masks.py

First prints the report: which channels go together across the skip connections, and what is left alone. Then half of
the MACs are removed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from psap_core import PSAP, export, report


def discs(count: int, seed: int, size: int = 16) -> TensorDataset:
    """Noisy images [N, 1, size, size], and masks of the same shape: 1 within a disc, 0 outside."""
    generator = torch.Generator().manual_seed(seed)
    x, y, radius = torch.rand(3, count, 1, 1, 1, generator=generator)
    grid = torch.linspace(0, 1, size)
    radius = 0.15 + 0.2 * radius
    distance = torch.hypot(grid.view(1, 1, 1, -1) - x, grid.view(1, 1, -1, 1) - y)
    masks = (distance < radius).float()
    noise = torch.randn(masks.shape, generator=generator)
    return TensorDataset(masks + 0.7 * noise, masks)


def double(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers.append(nn.Conv2d(width, outputs, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Images [N, 1, H, W] to logits [N, 1, H, W]; H and W are multiples of 4."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1 = double(1, width)
        self.down2 = double(width, 2 * width)
        self.bottom = double(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge2 = double(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge1 = double(2 * width, width)
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.down1(images)
        middle = self.down2(F.max_pool2d(fine, 2))
        coarse = self.bottom(F.max_pool2d(middle, 2))
        middle = self.merge2(torch.cat([middle, self.up2(coarse)], 1))
        fine = self.merge1(torch.cat([fine, self.up1(middle)], 1))
        return self.head(fine)


def overlap(model: nn.Module, test: TensorDataset) -> float:
    """Intersection over union of the predicted masks and the true ones."""
    images, masks = test.tensors
    with torch.no_grad():
        found = model.eval()(images) > 0
    true = masks > 0
    return float((found & true).sum() / (found | true).sum())


def main(epochs: int = 20) -> tuple[nn.Module, nn.Module, PSAP]:
    """The masked network, the small one, and the pruner."""
    torch.manual_seed(0)
    train, test = discs(96, seed=0), discs(64, seed=1)
    loader = DataLoader(train, batch_size=16, shuffle=True)
    model = UNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    example = train.tensors[0][:1]
    print(report(model, example))

    def loss_of_batch(batch: list[Tensor]) -> Tensor:
        images, masks = batch
        return F.binary_cross_entropy_with_logits(model(images), masks)

    pruner = PSAP(
        model,
        optimizer,
        example,
        target_macs_cut=0.5,
        total_epochs=epochs,
    )
    for epoch in range(epochs):
        model.train()
        for batch in loader:
            optimizer.zero_grad()
            loss_of_batch(batch).backward()
            optimizer.step()
        pruner.end_epoch(loader, loss_of_batch)
        cut = pruner.plan.macs_cut
        print(f"epoch {epoch + 1}: {cut:.1%} of the MACs cut, overlap {overlap(model, test):.1%}")

    small = export(model, pruner.plan)
    print(f"exported: {pruner.plan.macs:,} MACs an image, overlap {overlap(small, test):.1%}")
    return model, small, pruner


if __name__ == "__main__":
    main()
