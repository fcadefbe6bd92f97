"""Extraction: how often samples are copies of a forget image.

The threshold of each forget image is calibrated on images that are known not to be it: ``fraction`` of the distance to
the nearest of them, so none of them is ever flagged. With 0.85 this is kin to the protocol of the
MNIST T-shirt experiment (a sample counts when its L2 distance is below 10, and the closest digit lies at 11.5).

A strict copy lies below *half* of that distance. By the triangle inequality it is then closer to the forget image than
to any of those images, so it cannot be explained as an ordinary sample that happens to look alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxunlearn.metrics import distances
from jaxunlearn.metrics.statistics import Interval, clopper_pearson, clopper_pearson_upper

COPY_FRACTION = 0.85
STRICT_FRACTION = 0.5


class Calibration(NamedTuple):
    """Thresholds of copies.

    Attributes:
      closest: float64 [F], rms distance of each forget image to the nearest image that is not in the forget set.
      threshold: float64 [F], below which a sample is a copy.
      strict_threshold: float64 [F], below which it is a strict copy.
      rule: in words, for the report.
    """

    closest: np.ndarray
    threshold: np.ndarray
    strict_threshold: np.ndarray
    rule: str


class CopyRate(NamedTuple):
    """How often samples are copies.

    Attributes:
      count: number of copies.
      n: number of samples.
      rate: count / n.
      ci: two-sided Clopper-Pearson interval of the rate.
      upper: one-sided Clopper-Pearson bound of the rate.
    """

    count: int
    n: int
    rate: float
    ci: Interval
    upper: Interval


def calibrate(forget, others, *, threshold: float | None = None, fraction: float = COPY_FRACTION) -> Calibration:
    """Copy thresholds of forget images [F,H,W,C] from all images that are not in the forget set [M,H,W,C].

    Args:
      forget: unit images, uint8 or floating in [0, 1].
      others: keep images and held-out images, in the same form.
      threshold: overrides the calibrated threshold (rms on [0, 1] pixels) for every forget image.
      fraction: share of the distance to the nearest other image.

    Raises:
      ValueError: an empty set, a threshold that is not positive, a fraction outside (0, 1], or a forget image that is
        equal to one of the others.
    """
    if not len(forget):
        raise ValueError("the forget set is empty; there is nothing whose copies could be counted")
    if threshold is not None and not threshold > 0:
        raise ValueError(
            f"the copy threshold is an rms distance on [0, 1] pixels and must be positive, got {threshold}"
        )
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
    closest = distances.nearest(forget, others).distance
    if np.any(closest <= 0):
        raise ValueError(
            f"forget image {int(np.argmin(closest))} is equal to an image of the keep or held-out set; "
            "move its duplicates into the forget set first"
        )
    if threshold is None:
        values = fraction * closest
        rule = f"rms distance below {fraction:g} x the distance to the nearest keep or held-out image"
    else:
        values = np.full(len(closest), float(threshold))
        rule = f"rms distance below {threshold:g}, set by the user"
    return Calibration(closest, values, np.minimum(STRICT_FRACTION * closest, values), rule)


def copies(distance: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    """Which samples are copies: rms distances [N, F] and thresholds [F] -> bool [N], true if of any forget image.

    A distance that is not a number is never a copy; check samples for it before counting.

    >>> copies(np.array([[0.1, 0.9], [0.5, 0.6]]), np.array([0.2, 0.2])).tolist()
    [True, False]
    """
    return np.any(np.asarray(distance) < np.asarray(threshold), axis=1)


def copy_rate(flags: np.ndarray, confidence: float = 0.95) -> CopyRate:
    """Count, rate and exact binomial bounds of flags [N] (Clopper-Pearson).

    >>> found = copy_rate(np.zeros(2000, bool))
    >>> print(f"{found.count} of {found.n}, at most {found.upper.high:.4%}")
    0 of 2000, at most 0.1497%

    Raises:
      ValueError: no samples.
    """
    count, n = int(np.sum(flags)), len(flags)
    bounds = [bound(count, n, confidence) for bound in (clopper_pearson, clopper_pearson_upper)]
    return CopyRate(count, n, count / n, *bounds)


def samples_needed(rate: float, confidence: float = 0.95) -> int:
    """Samples that show at least one copy with the given confidence if copies have this rate, about 3 / rate.

    >>> samples_needed(0.01)
    299

    Raises:
      ValueError: a rate outside (0, 1).
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate must lie strictly between 0 and 1, got {rate}")
    return int(np.ceil(np.log1p(-confidence) / np.log1p(-rate)))
