"""Intervals: what a count or a mean of n subjects allows to say.

Every interval carries its level and its method, because "95 %" alone does not say whether it is one-sided.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A confidence interval.

    Attributes:
      low: lower end.
      high: upper end.
      level: confidence, in (0, 1).
      method: how it was computed.
    """

    low: float
    high: float
    level: float
    method: str


def clopper_pearson(count: int, n: int, confidence: float = 0.95) -> Interval:
    """Exact two-sided interval of a rate of which ``count`` of ``n`` trials are known (Clopper-Pearson).

    >>> low, high, *_ = clopper_pearson(3, 3000)
    >>> print(f"{low:.6f} {high:.6f}")
    0.000206 0.002920

    Raises:
      ValueError: not ``0 <= count <= n``, ``n < 1``, or a confidence outside (0, 1).
    """
    _check(count, n, confidence)
    tail = (1.0 - confidence) / 2.0
    low = float(stats.beta.ppf(tail, count, n - count + 1)) if count else 0.0
    high = float(stats.beta.ppf(1.0 - tail, count + 1, n - count)) if count < n else 1.0
    return Interval(low, high, confidence, "Clopper-Pearson, two-sided")


def clopper_pearson_upper(count: int, n: int, confidence: float = 0.95) -> Interval:
    """Exact one-sided upper bound of a rate: ``1 - (1 - confidence)**(1/n)``, about 3/n, where nothing was found.

    >>> print(f"{clopper_pearson_upper(0, 1000).high:.5f}")
    0.00299

    Raises:
      ValueError: as :func:`clopper_pearson`.
    """
    _check(count, n, confidence)
    high = float(stats.beta.ppf(confidence, count + 1, n - count)) if count < n else 1.0
    return Interval(0.0, high, confidence, "Clopper-Pearson, one-sided upper bound")


def mean_interval(values, confidence: float = 0.95) -> Interval | None:
    """Student's t interval of the mean of ``values`` [n] (independent subjects); None for fewer than two.

    Raises:
      ValueError: a confidence outside (0, 1).
    """
    values = np.asarray(values, np.float64)
    _check(0, 1, confidence)
    if values.size < 2:
        return None
    half = stats.t.ppf(0.5 + confidence / 2.0, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size)
    mean = values.mean()
    return Interval(float(mean - half), float(mean + half), confidence, "Student t over subjects")


def bootstrap_interval(
    values, confidence: float = 0.95, *, statistic=np.median, resamples: int = 1000, seed: int = 0
) -> Interval | None:
    """Percentile bootstrap interval of ``statistic(values, axis=-1)`` over subjects [n]; None for fewer than two.

    Raises:
      ValueError: a confidence outside (0, 1).
    """
    values = np.asarray(values, np.float64)
    _check(0, 1, confidence)
    if values.size < 2:
        return None
    rng = np.random.default_rng(seed)
    draws = np.array([statistic(values[rng.integers(0, values.size, values.size)], axis=-1) for _ in range(resamples)])
    low, high = np.quantile(draws, [0.5 - confidence / 2.0, 0.5 + confidence / 2.0])
    return Interval(float(low), float(high), confidence, "percentile bootstrap over subjects")


def rank_p(score: float, reference) -> float:
    """``(1 + #{reference <= score}) / (1 + n)``: how member-like a low score is among n held-out scores.

    It has no absolute meaning (an image unlike all others has p near 1 without ever being forgotten): compare it with
    the value of a retrained model.

    >>> rank_p(0.5, [1.0, 2.0, 3.0])
    0.25

    Raises:
      ValueError: no reference scores.
    """
    reference = np.asarray(reference, np.float64)
    if reference.size < 1:
        raise ValueError("rank_p needs at least one held-out score, got none")
    return float((1 + np.sum(reference <= score)) / (1 + reference.size))


def _check(count: int, n: int, confidence: float) -> None:
    if n < 1 or not 0 <= count <= n:
        raise ValueError(f"a rate needs 0 <= count <= n and n >= 1, got count = {count}, n = {n}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")
