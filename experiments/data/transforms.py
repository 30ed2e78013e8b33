"""What becomes of one photograph: ImageNet's random crop for training, its centre crop for evaluation."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

# A training crop is that of torchvision's RandomResizedCrop.
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10
DRAWS = 2 * TRIES + 3  # area and ratio of every try, top, left, mirror


def crop_box(width: int, height: int, uniforms: Sequence[float]) -> tuple[int, int, int, int]:
    """The box (left, top, width, height) that torchvision's RandomResizedCrop makes of 22 uniforms in [0, 1).

    The first of ten tries that fits counts; the centre is taken where none does.
    """
    area, low, high = width * height, *map(math.log, RATIO)
    for share, shape in zip(uniforms[0 : 2 * TRIES : 2], uniforms[1 : 2 * TRIES : 2], strict=True):
        target = area * (AREA[0] + share * (AREA[1] - AREA[0]))
        ratio = math.exp(low + shape * (high - low))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = uniforms[2 * TRIES : 2 * TRIES + 2]
            return int(left * (width - w + 1)), int(top * (height - h + 1)), w, h
    w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
    return (width - w) // 2, (height - h) // 2, w, h


def training_view(
    image: Image.Image, size: int, uniforms: Sequence[float], flip: bool
) -> NDArray[np.uint8]:
    """A random crop, mirrored for half of the last uniforms, uint8 [S, S, 3]; `image` is opened, not yet decoded.

    Equal to what torchvision makes of a uint8 tensor, and but for a level here and there of a PIL image, except where
    the crop is so large that a JPEG decoded at 1/2, 1/4 or 1/8 of its resolution still has two pixels for every one
    that is left. That halves the time, and more, for a large photograph, and moves pixels by 1.6 of 255 levels on
    average; bicubic for bilinear filtering would by 1.8.
    """
    full_width, full_height = image.size
    left, top, width, height = crop_box(full_width, full_height, uniforms)
    reduction = min(width, height) // (2 * size)
    if reduction >= 2:
        # It does nothing to a PNG.
        image.draft(None, (full_width // reduction, full_height // reduction))
    x, y = image.width / full_width, image.height / full_height
    crop = _rgb(image).crop(
        (round(left * x), round(top * y), round((left + width) * x), round((top + height) * y))
    )
    # torch needs a quarter of PIL's time, if the memory is channels_last before and after (the first index matters).
    pixels = torch.from_numpy(np.array(crop))[None].permute(0, 3, 1, 2)
    view = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True)
    mirrored = flip and uniforms[-1] < 0.5
    return (view.flip(3) if mirrored else view)[0].permute(1, 2, 0).numpy()


def shorter_side(size: int) -> int:
    """Pixels of an image's shorter side of which S x S are cropped: 256 for 224, as is usual."""
    return round(size * 256 / 224)


def evaluation_view(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """The central S x S pixels of the image scaled to `shorter_side`, uint8 [S, S, 3]."""
    short = shorter_side(size)
    scaled = [int(short * side / min(image.size)) for side in image.size]
    resized = _rgb(image).resize((scaled[0], scaled[1]), Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in scaled)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def upright(image: Image.Image) -> Image.Image:
    """The image as a person sees it: turned as its EXIF data say, and on white where it is transparent.

    Most are left as they are, not decoded yet.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        layers = image.convert("RGBA")
        white = Image.new("RGBA", layers.size, "white")
        image = Image.alpha_composite(white, layers)
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # grey; `convert` would cut off what is above 255
        grey = np.asarray(image)
        if image.mode.startswith("I;16") or grey.max() > 255:
            grey = grey >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    return image.convert("RGB")
