"""Root-mean-square distances between images: ``rms(a, b) = sqrt(mean((a - b)^2))`` over pixels in [0, 1].

An L2 distance over D numbers is ``rms * sqrt(D)``: the distance 10 at 28x28 is an rms of 0.357.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Nearest(NamedTuple):
    """Nearest neighbours.

    Attributes:
      distance: float64 [N], rms distance to the nearest reference image.
      index: int64 [N], which one it is.
    """

    distance: np.ndarray
    index: np.ndarray


def rows(images) -> np.ndarray:
    """Unit images [N,H,W,C] (uint8 in 0..255, or floating in [0, 1]) as float32 rows [N, D].

    Raises:
      ValueError: another rank, or floating values outside [0, 1] (the images are probably in [-1, 1]).
    """
    images = np.asarray(images)
    if images.ndim != 4:
        raise ValueError(f"images must be [N,H,W,C], got shape {images.shape}")
    scaled = images.astype(np.float32)
    if images.dtype == np.uint8:
        scaled /= 255.0
    elif images.size and (np.nanmin(scaled) < -1e-4 or np.nanmax(scaled) > 1 + 1e-4):
        raise ValueError(
            f"floating images must lie in [0, 1], got [{np.nanmin(scaled):.3g}, {np.nanmax(scaled):.3g}]; "
            "use images.to_unit on model images"
        )
    return scaled.reshape(len(scaled), int(np.prod(scaled.shape[1:])))


def pairwise(images, references, chunk: int = 512) -> np.ndarray:
    """rms distances float64 [N, M] of [N,H,W,C] and [M,H,W,C], uint8 or in [0, 1]; for small M.

    In float64 the formula ``|x|^2 + |y|^2 - 2 x y`` is good to about 1e-8.

    >>> black, white = np.zeros((1, 2, 2, 1)), np.ones((1, 2, 2, 1))
    >>> float(pairwise(black, white)[0, 0])
    1.0
    """
    x, y = rows(images), rows(references)
    _same_size(x, y)
    y = y.astype(np.float64)
    out = np.empty((len(x), len(y)))
    for start in range(0, len(x), chunk):
        part = x[start : start + chunk].astype(np.float64)
        squared = np.sum(part**2, axis=1)[:, None] + np.sum(y**2, axis=1) - 2.0 * (part @ y.T)
        out[start : start + chunk] = np.sqrt(np.maximum(squared, 0.0) / y.shape[1])
    return out


def nearest(images, references, *, chunk: int = 512, reference_chunk: int = 8192) -> Nearest:
    """The nearest reference of each image, in chunks: [N,H,W,C] and [M,H,W,C], uint8 or in [0, 1].

    The search uses ``|x|^2 + |y|^2 - 2 x y`` on centred float32 rows, which cancels near zero, so the distance of the
    winner is computed again directly.

    Raises:
      ValueError: no references, or images of another size.
    """
    x, y = rows(images), rows(references)
    if not len(y):
        raise ValueError("there is no reference image to measure a distance to")
    _same_size(x, y)
    centre = y[: 4 * reference_chunk].mean(axis=0)
    best = np.full(len(x), np.inf, np.float32)
    index = np.zeros(len(x), np.int64)
    for low in range(0, len(y), reference_chunk):
        part = y[low : low + reference_chunk] - centre
        squares = np.einsum("md,md->m", part, part)
        for start in range(0, len(x), chunk):
            mine = x[start : start + chunk] - centre
            squared = squares - 2.0 * (mine @ part.T)  # |x|^2 is the same for every candidate
            winner = squared.argmin(axis=1)
            value = squared[np.arange(len(mine)), winner]
            better = value < best[start : start + chunk]
            best[start : start + chunk][better] = value[better]
            index[start : start + chunk][better] = winner[better] + low
    exact = np.empty(len(x))
    for start in range(0, len(x), chunk):
        stop = start + chunk
        difference = x[start:stop].astype(np.float64) - y[index[start:stop]]
        exact[start:stop] = np.sqrt(np.mean(difference**2, axis=1))
    return Nearest(exact, index)


def k_nearest(images, references, k: int, *, chunk: int = 512, reference_chunk: int = 8192) -> np.ndarray:
    """rms distances to the k nearest references, rising: [N,H,W,C] and [M,H,W,C] -> float64 [N, min(k, M)].

    Searched like :func:`nearest`, in float32 around the references' mean; the distances themselves keep that precision,
    about 1e-3 near zero.

    Raises:
      ValueError: no references, k below 1, or images of another size.
    """
    x, y = rows(images), rows(references)
    if not len(y) or k < 1:
        raise ValueError(f"neighbours need reference images and k of at least 1, got {len(y)} references and k = {k}")
    _same_size(x, y)
    centre = y[: 4 * reference_chunk].mean(axis=0)
    out = np.empty((len(x), min(k, len(y))))
    for start in range(0, len(x), chunk):
        mine = x[start : start + chunk] - centre
        best = np.empty((len(mine), 0), np.float32)
        for low in range(0, len(y), reference_chunk):
            part = y[low : low + reference_chunk] - centre
            squared = np.einsum("md,md->m", part, part) - 2.0 * (mine @ part.T)
            best = np.concatenate([best, squared], axis=1)
            if best.shape[1] > k:
                best = np.partition(best, k - 1, axis=1)[:, :k]
        squared = np.sort(best.astype(np.float64), axis=1) + np.einsum("nd,nd->n", mine, mine)[:, None]
        out[start : start + chunk] = np.sqrt(np.maximum(squared, 0.0) / x.shape[1])
    return out


def _same_size(x: np.ndarray, y: np.ndarray) -> None:
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"images of {x.shape[1]} numbers cannot be compared with images of {y.shape[1]}")
