"""What a CIFAR-10 training step costs, and its augmentation beside PIL's.

augment_images_per_second_per_core: 50,000 images of 32x32, padded once beforehand, batch 128: cropped, flipped,
    normalised, one thread.
augment_vs_pil_ratio: over torchvision's transforms of PIL images, one after the other on one thread; both make the
    same pixels, bit for bit, or there is no figure.
train_step_dense_ms: one step of ResNet-20, batch 128 at 32x32: augmentation, forward, backward, SGD with momentum.
"""

import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.benchmarks import Figures, cifar_resnet, figure, one_thread, seconds, sgd
from experiments.data.base import Normalisation, Sharing
from experiments.data.tensor_images import LabelledImages, TensorLoader, crop

IMAGES, SIZE, PADDING, BATCH = 50_000, 32, 4, 128
PIL_IMAGES, REPETITIONS, STEPS = 2_000, 5, 10
NORMALISATION = Normalisation((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))


def training() -> Figures:
    return augmentation() | steps()


def augmentation() -> Figures:
    images = torch.randint(256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8)
    batches = TensorLoader(
        LabelledImages(images, torch.zeros(IMAGES).long()),
        NORMALISATION,
        Sharing(BATCH),
        True,
        seed=0,
    )
    top, left = torch.randint(2 * PADDING + 1, (2, PIL_IMAGES))
    flips = torch.rand(PIL_IMAGES) < 0.5
    one_by_one = _pil(images[:PIL_IMAGES], top, left, flips)
    window = (top * (2 * PADDING + 1) + left) * 2 + flips
    at_once = NORMALISATION(crop(batches.padded[:PIL_IMAGES], batches.windows[window]))
    if not torch.equal(torch.stack(one_by_one()), at_once):
        raise AssertionError("the two augmentations make different pixels")
    rates, ratios = [], []
    with one_thread():
        for epoch in range(REPETITIONS):
            ours = _rate(partial(_count, batches, epoch))
            ratios.append(ours / _rate(lambda: len(one_by_one())))
            rates.append(ours)
    return {
        "augment_images_per_second_per_core": figure(rates),
        "augment_vs_pil_ratio": figure(ratios),
    }


def _pil(images: Tensor, top: Tensor, left: Tensor, flips: Tensor) -> Callable[[], list[Tensor]]:
    """torchvision's pad, crop, hflip, to_tensor and normalize of every image."""
    from PIL import Image
    from torchvision.transforms import functional as TF

    pictures = [
        Image.fromarray(np.ascontiguousarray(image)) for image in images.permute(0, 2, 3, 1).numpy()
    ]
    draws = list(zip(pictures, top.tolist(), left.tolist(), flips.tolist(), strict=True))
    mean, std = list(NORMALISATION.mean), list(NORMALISATION.std)

    def augmented() -> list[Tensor]:
        result = []
        for picture, row, column, flip in draws:
            crop = TF.crop(TF.pad(picture, [PADDING]), row, column, SIZE, SIZE)
            result.append(TF.normalize(TF.to_tensor(TF.hflip(crop) if flip else crop), mean, std))
        return result

    return augmented


def _count(batches: TensorLoader, epoch: int) -> int:
    """Make an epoch's images, and say how many they are."""
    return sum(len(batch.parts[0][1]) for batch in batches.epoch("train", epoch))


def _rate(images: Callable[[], int]) -> float:
    began = time.perf_counter()
    return images() / (time.perf_counter() - began)


def steps() -> Figures:
    model = cifar_resnet(20)
    optimizer = sgd(model)
    split = LabelledImages(
        torch.randint(256, (BATCH * (STEPS + 2), 3, SIZE, SIZE), dtype=torch.uint8),
        torch.randint(10, (BATCH * (STEPS + 2),)),
    )
    batches = TensorLoader(split, NORMALISATION, Sharing(BATCH), True, seed=0).epoch("train", 0)

    def step() -> None:
        ((images, labels),), _ = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return {"train_step_dense_ms": figure([1000 * seconds(step) for _ in range(STEPS + 2)][2:])}
