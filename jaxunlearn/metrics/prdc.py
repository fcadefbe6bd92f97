"""Precision, recall, density and coverage of generated features, from nearest neighbours.

A point's ball reaches to its k-th neighbour within its own set. Precision: share of generated points inside a ball of a
real one; recall: the other way round (Kynkaanniemi et al. 2019, Eq. 1). Density: how many real balls a generated point
lies in, divided by k; coverage: share of real balls that hold a generated point (Naeem et al. 2020, Eq. 4 and 5).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Manifolds(NamedTuple):
    """Shares of points in each other's balls.

    Attributes:
      precision: in [0, 1].
      recall: in [0, 1].
      density: at least 0; may exceed 1.
      coverage: in [0, 1].
      k: neighbour of precision and recall, where the ball is closed (distance <= radius).
      k_density: neighbour of density and coverage, where the ball is open (distance < radius).
      real: number of real points.
      generated: number of generated points.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    k: int
    k_density: int
    real: int
    generated: int


def prdc(real, generated, *, k: int = 3, k_density: int = 5, chunk: int = 1024) -> Manifolds:
    """Precision, recall, density and coverage.

    Distances are computed pair by pair, not through scalar products: a generated copy of a real point must have exactly
    the distances of that point, or ties at the edge of a ball would be decided by rounding. 10,000 points each of length
    2,048 take some minutes.

    Args:
      real: features [n, d].
      generated: features [m, d].
      k: the neighbour that gives the radius of precision and recall; a point is not its own neighbour.
      k_density: the same for density and coverage.
      chunk: rows whose distances are in memory at once.

    Raises:
      ValueError: another rank or length of features, values that are not finite, or not more than k points in a set.
    """
    real, generated = np.asarray(real, np.float64), np.asarray(generated, np.float64)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features must be [n, d] and [m, d] of one length d, got shapes {real.shape} and {generated.shape}"
        )
    if min(k, k_density) < 1 or len(real) <= max(k, k_density) or len(generated) <= k:
        raise ValueError(
            f"k = {k}, k_density = {k_density}; allowed: at least 1 and less than the number of points, which is "
            f"{len(real)} real and {len(generated)} generated"
        )
    if not (np.all(np.isfinite(real)) and np.all(np.isfinite(generated))):
        raise ValueError("features hold NaN or infinity")
    from scipy.spatial.distance import cdist

    real_radius = _radii(real, (k, k_density), chunk)
    generated_radius = _radii(generated, (k,), chunk)[0]
    in_real = np.zeros(len(generated), bool)
    in_generated = np.empty(len(real), bool)
    covered = np.empty(len(real), bool)
    hits = 0
    for start in range(0, len(real), chunk):
        rows = slice(start, start + chunk)
        distance = cdist(real[rows], generated)
        in_real |= np.any(distance <= real_radius[0, rows, None], axis=0)
        in_generated[rows] = np.any(distance <= generated_radius, axis=1)
        inside = distance < real_radius[1, rows, None]
        hits += int(inside.sum())
        covered[rows] = inside.any(axis=1)
    return Manifolds(
        precision=float(in_real.mean()),
        recall=float(in_generated.mean()),
        density=hits / (k_density * len(generated)),
        coverage=float(covered.mean()),
        k=k,
        k_density=k_density,
        real=len(real),
        generated=len(generated),
    )


def _radii(points: np.ndarray, ks: tuple[int, ...], chunk: int) -> np.ndarray:
    """Distance of each point to its k-th neighbour, itself left out: [len(ks), n]."""
    from scipy.spatial.distance import cdist

    out = np.empty((len(ks), len(points)))
    for start in range(0, len(points), chunk):
        distance = cdist(points[start : start + chunk], points)
        own = np.arange(len(distance))
        distance[own, start + own] = np.inf  # by position, because a duplicate is at distance 0 as well
        ordered = np.partition(distance, [k - 1 for k in ks], axis=1)
        out[:, start : start + chunk] = ordered[:, [k - 1 for k in ks]].T
    return out
