"""Tests: whether two groups differ, whether they are equal within a margin, and several answers at once.

A large p-value is no proof of equality. Equality is claimed only by :func:`tost` (two one-sided tests), which needs a
margin that was fixed before.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jaxunlearn.metrics.statistics import Interval, bootstrap_interval
from jaxunlearn.registry import unknown_name

LEAST_BOOTSTRAP = 20
"""Subjects from which on a bootstrap over them is trusted; below, use Student's t or :func:`sign_flip_test`."""
MOST_SIGNS = 22
MOST_DIVISIONS = 200_000
ALTERNATIVES = ("two-sided", "less", "greater")


class Equivalence(NamedTuple):
    """The answer of two one-sided tests.

    Attributes:
      p: the larger of the two p-values: small means equal within the margin.
      difference: the estimate.
      interval: of the difference, with confidence ``1 - 2 alpha``: inside the margin exactly if ``p < alpha``.
      margin: positive.
      equivalent: ``p < alpha``.
    """

    p: float
    difference: float
    interval: Interval
    margin: float
    equivalent: bool


def holm(p) -> np.ndarray:
    """Adjusted p-values [n] of a family of tests (Holm 1979): below a level where Holm's procedure rejects at that level.

    >>> holm([0.01, 0.04, 0.03]).round(3).tolist()
    [0.03, 0.06, 0.06]

    Raises:
      ValueError: not one vector of numbers in [0, 1], or none.
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or not len(p) or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p-values must be a vector of numbers in [0, 1] that is not empty, got {p.tolist()}")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate((len(p) - np.arange(len(p))) * p[order])
    out = np.empty(len(p))
    out[order] = np.minimum(stepped, 1.0)
    return out


def tost(values, target: float, margin: float, alpha: float = 0.05) -> Equivalence:
    """Whether the mean of ``values`` [n] lies within ``target +- margin``: two one-sided t tests (Schuirmann 1987).

    For paired differences give them with target 0.

    Raises:
      ValueError: fewer than two values, a margin that is not positive, alpha outside (0, 0.5), values not finite.
    """
    values = _vector(values, "values", 2)
    spread = values.std(ddof=1) / math.sqrt(len(values))
    return _equivalence(float(values.mean() - target), spread, len(values) - 1, margin, alpha)


def tost_two(first, second, margin: float, alpha: float = 0.05) -> Equivalence:
    """Whether the means of two independent groups [n], [m] differ by less than the margin, variances unequal (Welch).

    Raises:
      ValueError: as :func:`tost`.
    """
    first, second = _vector(first, "first", 2), _vector(second, "second", 2)
    parts = [values.var(ddof=1) / len(values) for values in (first, second)]
    freedom = 1.0
    if sum(parts) > 0:
        freedom = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, (first, second)))
    return _equivalence(float(first.mean() - second.mean()), math.sqrt(sum(parts)), freedom, margin, alpha)


def _equivalence(difference: float, spread: float, freedom: float, margin: float, alpha: float) -> Equivalence:
    from scipy import stats

    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"the margin of an equivalence test must be positive and finite, got {margin}")
    if not 0.0 < alpha < 0.5:
        raise ValueError(f"alpha must lie strictly between 0 and 0.5, got {alpha}")
    half = spread * float(stats.t.ppf(1 - alpha, freedom))
    interval = Interval(difference - half, difference + half, 1 - 2 * alpha, "Student t, two one-sided tests")
    if spread == 0:
        p = 0.0 if abs(difference) < margin else 1.0
    else:
        p = float(stats.t.sf((margin - abs(difference)) / spread, freedom))
    return Equivalence(p, difference, interval, margin, p < alpha)


def welch(first, second, alternative: str = "two-sided") -> float:
    """p-value of Welch's t test: means of two independent groups [n], [m] with unequal variances.

    ``alternative`` "less": the first mean is smaller. Two constant groups have no t value: p is 1 if they are equal or
    differ in the other direction, else 0.

    Raises:
      ValueError: fewer than two values in a group, values that are not finite, an unknown alternative.
    """
    from scipy import stats

    _known(alternative)
    first, second = _vector(first, "first", 2), _vector(second, "second", 2)
    if np.ptp(first) == 0 and np.ptp(second) == 0:
        gap = first[0] - second[0]
        return 0.0 if {"two-sided": gap != 0, "less": gap < 0, "greater": gap > 0}[alternative] else 1.0
    return float(stats.ttest_ind(first, second, equal_var=False, alternative=alternative).pvalue)


def sign_flip_test(differences, alternative: str = "two-sided") -> float:
    """Exact p-value of paired differences [n]: under no effect each might as well have had the other sign.

    All 2^n sign patterns are counted, for n up to 22. The smallest possible value is ``2^-n``, twice that two-sided.

    >>> sign_flip_test([1.0, 2.0, 3.0], "greater")
    0.125

    Raises:
      ValueError: no differences, more than 22, values that are not finite, an unknown alternative.
    """
    _known(alternative)
    differences = _vector(differences, "differences", 1)
    if len(differences) > MOST_SIGNS:
        raise ValueError(
            f"{len(differences)} differences have too many sign patterns; allowed: {MOST_SIGNS}; bootstrap"
        )
    sums = np.zeros(1)
    for value in differences:
        sums = np.concatenate([sums + value, sums - value])
    return _share(sums, float(differences.sum()), alternative)


def permutation_test(first, second, alternative: str = "two-sided") -> float:
    """Exact p-value of the difference of means of two small independent groups: every division into two is counted.

    >>> permutation_test([1.0, 2.0], [3.0, 4.0, 5.0], "less")
    0.1

    Raises:
      ValueError: an empty group, more than 200,000 divisions, values that are not finite, an unknown alternative.
    """
    import itertools

    _known(alternative)
    first, second = _vector(first, "first", 1), _vector(second, "second", 1)
    together, n = np.concatenate([first, second]), len(first)
    divisions = math.comb(len(together), n)
    if divisions > MOST_DIVISIONS:
        raise ValueError(
            f"groups of {n} and {len(second)} have {divisions} divisions; allowed: {MOST_DIVISIONS}; use welch"
        )
    chosen = np.array(list(itertools.combinations(range(len(together)), n)))
    sums = together[chosen].sum(axis=1)
    return _share(sums / n - (together.sum() - sums) / len(second), float(first.mean() - second.mean()), alternative)


def paired_interval(
    before, after, confidence: float = 0.95, *, resamples: int = 1000, seed: int = 0
) -> Interval | None:
    """Bootstrap interval, over subjects [n], of the mean of ``after - before``; None below 20 subjects.

    Raises:
      ValueError: vectors of different length, values that are not finite, a confidence outside (0, 1).
    """
    before, after = _vector(before, "before", 1), _vector(after, "after", 1)
    if len(before) != len(after):
        raise ValueError(f"paired values need equal numbers, got {len(before)} before and {len(after)} after")
    if len(before) < LEAST_BOOTSTRAP:
        return None
    return bootstrap_interval(after - before, confidence, statistic=np.mean, resamples=resamples, seed=seed)


def _share(values: np.ndarray, observed: float, alternative: str) -> float:
    """Share of ``values`` that are as extreme as the observed one, rounding forgiven."""
    tiny = 1e-9 * max(float(np.max(np.abs(values))), 1e-300)
    if alternative == "two-sided":
        values, observed = np.abs(values), abs(observed)
    return float(np.mean(values <= observed + tiny if alternative == "less" else values >= observed - tiny))


def _vector(values, name: str, least: int) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) < least:
        raise ValueError(f"{name}: shape {values.shape}; allowed: a vector of at least {least}")
    if not np.all(np.isfinite(values)):
        raise ValueError(f"{name}: holds NaN or infinity")
    return values


def _known(alternative: str) -> None:
    if alternative not in ALTERNATIVES:
        raise ValueError(unknown_name("alternative", alternative, ALTERNATIVES))
