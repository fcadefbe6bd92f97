"""How well a score tells members from others. Everywhere a *low* score is member-like, as a loss is.

Both sets must be drawn from the same distribution; else a score measures their difference, not membership.
"""

from __future__ import annotations

import numpy as np

from jaxunlearn.metrics.statistics import Interval

LEAST_FALSE_POSITIVES = 10
"""A false positive rate is read off only where that many non-members lie below it."""


def auc(members, others) -> float:
    """Chance that a member scores lower than another image, a tie counting half: 1 told apart, 0.5 not at all.

    By ranks (Mann-Whitney), so no thresholds are chosen.

    >>> auc([1.0, 2.0], [2.0, 3.0])
    0.875

    Raises:
      ValueError: an empty set, or scores that are not finite.
    """
    return float(_auc(*_checked(members, others), axis=-1))


def auc_interval(members, others, confidence: float = 0.95, *, resamples: int = 1000, seed: int = 0) -> Interval | None:
    """Percentile bootstrap interval of :func:`auc`, members and others drawn apart.

    None for fewer than two scores in a set, and where every draw gives the same value (perfectly separated sets: the
    bootstrap knows no spread there, and an interval of width 0 would claim too much).

    Raises:
      ValueError: as :func:`auc`, or a confidence outside (0, 1).
    """
    members, others = _checked(members, others)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    if min(len(members), len(others)) < 2:
        return None
    rng = np.random.default_rng(seed)
    draws = np.empty(resamples)
    rows = max(1, 2**21 // (len(members) + len(others)))  # draws that are ranked at once
    for start in range(0, resamples, rows):
        some = len(draws[start : start + rows])
        pair = (values[rng.integers(0, len(values), (some, len(values)))] for values in (members, others))
        draws[start : start + rows] = _auc(*pair, axis=-1)
    low, high = np.quantile(draws, [0.5 - confidence / 2, 0.5 + confidence / 2])
    if low == high:
        return None
    return Interval(float(low), float(high), confidence, "percentile bootstrap, members and others apart")


def p_value(members, others) -> float:
    """One-sided p-value that members score lower than others (Mann-Whitney; exact below 8 scores without ties).

    With one member it is ``(1 + #{other <= score}) / (1 + n)``, the rank among the others.

    >>> p_value([0.5], [1.0, 2.0, 3.0])
    0.25

    Raises:
      ValueError: as :func:`auc`.
    """
    from scipy.stats import mannwhitneyu

    members, others = _checked(members, others)
    if len(members) == 1:
        return float((1 + np.sum(others <= members[0])) / (1 + len(others)))
    if np.ptp(np.concatenate([members, others])) == 0:
        return 1.0
    return float(mannwhitneyu(members, others, alternative="less").pvalue)


def balanced_accuracy(members, others) -> float:
    """The best mean of true positive and true negative rate over all thresholds, in [0.5, 1].

    The threshold is chosen on the same scores, so small sets give more than 0.5 by chance.

    >>> balanced_accuracy([1.0, 2.0], [2.0, 3.0])
    0.75

    Raises:
      ValueError: as :func:`auc`.
    """
    members, others = _checked(members, others)
    edges = np.unique(np.concatenate([members, others]))
    found = np.searchsorted(np.sort(members), edges, side="right") / len(members)
    wrong = np.searchsorted(np.sort(others), edges, side="right") / len(others)
    return float(max(0.5, np.max((found + 1.0 - wrong) / 2.0)))


def tpr_at_fpr(members, others, rate: float = 0.01) -> float:
    """Share of members that score below the threshold under which at most the share ``rate`` of the others lies.

    >>> tpr_at_fpr([0.5, 7.5, 999.5], range(1000), 0.01)
    0.6666666666666666

    Raises:
      ValueError: as :func:`auc`; a rate outside (0, 1); or fewer than ``10 / rate`` others, which cannot show it.
    """
    members, others = _checked(members, others)
    if not 0.0 < rate < 1.0:
        raise ValueError(f"a false positive rate lies strictly between 0 and 1, got {rate}")
    if len(others) < needed_others(rate):
        raise ValueError(
            f"{len(others)} non-members cannot show a false positive rate of {rate:g}; it needs {needed_others(rate)}"
        )
    threshold = np.sort(others)[int(np.floor(rate * len(others) + 1e-9))]
    return float(np.mean(members < threshold))


def needed_others(rate: float) -> int:
    """How many non-members :func:`tpr_at_fpr` asks for: 1,000 for 1 %.

    >>> needed_others(0.01), needed_others(0.001)
    (1000, 10000)
    """
    return int(np.ceil(LEAST_FALSE_POSITIVES / rate - 1e-9))


def _auc(members: np.ndarray, others: np.ndarray, axis: int) -> np.ndarray:
    from scipy.stats import rankdata

    n, m = members.shape[-1], others.shape[-1]
    ranks = rankdata(np.concatenate([members, others], axis=axis), axis=axis)
    pairs_above = ranks[..., n:].sum(axis=axis) - m * (m + 1) / 2.0  # pairs in which the other image scores higher
    return pairs_above / (n * m)


def _checked(members, others) -> tuple[np.ndarray, np.ndarray]:
    members, others = np.asarray(members, np.float64), np.asarray(others, np.float64)
    if members.ndim != 1 or others.ndim != 1 or not len(members) or not len(others):
        raise ValueError(
            f"scores must be two vectors that are not empty, got shapes {members.shape} and {others.shape}"
        )
    if not (np.all(np.isfinite(members)) and np.all(np.isfinite(others))):
        raise ValueError("scores hold NaN or infinity")
    return members, others
