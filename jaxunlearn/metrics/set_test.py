"""Whether a *set* of images was trained on: many weak scores of many images together (CDI, Dubinski et al. 2024).

One image rarely shows its membership; a person's whole set may. A logistic regression of membership scores, fitted on
the other folds, gives each image its log odds; Welch's t value compares those of the set with those of held-out images.
About 70 images are needed for a clear answer even where the effect is real.

The log odds of different folds come from regressions that share most of their data, so they are not independent and the
t distribution does not hold: with 30 against 60 images and no effect it is too bold in the tail. The p-value therefore
comes from permutations: the whole procedure, folds and regressions included, is repeated with the images in another
order. The t distribution's value stands beside it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxunlearn.metrics.significance import welch

LEAST_IMAGES = 20
RIDGE, NEWTON_STEPS = 1.0, 6
MOST_NUMBERS = 2**22  # of permuted scores that are worked on at once


class SetTest(NamedTuple):
    """The answer for a set.

    Attributes:
      p: one-sided p-value that the set scores above held-out images, by permutations: ``(1 + #{t_perm >= t}) / (1 + B)``.
      welch_p: the t distribution's p-value, as in the paper.
      t: Welch's t value.
      forget: float64 [n], log odds of the forget images, each from a regression that did not see it.
      others: float64 [m], those of the held-out images.
      folds: number of folds.
      permutations: B.
    """

    p: float
    welch_p: float
    t: float
    forget: np.ndarray
    others: np.ndarray
    folds: int
    permutations: int


def cdi(forget, others, *, folds: int = 5, permutations: int = 999, seed: int = 0) -> SetTest:
    """Tests whether membership scores of forget images differ from those of held-out images (arXiv 2411.12858).

    Args:
      forget: scores [n, K] of the set in question.
      others: scores [m, K] of held-out images of the same distribution.
      folds: number of folds.
      permutations: how often the images change places.
      seed: of the division into folds and of the permutations.

    Raises:
      ValueError: fewer than 20 images in a set, fewer than two folds, no permutation, shapes that do not fit, values
        that are not finite.
    """
    forget, others = np.asarray(forget, np.float64), np.asarray(others, np.float64)
    if forget.ndim != 2 or others.ndim != 2 or forget.shape[1] != others.shape[1] or not forget.shape[1]:
        raise ValueError(f"scores must be [n, K] and [m, K] of the same K, got {forget.shape} and {others.shape}")
    if min(len(forget), len(others)) < LEAST_IMAGES:
        raise ValueError(
            f"{len(forget)} forget and {len(others)} held-out images; the test of a set needs {LEAST_IMAGES} of each"
        )
    if not 2 <= folds <= LEAST_IMAGES or permutations < 1:
        raise ValueError(
            f"folds = {folds}, permutations = {permutations}; allowed: 2..{LEAST_IMAGES} folds, at least 1 permutation"
        )
    if not (np.all(np.isfinite(forget)) and np.all(np.isfinite(others))):
        raise ValueError("scores hold NaN or infinity")
    n, scores = len(forget), np.concatenate([forget, others])
    rng = np.random.default_rng(seed)
    fold = np.concatenate([rng.permutation(np.arange(len(part)) % folds) for part in (forget, others)])
    odds = _log_odds(scores[None], n, fold)[0]
    t = float(_welch_t(odds[None], n)[0])
    more, rows = 0, max(1, MOST_NUMBERS // scores.size)
    for start in range(0, permutations, rows):
        orders = rng.permuted(np.tile(np.arange(len(scores)), (min(rows, permutations - start), 1)), axis=1)
        more += int(np.sum(_welch_t(_log_odds(scores[orders], n, fold), n) >= t))
    p = (1 + more) / (1 + permutations)
    return SetTest(p, welch(odds[:n], odds[n:], "greater"), t, odds[:n], odds[n:], folds, permutations)


def _log_odds(scores: np.ndarray, n: int, fold: np.ndarray) -> np.ndarray:
    """Scores [B, N, K], of which the first n rows are the set -> log odds [B, N] from regressions on the other folds."""
    label = np.arange(len(fold)) < n
    out = np.empty(scores.shape[:2])
    for number in range(fold.max() + 1):
        test, train = fold == number, fold != number
        mean = scores[:, train].mean(axis=1, keepdims=True)
        spread = scores[:, train].std(axis=1, keepdims=True)
        standard = (scores - mean) / np.where(spread > 0, spread, 1.0)
        weights, offset = _logistic(standard[:, train], label[train])
        out[:, test] = np.einsum("bnk,bk->bn", standard[:, test], weights) + offset[:, None]
    return out


def _logistic(x: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logistic regressions of x [B, N, K] on one label [N], both classes weighing the same: weights [B, K], offsets [B].

    Newton's method from 0 on the loss plus ``RIDGE / 2 |weights|^2``.
    """
    batch, n, k = x.shape
    balance = n / (2.0 * np.where(label, label.sum(), (~label).sum()))
    x = np.concatenate([x, np.ones((batch, n, 1))], axis=2)
    ridge = np.diag([RIDGE] * k + [0.0])
    w = np.zeros((batch, k + 1))
    for _ in range(NEWTON_STEPS):
        chance = 0.5 * (1.0 + np.tanh(0.5 * np.einsum("bnk,bk->bn", x, w)))
        slope = np.einsum("bnk,bn->bk", x, balance * (chance - label)) + w @ ridge
        curvature = balance * np.maximum(chance * (1 - chance), 1e-6)
        hessian = (x * curvature[..., None]).transpose(0, 2, 1) @ x + ridge
        w = w - np.linalg.solve(hessian, slope[..., None])[..., 0]
    return w[:, :k], w[:, k]


def _welch_t(odds: np.ndarray, n: int) -> np.ndarray:
    """Welch's t value of the first n of [B, N] against the rest: [B]; 0 where all are equal."""
    first, second = odds[:, :n], odds[:, n:]
    spread = first.var(axis=1, ddof=1) / first.shape[1] + second.var(axis=1, ddof=1) / second.shape[1]
    gap = first.mean(axis=1) - second.mean(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, gap / np.sqrt(spread), 0.0)
