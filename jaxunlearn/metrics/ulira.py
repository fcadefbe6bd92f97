"""The shadow attack on unlearning: is a model that unlearned z told from one that never saw it, example by example?

Many small models are trained with a random half of the candidates each. World u: models that saw z and unlearned it.
World r: models that never saw z. The attacker knows how the loss on z is distributed in both worlds (from the other
models) and judges one model by the likelihood ratio. This is the strongest test here and the dearest: 64 models or more.
After U-LiRA (Hayes et al. 2024, arXiv 2403.01218); the pooling and the leave-one-out fits are this library's.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jaxunlearn.metrics.roc import auc, needed_others, tpr_at_fpr
from jaxunlearn.metrics.statistics import Interval

LEAST_MODELS = 32
"""Models of each world that the attack asks for."""


class ShadowAttack(NamedTuple):
    """How well the worlds are told apart.

    Attributes:
      auc: 0.5 if unlearned models cannot be told from models that never saw the example.
      ci: bootstrap interval over examples, or None for fewer than two.
      tpr: false positive rate -> true positive rate; only rates that the number of pairs can show.
      unlearned: float64 [Z, U], log likelihood ratios of models of world u.
      retrained: float64 [Z, R], those of world r.
    """

    auc: float
    ci: Interval | None
    tpr: dict[float, float]
    unlearned: np.ndarray
    retrained: np.ndarray


def ulira(
    unlearned,
    retrained,
    *,
    rates: tuple[float, ...] = (0.01, 0.001),
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    least_models: int = LEAST_MODELS,
) -> ShadowAttack:
    """The attack on stored losses.

    ``LR = log N(s; mu_u, sd_u) - log N(s; mu_r, sd_r)``, with Gaussians fitted for each example without the model under
    attack; pairs (example, model) of all examples are pooled.

    Args:
      unlearned: log losses [Z, U] of Z examples under U models that saw the example and unlearned it.
      retrained: log losses [Z, R] under R models that never saw it. The models of different examples may differ.
      rates: false positive rates to report.
      confidence: of the interval.
      resamples: bootstrap draws over examples.
      seed: of these.
      least_models: refuses fewer models of a world; lower it for experiments only, never below 3.

    Raises:
      ValueError: shapes that do not fit, too few models, values that are not finite, or losses of an example that do
        not differ between models (no Gaussian fits them).
    """
    u, r = np.asarray(unlearned, np.float64), np.asarray(retrained, np.float64)
    if u.ndim != 2 or r.ndim != 2 or len(u) != len(r) or not len(u):
        raise ValueError(f"log losses must be [Z, U] and [Z, R] of the same examples, got {u.shape} and {r.shape}")
    least = max(3, least_models)
    if min(u.shape[1], r.shape[1]) < least:
        raise ValueError(f"{u.shape[1]} unlearned and {r.shape[1]} retrained models; the attack needs {least} of each")
    if not (np.all(np.isfinite(u)) and np.all(np.isfinite(r))):
        raise ValueError("log losses hold NaN or infinity")
    ratio_u = _log_normal(u, *_without_self(u)) - _log_normal(u, *_moments(r))
    ratio_r = _log_normal(r, *_moments(u)) - _log_normal(r, *_without_self(r))
    if not (np.all(np.isfinite(ratio_u)) and np.all(np.isfinite(ratio_r))):
        raise ValueError("the losses of an example are equal in all models of a world: no distribution can be fitted")
    # roc counts low scores as members; here a high ratio speaks for world u.
    pooled_u, pooled_r = -ratio_u.ravel(), -ratio_r.ravel()
    tpr = {rate: tpr_at_fpr(pooled_u, pooled_r, rate) for rate in rates if len(pooled_r) >= needed_others(rate)}
    interval = None
    if len(u) > 1:
        rng = np.random.default_rng(seed)
        drawn = [rng.integers(0, len(u), len(u)) for _ in range(resamples)]
        values = [auc(-ratio_u[rows].ravel(), -ratio_r[rows].ravel()) for rows in drawn]
        low, high = np.quantile(values, [0.5 - confidence / 2, 0.5 + confidence / 2])
        interval = Interval(float(low), float(high), confidence, "percentile bootstrap over examples")
    return ShadowAttack(auc(pooled_u, pooled_r), interval, tpr, ratio_u, ratio_r)


def _moments(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance [Z, 1] over models."""
    return s.mean(axis=1, keepdims=True), s.var(axis=1, ddof=1, keepdims=True)


def _without_self(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance [Z, M] over all models but the one in question, by the formulas for taking one value out."""
    n = s.shape[1]
    mean, variance = _moments(s)
    off = s - mean
    return mean - off / (n - 1), ((n - 1) * variance - off**2 * n / (n - 1)) / (n - 2)


def _log_normal(s: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return -0.5 * ((s - mean) ** 2 / variance + np.log(variance))
