"""Frechet distance between two sets of features, and pixel features for when there is no network.

The distance of the two Gaussians with the features' moments. It is called FID only with the Inception network of that
metric; here it always carries the name of its features (``fd_classifier``, ``fd_pixel``). It is biased upward in 1/n:
compare only values with equal n.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxunlearn.metrics.distances import rows


class Moments(NamedTuple):
    """Number, mean and covariance of features, in float64.

    Attributes:
      n: number of rows.
      mean: [d].
      covariance: [d, d], with n - 1.
    """

    n: int
    mean: np.ndarray
    covariance: np.ndarray


class MomentSum:
    """Moments of features that arrive in batches: order and batch size do not matter.

    >>> total = MomentSum(2)
    >>> total.add(np.array([[0.0, 0.0], [2.0, 0.0]]))
    >>> total.moments().mean.tolist()
    [1.0, 0.0]
    """

    def __init__(self, features: int):
        """Args:
        features: d, length of a feature.
        """
        self._n = 0
        self._sum = np.zeros(features)
        self._squares = np.zeros((features, features))
        self._shift = None

    def add(self, batch) -> None:
        """Adds rows [B, d].

        Raises:
          ValueError: another length, or a value that is not finite.
        """
        batch = np.asarray(batch, np.float64)
        if batch.ndim != 2 or batch.shape[1] != len(self._sum):
            raise ValueError(f"features must be [B, {len(self._sum)}], got shape {batch.shape}")
        if not np.all(np.isfinite(batch)):
            raise ValueError("features hold NaN or infinity")
        if not len(batch):
            return
        if self._shift is None:
            self._shift = batch.mean(axis=0)  # keeps the squares small: no cancellation for features far from zero
        centred = batch - self._shift
        self._n += len(batch)
        self._sum += centred.sum(axis=0)
        self._squares += centred.T @ centred

    def add_sums(self, n: int, mean, scatter) -> None:
        """Adds a batch of which only sums are known, for example because it lies on several devices.

        Args:
          n: number of rows; 0 adds nothing.
          mean: [d], their mean.
          scatter: [d, d], ``sum (x - mean) (x - mean)'``.

        Raises:
          ValueError: another length, or a value that is not finite.
        """
        if n == 0:
            return
        mean, scatter = np.asarray(mean, np.float64), np.asarray(scatter, np.float64)
        if mean.shape != self._sum.shape or scatter.shape != self._squares.shape:
            raise ValueError(f"features must have length {len(self._sum)}, got mean {mean.shape} and {scatter.shape}")
        if not (np.all(np.isfinite(mean)) and np.all(np.isfinite(scatter))):
            raise ValueError("features hold NaN or infinity")
        if self._shift is None:
            self._shift = mean
        apart = mean - self._shift
        self._n += int(n)
        self._sum += n * apart
        self._squares += scatter + n * np.outer(apart, apart)

    def moments(self) -> Moments:
        """The moments so far.

        Raises:
          ValueError: fewer than two rows.
        """
        if self._n < 2:
            raise ValueError(f"a covariance needs at least two feature rows, got {self._n}")
        mean = self._sum / self._n
        covariance = (self._squares - self._n * np.outer(mean, mean)) / (self._n - 1)
        return Moments(self._n, mean + self._shift, covariance)


def moments(features, batch_size: int = 4096) -> Moments:
    """Moments of features [n, d].

    Raises:
      ValueError: fewer than two rows, or values that are not finite.
    """
    features = np.asarray(features)
    if features.ndim != 2:
        raise ValueError(f"features must be [n, d], got shape {features.shape}")
    total = MomentSum(features.shape[1])
    for start in range(0, len(features), batch_size):
        total.add(features[start : start + batch_size])
    return total.moments()


def frechet_distance(first: Moments, second: Moments) -> float:
    """``|m1 - m2|^2 + tr S1 + tr S2 - 2 tr (R S2 R)^(1/2)`` with ``R = S1^(1/2)``, by symmetric eigenvalues only.

    >>> unit = Moments(9, np.zeros(2), np.eye(2))
    >>> print(f"{frechet_distance(unit, Moments(9, np.ones(2), 4 * np.eye(2))):.6f}")
    4.000000

    Raises:
      ValueError: moments of different length.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"features of length {len(first.mean)} and {len(second.mean)} cannot be compared")
    values, vectors = np.linalg.eigh(first.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ second.covariance @ root
    cross = np.sum(np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)))
    shift = np.sum((first.mean - second.mean) ** 2)
    return float(shift + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross)


def frechet_distance_rows(reference: Moments, features) -> float:
    """Frechet distance of features [m, d] and given moments, exact and quick where m <= d.

    With B the centred rows over ``sqrt(m - 1)`` the covariance is ``B'B``, and the last term is ``tr (B S1 B')^(1/2)``,
    of size m instead of d: no covariance of rank below d is ever decomposed.

    Args:
      reference: moments of the other set.
      features: features [m, d].

    Raises:
      ValueError: features of different length, fewer than two rows, values that are not finite.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) > features.shape[1]:
        return frechet_distance(reference, moments(features))
    if features.shape[1:] != reference.mean.shape:
        raise ValueError(f"features of length {len(reference.mean)} and {features.shape[1]} cannot be compared")
    if len(features) < 2 or not np.all(np.isfinite(features)):
        raise ValueError(f"a covariance needs at least two finite feature rows, got shape {features.shape}")
    mean = features.mean(axis=0)
    factor = (features - mean) / np.sqrt(len(features) - 1)
    product = factor @ reference.covariance @ factor.T
    cross = np.sum(np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)))
    shift = np.sum((reference.mean - mean) ** 2)
    return float(shift + np.trace(reference.covariance) + np.sum(factor**2) - 2 * cross)


def nuclear_distance(first, second) -> float:
    """Frechet distance of features [n, d] and [m, d] from the rows alone: the last term is the nuclear norm of ``A B'``.

    A and B are the centred rows over ``sqrt(n - 1)`` and ``sqrt(m - 1)``. Exact for any n and m; meant for n, m <= d.

    Raises:
      ValueError: features of different length, fewer than two rows, values that are not finite.
    """
    parts = [np.asarray(x, np.float64) for x in (first, second)]
    if any(x.ndim != 2 or len(x) < 2 or not np.all(np.isfinite(x)) for x in parts):
        raise ValueError(f"features must be finite [n, d] with n >= 2, got shapes {[x.shape for x in parts]}")
    if parts[0].shape[1] != parts[1].shape[1]:
        raise ValueError(f"features of length {parts[0].shape[1]} and {parts[1].shape[1]} cannot be compared")
    means = [x.mean(axis=0) for x in parts]
    a, b = ((x - mean) / np.sqrt(len(x) - 1) for x, mean in zip(parts, means))
    nuclear = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(np.sum((means[0] - means[1]) ** 2) + np.sum(a**2) + np.sum(b**2) - 2 * nuclear)


class PixelBasis(NamedTuple):
    """Principal components of images, the features of ``fd_pixel``.

    Attributes:
      mean: [D].
      basis: [D, k], orthonormal columns.
    """

    mean: np.ndarray
    basis: np.ndarray

    def __call__(self, images) -> np.ndarray:
        """Unit images [N,H,W,C], uint8 or in [0, 1] -> features float64 [N, k]."""
        return np.concatenate([(rows(part) - self.mean) @ self.basis for part in np.split(images, _cuts(images))])


def pixel_basis(images, components: int = 64, max_images: int = 2000, seed: int = 0) -> PixelBasis:
    """The leading principal components of at most ``max_images`` unit images [N,H,W,C], drawn from the seed.

    Raises:
      ValueError: fewer than two images.
    """
    if len(images) < 2:
        raise ValueError(f"principal components need at least two images, got {len(images)}")
    chosen = np.arange(len(images))
    if len(chosen) > max_images:
        chosen = np.sort(np.random.default_rng(seed).choice(len(images), max_images, replace=False))
    data = rows(np.asarray(images)[chosen]).astype(np.float64)
    mean = data.mean(axis=0)
    _, _, right = np.linalg.svd(data - mean, full_matrices=False)
    return PixelBasis(mean, right[:components].T)


def _cuts(images, size: int = 4096) -> list[int]:
    return list(range(size, len(images), size))
