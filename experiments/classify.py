"""What an exported network sees in images: `python -m experiments.classify <run folder> <image> ...`.

    python -m experiments.classify runs/image_folder/<hash>/seed0 photograph.jpg
    python -m experiments.classify runs/image_folder/<hash>/seed0 photographs/*/*.jpg

A line for each image: its most probable class, and that probability. Images are turned, scaled, cropped and normalised
as in the run's tests. Networks of image folders, Imagenette and ImageNet can be asked.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.exits import plain_exits
from psap_core import InputError


def classify(run: Path, images: Sequence[Path]) -> Iterator[str]:
    """A line for each image: its path, its most probable class, and that probability.

    Raises:
        InputError: the folder holds no network of image files, or an image cannot be read.
    """
    import torch

    from experiments import models
    from experiments.data.image_folder import read_image, to_device
    from psap_core.exported import read_spec

    folder = run / "export"
    spec = read_spec(folder)
    preprocessing = spec.get("preprocessing")
    if preprocessing is None:
        raise InputError(
            f"{run} was trained on images that are no files: experiments.evaluate tests it on its data"
        )
    model, normalisation = models.open_exported(folder)
    for path in images:
        pixels = read_image(path, preprocessing["size"], preprocessing["turned_upright"])
        with torch.no_grad():
            logits = model(to_device(pixels, normalisation, torch.device("cpu")))
        probability, label = logits.softmax(1).max(1)
        yield f"{path}: {spec['class_names'][label]}, {100 * float(probability):.1f} %"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="run_folder")
    parser.add_argument("images", type=Path, nargs="+", metavar="image")
    words = parser.parse_args(arguments)
    with plain_exits():
        for line in classify(words.run, words.images):
            print(line, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
