"""An ImageNet-like folder without a download: `python -m tests.data.photographs OUT [--train N --val N --size W H]`.

Its two classes are crops of scikit-learn's two sample photographs.
"""

import argparse
import random
from pathlib import Path

import numpy as np
from PIL import Image

PALACE, DAISY = "n03877845", "n11939491"
PHOTOGRAPHS = {PALACE: "china.jpg", DAISY: "flower.jpg"}
# ImageNet's own irregularities, by the position of an image in its class.
IRREGULAR = {1: "grayscale", 2: "cmyk", 3: "png"}


def sample_folder(
    root: Path, train: int = 16, val: int = 8, size: tuple[int, int] = (500, 375)
) -> Path:
    """Write root/{train,val}/{n03877845,n11939491}/*.JPEG: distinct crops, the same at every call.

    Args:
        train, val: images per class.
        size: width and height of an image, in pixels; larger than the photographs (640x427) means enlarged.

    Returns:
        `root`.
    """
    from sklearn.datasets import load_sample_image

    width, height = size
    for wnid, name in PHOTOGRAPHS.items():
        photograph = Image.fromarray(np.asarray(load_sample_image(name)))
        draw = random.Random(name)
        for split, count in (("train", train), ("val", val)):
            folder = root / split / wnid
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                scale = min(photograph.width / width, photograph.height / height) * draw.uniform(
                    0.8, 1
                )
                left = draw.uniform(0, photograph.width - scale * width)
                top = draw.uniform(0, photograph.height - scale * height)
                box = (left, top, left + scale * width, top + scale * height)
                image = photograph.resize(size, Image.Resampling.BICUBIC, box=box)
                _save(image, folder / f"{wnid}_{split}_{index:05d}.JPEG", IRREGULAR.get(index, ""))
    return root


def _save(image: Image.Image, path: Path, kind: str) -> None:
    mode = {"grayscale": "L", "cmyk": "CMYK"}.get(kind, "RGB")
    image.convert(mode).save(path, "PNG" if kind == "png" else "JPEG", quality=90)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=16, help="images per class")
    parser.add_argument("--val", type=int, default=8, help="images per class")
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), metavar=("W", "H"))
    options = parser.parse_args()
    print(sample_folder(options.out, options.train, options.val, tuple(options.size)))
