"""Further detectors of copies, each blind where another sees: near-copies, shifted contrast, pasted backgrounds.

The plain one is the rms distance of :mod:`jaxunlearn.metrics.extraction`. Here:

* :func:`carlini_ratio`: the distance relative to how crowded the neighbourhood is (copy if below 1);
* :func:`neighbour_ratio`: the distance relative to that of the nearest other image (copy if below 1/3);
* :func:`tile_distance`: the worst of 4x4 tiles, so that an empty background alone makes no copy;
* :func:`ssim_distance`: ``1 - SSIM``, which looks at structure rather than brightness.

The last two need a threshold: :func:`jaxunlearn.metrics.extraction.COPY_FRACTION` of the distance of the nearest other
image, as for the plain detector. Images are uint8 or floating in [0, 1], channels last.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.metrics import distances
from jaxunlearn.metrics.ssim import ssim

CARLINI_SCALE, CARLINI_NEIGHBOURS = 0.5, 50
RATIO_THRESHOLD = 1.0 / 3.0
TILES = 4


def carlini_ratio(
    to_forget: np.ndarray, neighbours: np.ndarray, *, scale: float = CARLINI_SCALE, count: int = CARLINI_NEIGHBOURS
) -> np.ndarray:
    """``ell = d(x, a0) / (scale * mean distance of the count nearest of keep + {a0} to x)``; below 1 is a copy.

    Carlini et al. 2023 (arXiv 2301.13188, section 4). The mean makes the threshold narrow where samples are close to
    many images anyhow.

    Args:
      to_forget: rms distances [N, F] of samples to forget images.
      neighbours: rms distances [N, K] of samples to their K nearest keep images, rising; from
        :func:`jaxunlearn.metrics.distances.k_nearest`. All keep images where there are fewer than ``count``.
      scale: alpha of the paper.
      count: number of neighbours.

    Returns:
      float64 [N, F].

    Raises:
      ValueError: shapes that do not fit, no neighbours.

    >>> far = np.full((1, 50), 1.0)
    >>> print(f"{carlini_ratio(np.array([[0.2]]), far, count=50)[0, 0]:.4f}")
    0.4065
    """
    d, near = np.asarray(to_forget, np.float64), np.asarray(neighbours, np.float64)
    if d.ndim != 2 or near.ndim != 2 or len(d) != len(near) or not near.shape[1]:
        raise ValueError(f"distances must be [N, F] and [N, K] of the same samples, got {d.shape} and {near.shape}")
    # The forget image is one of the neighbours if it is closer than the last of them.
    sums = np.concatenate([np.zeros((len(near), 1)), np.cumsum(near, axis=1)], axis=1)
    if near.shape[1] < count:
        mean = (sums[:, -1:] + d) / (near.shape[1] + 1)
    else:
        mean = (sums[:, count - 1 : count] + np.minimum(d, near[:, count - 1 : count])) / count
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(mean > 0, d / (scale * mean), np.where(d > 0, np.inf, 0.0))


def neighbour_ratio(to_forget: np.ndarray, nearest_keep: np.ndarray) -> np.ndarray:
    """Distance to the nearest forget image over that to the nearest keep image: [N, F], [N] -> float64 [N].

    Below 1/3 is a copy. Other forget images do not count as second neighbours, because near-duplicates within a forget
    set would hide each other.

    >>> neighbour_ratio(np.array([[0.1, 0.4]]), np.array([0.5])).tolist()
    [0.2]

    Raises:
      ValueError: shapes that do not fit.
    """
    d, keep = np.asarray(to_forget, np.float64), np.asarray(nearest_keep, np.float64)
    if d.ndim != 2 or not d.shape[1] or keep.shape != d.shape[:1]:
        raise ValueError(f"distances must be [N, F] and [N] of the same samples, got {d.shape} and {keep.shape}")
    closest = d.min(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(keep > 0, closest / keep, np.where(closest > 0, np.inf, 1.0))


def tile_distance(images, references, tiles: int = TILES) -> np.ndarray:
    """The largest rms distance of any of ``tiles`` x ``tiles`` tiles: [N,H,W,C], [M,H,W,C] -> float64 [N, M]; small M.

    Tiles of images whose side is no multiple differ by one pixel; images with fewer pixels have fewer tiles.

    Raises:
      ValueError: as :func:`jaxunlearn.metrics.distances.pairwise`, or fewer than one tile.
    """
    if tiles < 1:
        raise ValueError(f"tiles = {tiles}; allowed: at least 1")
    images, references = np.asarray(images), np.asarray(references)
    if images.shape[1:] != references.shape[1:]:
        raise ValueError(f"images of shape {images.shape[1:]} cannot be compared with images of {references.shape[1:]}")
    out = np.zeros((len(images), len(references)))
    height, width = images.shape[1:3]
    for down in np.array_split(np.arange(height), min(tiles, height)):
        for across in np.array_split(np.arange(width), min(tiles, width)):
            place = (slice(None), slice(down[0], down[-1] + 1), slice(across[0], across[-1] + 1))
            np.maximum(out, distances.pairwise(images[place], references[place]), out=out)
    return out


def ssim_distance(images, references, chunk: int = 512) -> np.ndarray:
    """``1 - SSIM`` of each image and its own reference: [N,H,W,C] twice -> float64 [N], in [0, 2].

    Raises:
      ValueError: sets of different shape, or floating values outside [0, 1].
    """
    images, references = np.asarray(images), np.asarray(references)
    if images.shape != references.shape:
        raise ValueError(f"images and references must have one shape, got {images.shape} and {references.shape}")
    first, second = (distances.rows(part).reshape(part.shape) for part in (images, references))
    out = np.empty(len(first))
    chunk = max(1, min(chunk, len(first)))
    for start in range(0, len(first), chunk):
        take = np.minimum(np.arange(start, start + chunk), len(first) - 1)  # every call has one shape
        stop = min(start + chunk, len(first))
        out[start:stop] = 1.0 - np.asarray(_ssim(first[take], second[take]), np.float64)[: stop - start]
    return out


@jax.jit
def _ssim(first, second):
    return ssim(jnp.asarray(first), jnp.asarray(second))
