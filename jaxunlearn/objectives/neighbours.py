"""The nearest keep images of every forget image: exact, in chunks, once before training. Arrays in, positions out.

The distance is Euclidean on flattened images in the model's space: pixels in [-1, 1], or scaled latents (give the means of
the encoder, not its samples, so that the result does not depend on a draw).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

COPY_RMS = 0.02
"""Root mean square difference up to which a keep image counts as a copy of a forget image: our own choice, for pixels."""

_CHUNK_BYTES = 64 << 20  # of float32 values held at a time, for images and for tables of distances


class Neighbours(NamedTuple):
    """For F forget images and K neighbours each.

    Attributes:
      index: int64 [F,K], positions in the keep images, nearest first; at equal distance the lower position.
      rms: float64 [F,K], root mean square difference to the forget image, in the unit of the images.
    """

    index: np.ndarray
    rms: np.ndarray


def nearest(
    forget: np.ndarray,
    keep: np.ndarray,
    k: int,
    *,
    forget_cond: np.ndarray | None = None,
    keep_cond: np.ndarray | None = None,
    copy_rms: float = COPY_RMS,
) -> Neighbours:
    """The k nearest keep images of every forget image.

    A float32 matrix product screens all pairs with a safe margin; what remains is measured in float64, so the result is that
    of brute force and does not depend on chunks or on the order of the images (but for ties).

    Args:
      forget: floating [F,H,W,C] in the model's space.
      keep: floating [N,H,W,C].
      k: neighbours of each forget image, 1 to the number of candidates.
      forget_cond: [F], class labels or other numbers: only keep images of the same condition are candidates. None for
        unconditional models.
      keep_cond: [N], beside ``forget_cond``.
      copy_rms: a keep image within this distance of a forget image, whatever its condition, is a copy of it: redirecting
        the forget image to its own copy would unlearn nothing. 0 or less turns the check off.

    Returns:
      :class:`Neighbours`; the neighbours of a batch are ``keep[neighbours.index[rows]]``, [B,K,H,W,C].

    Raises:
      ValueError: arrays of other types or shapes, not finite, k out of range, or copies among the keep images.

    >>> found = nearest(np.zeros((1, 1, 1, 1)), np.array([3.0, -1.0, 1.0]).reshape(3, 1, 1, 1), k=2)
    >>> found.index.tolist(), found.rms.tolist()
    ([[1, 2]], [[1.0, 1.0]])
    """
    forget, keep = np.asarray(forget), np.asarray(keep)
    allowed = _candidates(forget, keep, k, forget_cond, keep_cond)
    size = int(np.prod(forget.shape[1:]))
    flat_forget, flat_keep = forget.reshape(len(forget), size), keep.reshape(len(keep), size)
    limit = copy_rms**2 * size if copy_rms > 0 else -1.0
    index, square, copies = [], [], []
    rows = max(1, _CHUNK_BYTES // (4 * len(keep)))
    for first in range(0, len(forget), rows):
        low, high = _bounds(flat_forget[first : first + rows], flat_keep)
        for i, (lower, upper) in enumerate(zip(low, high), start=first):
            mine = np.arange(len(keep)) if allowed is None else np.flatnonzero(allowed[i])
            enough = np.partition(upper[mine], k - 1)[k - 1]
            close = _measured(flat_forget[i], flat_keep, mine[lower[mine] <= enough])
            index.append(close[0][:k])
            square.append(close[1][:k])
            near, distance = _measured(flat_forget[i], flat_keep, np.flatnonzero(lower <= limit))
            copies += [(i, j) for j in near[distance <= limit]]
    if copies:
        found = ", ".join(f"keep {j} of forget {i}" for i, j in copies[:20]) + (", ..." if len(copies) > 20 else "")
        raise ValueError(
            f"{len(copies)} keep images are copies (rms difference up to {copy_rms}): {found}. Unlearn them too "
            '(near_duplicates="forget" in the launcher) or remove them from keep'
        )
    return Neighbours(np.stack(index), np.sqrt(np.stack(square) / size))


def _candidates(forget, keep, k, forget_cond, keep_cond) -> np.ndarray | None:
    """bool [F,N] of the pairs with one condition, None where all are; refuses what cannot be searched."""
    lines = []
    for name, images in (("forget", forget), ("keep", keep)):
        if images.ndim != 4 or not len(images) or not np.issubdtype(images.dtype, np.floating):
            lines.append(
                f"{name} images must be floating [N,H,W,C] with N >= 1, got {images.dtype} {list(images.shape)}; "
                "jaxunlearn.images.to_model makes them of uint8"
            )
        elif not np.all(np.isfinite(images)):
            lines.append(f"{name} images must be finite; remove the images that hold NaN or infinity")
    if forget.shape[1:] != keep.shape[1:]:
        lines.append(f"forget and keep images must have one shape, got {forget.shape[1:]} and {keep.shape[1:]}")
    if (forget_cond is None) != (keep_cond is None):
        lines.append("give forget_cond and keep_cond together, or neither")
    allowed = None
    if not lines and forget_cond is not None:
        forget_cond, keep_cond = np.asarray(forget_cond), np.asarray(keep_cond)
        if forget_cond.shape != forget.shape[:1] or keep_cond.shape != keep.shape[:1]:
            lines.append(f"conditions must be [F] and [N], got {forget_cond.shape} and {keep_cond.shape}")
        else:
            allowed = forget_cond[:, None] == keep_cond[None, :]
    fewest = len(keep) if allowed is None else int(allowed.sum(axis=1).min())
    if not lines and not 1 <= k <= fewest:
        lines.append(f"k must lie in 1..{fewest}, the number of keep images of the same condition, got {k}")
    if lines:
        raise ValueError("\n".join(lines))
    return allowed


def _bounds(forget: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [F,N] below and above the squared distances."""
    centre = keep[0].astype(np.float32)
    x = forget.astype(np.float32) - centre
    xx = np.einsum("np,np->n", x, x)
    low, high = (np.empty((len(x), len(keep)), np.float32) for _ in range(2))
    rows = max(1, _CHUNK_BYTES // (4 * keep.shape[1]))
    for first in range(0, len(keep), rows):
        y = keep[first : first + rows].astype(np.float32) - centre
        scale = xx[:, None] + np.einsum("np,np->n", y, y)[None, :]
        about = scale - 2.0 * (x @ y.T)
        # The rounding of float32 products is far below 1e-4 of the sum of the two squared norms.
        low[:, first : first + rows] = about - 1e-4 * scale
        high[:, first : first + rows] = about + 1e-4 * scale
    return low, high


def _measured(image: np.ndarray, keep: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions in ``at`` by exact squared distance to the image, and the distances; ties by position."""
    image = image.astype(np.float64)
    square = np.array([np.sum(np.square(keep[j].astype(np.float64) - image)) for j in at], np.float64)
    order = np.lexsort((at, square))
    return at[order].astype(np.int64), square[order]
