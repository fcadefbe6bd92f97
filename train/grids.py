"""Grids of sampled images as PNG files."""

from __future__ import annotations

import math
import pathlib

import numpy as np

from jaxunlearn.images import to_uint8
from jaxunlearn.types import Array


def tile(images: np.ndarray, *, gap: int = 1) -> np.ndarray:
    """uint8 [N,H,W,C] -> one picture, about as wide as high, with a grey gap between the images."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    picture = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 128, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        picture[y : y + height, x : x + width] = image
    return picture


def save_grid(path: pathlib.Path, images: Array) -> None:
    """Writes images in [-1, 1], [N,H,W,C] with 1 or 3 channels, as a PNG; small ones are enlarged without smoothing."""
    from PIL import Image

    picture = tile(to_uint8(images))
    scale = max(1, 64 // images.shape[1])
    picture = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture).save(temporary, format="PNG")
    temporary.replace(path)
