"""Equal and nearly equal images: content hashes, and an exact search by pixel distance."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

_CHUNK_BYTES = 64 << 20  # of float32 pixels held at a time, per side
_CHUNK_ROWS = (4096, 2048)  # of candidates and of targets at most: their table of distances must fit in memory too


@dataclasses.dataclass(frozen=True)
class NearDuplicates:
    """Images that are close to an image of the forget set; three arrays of one length, sorted by ``index``.

    Attributes:
      index: int64, positions in the image array.
      nearest: int64, position of the closest forget image (the first of them on a tie).
      rms: float64, root mean square pixel difference to it on the [-1, 1] scale.
    """

    index: np.ndarray
    nearest: np.ndarray
    rms: np.ndarray

    def __len__(self) -> int:
        return len(self.index)


def no_near_duplicates() -> NearDuplicates:
    """The empty result."""
    return NearDuplicates(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float64))


def pixel_message(image: np.ndarray) -> bytes:
    """What is hashed of a decoded image: its shape as decimals, a NUL byte, its bytes in row order.

    Args:
      image: uint8 [H, W, C].

    >>> pixel_message(np.zeros((1, 2, 1), np.uint8))
    b'1,2,1\\x00\\x00\\x00'
    """
    if image.dtype != np.uint8:
        raise ValueError(f"image is {image.dtype}; allowed: uint8")
    return ",".join(map(str, image.shape)).encode() + b"\0" + np.ascontiguousarray(image).tobytes()


def pixel_digests(images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """uint8 [N, 32]: SHA-256 of :func:`pixel_message` of every image."""
    out = np.empty((len(images), 32), np.uint8)
    for i, image in enumerate(images):
        out[i] = np.frombuffer(hashlib.sha256(pixel_message(image)).digest(), np.uint8)
    return out


def content_groups(digests: np.ndarray) -> np.ndarray:
    """int64 [N]: the same number for images of the same digest (uint8 [N, 32])."""
    rows = np.ascontiguousarray(digests).view("V32").reshape(-1)
    return np.unique(rows, return_inverse=True)[1].reshape(-1).astype(np.int64)


def find_near_duplicates(images: np.ndarray, candidates: np.ndarray, targets: np.ndarray, rms: float) -> NearDuplicates:
    """Candidates whose root mean square pixel difference to a target is below ``rms``.

    A float32 matrix product of centred pixels, chunk by chunk, gives a superset; the few pairs of it are then measured
    exactly in whole numbers.

    Args:
      images: uint8 [N, H, W, C].
      candidates: positions to look at.
      targets: positions to compare with.
      rms: threshold on the [-1, 1] scale, where black and white are 2 apart; 0 finds nothing.

    Returns:
      One row per candidate found, with its nearest target.
    """
    candidates, targets = np.sort(np.asarray(candidates, np.int64)), np.sort(np.asarray(targets, np.int64))
    if rms <= 0 or not len(candidates) or not len(targets):
        return no_near_duplicates()
    pixels = int(np.prod(images.shape[1:]))
    limit = (rms * 127.5) ** 2 * pixels  # of the sum of squared differences in grey levels
    rows = max(1, _CHUNK_BYTES // (4 * pixels))
    c_rows, t_rows = (min(rows, most) for most in _CHUNK_ROWS)
    best = np.full(len(candidates), np.iinfo(np.int64).max)
    nearest = np.zeros(len(candidates), np.int64)
    for t0 in range(0, len(targets), t_rows):
        t_chunk = targets[t0 : t0 + t_rows]
        # Whole numbers stay whole: for up to about a thousand pixels the product below is exact.
        centre = np.round(images[t_chunk].reshape(len(t_chunk), -1).mean(axis=0)).astype(np.float32)
        y, yy = _centred(images, t_chunk, centre)
        for c0 in range(0, len(candidates), c_rows):
            c_chunk = candidates[c0 : c0 + c_rows]
            x, xx = _centred(images, c_chunk, centre)
            scale = xx[:, None] + yy[None, :]
            # The rounding of a float32 product is far below 1e-4 of the sum of the two squared norms.
            close = scale - 2.0 * (x @ y.T) <= limit + 1e-4 * scale
            for j in np.flatnonzero(close.any(axis=0)):
                hits = np.flatnonzero(close[:, j])
                square = _squared_distances(images, c_chunk[hits], t_chunk[j])
                better = (square < limit) & (square < best[c0 + hits])
                best[c0 + hits[better]], nearest[c0 + hits[better]] = square[better], t_chunk[j]
    hit = best < np.iinfo(np.int64).max
    distance = np.sqrt(best[hit].astype(np.float64) / pixels) / 127.5
    return NearDuplicates(candidates[hit], nearest[hit], distance)


def _centred(images: np.ndarray, index: np.ndarray, centre: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [n, pixels] minus the centre [pixels], and the squared norms, summed in float64 [n]."""
    x = images[index].reshape(len(index), -1).astype(np.float32) - centre
    return x, np.einsum("np,np->n", x, x, dtype=np.float64)


def _squared_distances(images: np.ndarray, index: np.ndarray, target: int) -> np.ndarray:
    """int64 [n], exact, in grey levels; one image at a time so that large hit lists need no memory."""
    y = images[target].astype(np.int32)
    return np.array([np.sum((images[i] - y) ** 2, dtype=np.int64) for i in index], np.int64)
