"""Kernel distance between two sets of features: the unbiased squared maximum mean discrepancy of a cubic kernel.

Unlike the Frechet distance it is not biased by the number of features, so it is the better one for small runs. It is
called KID only with the Inception network of that metric; with other features it carries their name.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class KernelDistance(NamedTuple):
    """A kernel distance.

    Attributes:
      mean: over subsets; may be slightly negative, because the estimate is unbiased.
      std: over subsets, with n - 1. It measures the spread of subsets, which overlap: no standard error of ``mean``.
      subsets: number of subsets.
      size: rows of a subset.
      first: rows of the first set.
      second: rows of the second set.
    """

    mean: float
    std: float
    subsets: int
    size: int
    first: int
    second: int


def mmd_squared(first, second) -> float:
    """Unbiased squared discrepancy of features [n, d] and [m, d] under ``k(x, y) = (x.y / d + 1)^3``.

    ``mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)`` (Binkowski et al. 2018,
    "Demystifying MMD GANs").

    >>> print(f"{mmd_squared([[0.0], [0.0]], [[1.0], [1.0]]):.1f}")
    7.0

    Raises:
      ValueError: as :func:`kernel_distance`.
    """
    x, y = _checked(first, second)
    within = [(np.sum(k) - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (_kernel(x, x), _kernel(y, y))]
    return float(sum(within) - 2.0 * np.mean(_kernel(x, y)))


def kernel_distance(first, second, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> KernelDistance:
    """:func:`mmd_squared` of random subsets, drawn from the seed without putting rows back.

    Args:
      first: features [n, d].
      second: features [m, d].
      subsets: how many.
      size: rows of a subset; the size of the smaller set if that is less. The result says which it was.
      seed: of the subsets.

    Raises:
      ValueError: another rank or length of features, fewer than two rows, values that are not finite, no subset.
    """
    x, y = _checked(first, second)
    if subsets < 1 or size < 2:
        raise ValueError(
            f"kernel distance: subsets {subsets}, size {size}; allowed: at least 1 subset of at least 2 rows"
        )
    size = min(size, len(x), len(y))
    rng = np.random.default_rng(seed)
    values = np.array(
        [
            mmd_squared(x[rng.choice(len(x), size, replace=False)], y[rng.choice(len(y), size, replace=False)])
            for _ in range(subsets)
        ]
    )
    spread = float(values.std(ddof=1)) if subsets > 1 else float("nan")
    return KernelDistance(float(values.mean()), spread, subsets, size, len(x), len(y))


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1.0) ** 3


def _checked(first, second) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"features must be [n, d] and [m, d] of one length d, got shapes {x.shape} and {y.shape}")
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a kernel distance needs at least two feature rows of each set, got {len(x)} and {len(y)}")
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
        raise ValueError("features hold NaN or infinity")
    return x, y
