"""How far apart two models are at given images, in nats, against how far apart two retrained models are.

With ``l = log_snr`` from its value at t = 0 (``l_hi``) to that at the last step (``l_lo``) and the same noised images for all
models::

    gap(u, r)  = (l_hi - l_lo) / 2  mean_i |eps_u(x_i, t_i) - eps_r(x_i, t_i)|^2
    elbo(u, r) = (l_hi - l_lo) / 2  mean_i (|eps_i - eps_r|^2 - |eps_i - eps_u|^2)

* ``gap_kl_samples``: x0 are samples of u. For exact scores it is the KL divergence KL(p_u || p_r) between the first noise
  level and the last; for networks that of the two ancestral samplers. It sees quality and collapse, and no single image.
* ``gap_kl_forget``: x0 are the forget images. The sensitive test of one image; a distance of scores, not a KL.
* ``elbo_gap`` at the forget images: E[log p_u - log p_r] at the first noise level for exact scores. Above 0: still
  remembered; below: over-forgotten.

The **floor** is the same between retrained models, over ordered pairs; the **ratio** is gap / floor: 1 is a reseed. This is
our own design on the identity of information and denoising error (Kingma et al. 2021, arXiv 2107.00630, section 4).

The noise levels are stratified: one draw in each of n equal parts of the range. The spread between strata is no error, so the
standard error comes from independent replicates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from jaxunlearn.metrics.statistics import Interval, mean_interval
from jaxunlearn.schedule import Schedule, per_example
from jaxunlearn.types import Array, Predict, PyTree

EpsRows = Callable[..., Array]
"""``(params, x0 [B,H,W,C], log_snr [B], eps [B,H,W,C], cond) -> eps_hat [B,H,W,C]`` at the noised x0."""

METHOD = "Student t over stratified replicates"


class Gaps(NamedTuple):
    """Distances of M models at the same images, per replicate.

    Attributes:
      gap: float64 [R,M,M], nats; symmetric, zero on the diagonal.
      error: float64 [R,M], ``(l_hi - l_lo) / 2  mean |eps - eps_m|^2``, nats up to a constant.
    """

    gap: np.ndarray
    error: np.ndarray

    def elbo(self, u: int, r: int) -> np.ndarray:
        """float64 [R], ``elbo_gap`` of model u against model r."""
        return self.error[:, r] - self.error[:, u]


class Estimate(NamedTuple):
    """A number from replicates.

    Attributes:
      value: the mean (of a ratio: the ratio of the means).
      error: its standard error.
      ci: its interval.
    """

    value: float
    error: float
    ci: Interval


def log_snr_range(schedule: Schedule) -> tuple[float, float]:
    """``(l_lo, l_hi)``: log_snr at the last step with a trace of the image, and at t = 0."""
    table = schedule.alphas_cumprod[[schedule.last_step, 0]]
    low, high = np.log(table) - np.log1p(-table)
    return float(low), float(high)


def make_eps_rows(predict: Predict, schedule: Schedule) -> EpsRows:
    """The model at noised images, to be jitted once and used for all models. It is asked at floating t.

    Args:
      predict: ``(params, x_t, t, cond) -> eps_hat``.
      schedule: its noise schedule.
    """

    def eps_rows(params, x0, log_snr, eps, cond=None):
        alpha = jnp.sqrt(jax.nn.sigmoid(log_snr)).astype(x0.dtype)
        sigma = jnp.sqrt(jax.nn.sigmoid(-log_snr)).astype(x0.dtype)
        x_t = per_example(alpha, x0) * x0 + per_example(sigma, x0) * eps
        return predict(params, x_t, schedule.time_of(log_snr), cond)

    return eps_rows


def gaps(
    eps_rows: EpsRows,
    models: Sequence[PyTree],
    x0: np.ndarray,
    schedule: Schedule,
    key: Array,
    *,
    n: int = 4096,
    replicates: int = 8,
    batch_size: int = 512,
    cond: np.ndarray | None = None,
    each: Callable[[], None] = lambda: None,
) -> Gaps:
    """All distances between ``models`` at noised ``x0``; images, noise levels and noises are the same for all of them.

    Args:
      eps_rows: from :func:`make_eps_rows`, jitted by the caller.
      models: parameters of the M models.
      x0: images [N,H,W,C] in [-1, 1] (or latents): the forget images, or samples of one model. In each replicate every image
        takes part ``n / N`` times, at noise levels all over the range.
      schedule: the noise schedule of all models.
      key: JAX key.
      n: draws per replicate, one per stratum of noise levels.
      replicates: independent repetitions, for the standard error.
      batch_size: draws per call; the last batch is filled up with repeated rows that are then dropped.
      cond: the condition of each image [N, ...], for models that have one.
      each: called after every batch.

    Raises:
      ValueError: no images or models, fewer than 2 replicates, or not one condition for each image.
    """
    x0 = np.asarray(x0)
    if not (len(x0) and len(models) and n >= 1 and replicates >= 2):
        raise ValueError(
            f"a gap needs images, models, n >= 1 and replicates >= 2; got {len(x0)} images, {len(models)} models, n = {n}, "
            f"{replicates} replicates"
        )
    if cond is not None and len(cond) != len(x0):
        raise ValueError(f"{len(cond)} conditions for {len(x0)} images; allowed: one for each image")
    low, high = log_snr_range(schedule)
    batch_size, half = min(batch_size, n), (high - low) / 2
    gap, error = np.zeros((replicates, len(models), len(models))), np.zeros((replicates, len(models)))
    for replicate in range(replicates):
        own = jax.random.fold_in(key, replicate)
        u, image = _strata(own, n, len(x0))
        log_snr = low + (high - low) * u
        for start in range(0, n, batch_size):
            take = np.minimum(np.arange(start, start + batch_size), n - 1)
            real = np.arange(start, start + batch_size) < n
            eps = _noises(own, take, x0.shape[1:], jnp.dtype(x0.dtype))
            given = () if cond is None else (cond[image[take]],)
            rows = (x0[image[take]], log_snr[take].astype(x0.dtype), eps, *given)
            square, miss = _distances(tuple(eps_rows(params, *rows) for params in models), eps, real)
            gap[replicate] += np.asarray(square, np.float64)
            error[replicate] += np.asarray(miss, np.float64)
            each()
    return Gaps(half * gap / n, half * error / n)


def _strata(key: Array, n: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions in [0, 1), one in each of n parts, and which image each one noises."""
    seed = np.asarray(jax.random.key_data(jax.random.fold_in(key, 0))).ravel()
    rng = np.random.default_rng(seed)
    return (np.arange(n) + rng.uniform(size=n)) / n, rng.permutation(n) % images


def _noises(key: Array, index: np.ndarray, shape: tuple[int, ...], dtype) -> Array:
    return _normal(jax.random.fold_in(key, 1), index, shape, dtype.name)


def _normal_rows(key, index, shape, dtype):
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, index)
    return jax.vmap(lambda k: jax.random.normal(k, shape, dtype))(keys)


_normal = jax.jit(_normal_rows, static_argnums=(2, 3))


@jax.jit
def _distances(outputs: tuple[Array, ...], eps: Array, real: Array) -> tuple[Array, Array]:
    """Sums over the real rows of the squared distances between outputs [M,M], and to the noise [M]."""
    rows = jnp.stack([output.reshape(len(output), -1) for output in outputs])
    weight = real.astype(rows.dtype)[:, None]
    pairs = [[jnp.sum(weight * (a - b) ** 2) for b in rows] for a in rows]
    return jnp.array(pairs), jnp.sum(weight * (rows - eps.reshape(len(eps), -1)) ** 2, axis=(1, 2))


def estimate(replicates: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Mean of independent replicates [R] with its standard error.

    Raises:
      ValueError: fewer than 2 replicates.
    """
    values = np.asarray(replicates, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an estimate needs 2 or more replicates [R], got shape {values.shape}")
    interval = mean_interval(values, confidence)._replace(method=METHOD)
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), interval)


def ratio(numerator: np.ndarray, denominator: np.ndarray, confidence: float = 0.95) -> Estimate:
    """Ratio of the means of paired replicates [R], with the interval of its linearisation.

    It holds the noise of the draws. That a floor of few retrained models is itself uncertain is not in it.

    Raises:
      ValueError: not equally many replicates, fewer than 2, or a denominator that is not positive (a floor of zero: the
        retrained models are one and the same).
    """
    a, b = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"a ratio needs 2 or more paired replicates, got shapes {a.shape} and {b.shape}")
    if not b.mean() > 0:
        raise ValueError(
            f"the floor is {b.mean():.3g}: the retrained models do not differ; retrain them with other seeds"
        )
    value = float(a.mean() / b.mean())
    error = float(np.std(a - value * b, ddof=1) / (b.mean() * np.sqrt(len(a))))
    half = float(stats.t.ppf(0.5 + confidence / 2, len(a) - 1)) * error
    return Estimate(value, error, Interval(value - half, value + half, confidence, f"{METHOD}, linearised ratio"))


def floor(measured: Gaps, references: Sequence[int]) -> np.ndarray:
    """float64 [R]: mean gap over the ordered pairs of different reference models, at images that are the same for all.

    Raises:
      ValueError: fewer than 2 reference models.
    """
    if len(references) < 2:
        raise ValueError(f"a floor needs at least 2 retrained models, got {len(references)}")
    return np.mean([measured.gap[:, i, j] for i in references for j in references if i != j], axis=0)


def to_references(measured: Gaps, model: int, references: Sequence[int]) -> np.ndarray:
    """float64 [R]: mean gap of a model to the reference models other than itself."""
    return np.mean([measured.gap[:, model, r] for r in references if r != model], axis=0)
