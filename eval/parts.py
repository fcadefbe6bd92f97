"""Large images in parts: metrics work on float64 rows of pixels, which must not all be in memory at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

MAX_NUMBERS = 2**29
"""Pixel values that are worked on at once, 4 GB in float64: about 680 colour images of 512 pixels."""


def parts_of(images: np.ndarray) -> list[np.ndarray]:
    """Images [N,H,W,C] in parts of at most MAX_NUMBERS pixel values (or one image); all at once where they are small."""
    size = max(1, MAX_NUMBERS // int(np.prod(images.shape[1:])))
    return [images[start : start + size] for start in range(0, len(images), size)] or [images]


def in_parts(function: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    """``function(images)`` with one result per image, computed part by part."""
    return np.concatenate([function(part) for part in parts_of(images)])
