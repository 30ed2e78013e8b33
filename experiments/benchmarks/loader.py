"""How fast photographs are read, in images per second and core, beside plain torchvision.

Both loaders have one worker process, which reads, decodes, crops and scales; both deliver normalised float32 batches
to this process. The plain one normalises in its worker; ours does it here meanwhile, in a GPU's place.

loader_images_per_second_per_core, loader_plain_images_per_second_per_core: one epoch of 500x375 JPEGs.
loader_vs_plain_ratio: of the two, measured one after the other.
loader_pixel_difference: mean absolute difference of an image's pixels, in 8-bit levels, for the same crops.
With the suffix _imagenette: the same for the photographs of $PSAP_DATA/imagenette, where that exists.
"""

import os
import random
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from experiments.benchmarks import Figures, figure, one_thread
from experiments.data import image_folder, transforms
from experiments.data.base import Normalisation, Sharing
from experiments.schema import ImageFolderConfig, OnCorrupt

SIZE, BATCH, IMAGES, REPETITIONS = 224, 64, 320, 3
COMPARED_IMAGES = 64  # for the pixels
NORMALISATION = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SAMPLES = {"n03877845": "china.jpg", "n11939491": "flower.jpg"}


def loader() -> Figures:
    imagenette = Path(os.environ.get("PSAP_DATA", "data"), "imagenette")
    with one_thread(), tempfile.TemporaryDirectory() as folder:
        _write_samples(Path(folder))
        figures = _compared(Path(folder), "")
        if imagenette.is_dir():
            figures |= _compared(imagenette, "_imagenette")
    return figures


def _compared(root: Path, suffix: str) -> Figures:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    recipe = v2.Compose(
        [
            v2.RandomResizedCrop(SIZE),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(NORMALISATION.mean, NORMALISATION.std),
        ]
    )
    mean, std = list(NORMALISATION.mean), list(NORMALISATION.std)
    cfg = ImageFolderConfig(
        "imagenet", str(root), SIZE, IMAGES, 0, True, mean, std, OnCorrupt.error
    )
    dataset = image_folder.load_image_folder(cfg)
    ours = dataset.training(
        Sharing(BATCH), NORMALISATION, seed=0, device=torch.device("cpu"), workers=1
    )
    folder = ImageFolder(str(root / "train"), recipe)
    chosen = set(map(os.fsdecode, dataset.train.names.tolist()))
    same = [
        index
        for index, (path, _) in enumerate(folder.samples)
        if os.path.relpath(path, root) in chosen
    ]
    plain = DataLoader(
        Subset(folder, same), BATCH, shuffle=True, num_workers=1, persistent_workers=True
    )
    rates: dict[str, list[float]] = {"loader": [], "loader_plain": []}
    for epoch in range(
        REPETITIONS + 1
    ):  # the first one starts the workers and warms the disk's cache
        rates["loader"].append(_rate(batch.parts[0][0] for batch in ours.epoch("train", epoch)))
        rates["loader_plain"].append(_rate(images for images, _ in plain))
    figures = {
        f"{name}_images_per_second_per_core": figure(values[1:]) for name, values in rates.items()
    }
    ratios = [a / b for a, b in list(zip(*rates.values(), strict=True))[1:]]
    figures |= {
        "loader_vs_plain_ratio": figure(ratios),
        "loader_pixel_difference": figure(_differences(dataset)),
    }
    return {name + suffix: values for name, values in figures.items()}


def _rate(batches: Iterable[Tensor]) -> float:
    began = time.perf_counter()
    count = sum(len(images) for images in batches)
    assert count == IMAGES
    return count / (time.perf_counter() - began)


def _differences(dataset: image_folder.ImageFolder) -> list[float]:
    from torchvision.transforms.v2 import functional as TF

    draw = np.random.default_rng(0)
    differences = []
    for name in dataset.train.names[:COMPARED_IMAGES].tolist():
        uniforms = draw.random(transforms.DRAWS).tolist()
        with Image.open(Path(dataset.root, os.fsdecode(name))) as image:
            left, top, width, height = transforms.crop_box(*image.size, uniforms)
            ours = transforms.training_view(image, SIZE, uniforms, flip=False)
        with Image.open(Path(dataset.root, os.fsdecode(name))) as image:
            plain = TF.resized_crop(image.convert("RGB"), top, left, height, width, [SIZE, SIZE])
        differences.append(
            float(np.abs(np.asarray(ours, dtype=int) - np.asarray(plain, dtype=int)).mean())
        )
    return differences


def _write_samples(root: Path) -> None:
    """Crops of scikit-learn's two photographs in ImageNet's layout and usual size."""
    from sklearn.datasets import load_sample_image

    draw = random.Random(0)
    for wnid, name in SAMPLES.items():
        photograph = Image.fromarray(load_sample_image(name))
        for split, count in (("train", IMAGES // len(SAMPLES)), ("val", 1)):
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for index in range(count):
                left, top = (
                    draw.randint(0, photograph.width - 500),
                    draw.randint(0, photograph.height - 375),
                )
                photograph.crop((left, top, left + 500, top + 375)).save(
                    folder / f"{index}.JPEG", quality=90
                )
