"""Exact unlearning without training: the optimal denoiser of a finite, weighted set of images.

For images y_i with weights c_i and a bandwidth h (0: the empirical distribution; above: a Gaussian around every image)::

    v = sigma^2 + alpha^2 h^2
    p_t(x) = sum_i c_i N(x; alpha y_i, v I) / sum_i c_i
    eps_hat(x, t) = sigma / v (x - alpha sum_i w_i y_i),   w = softmax_i(log c_i - |x - alpha y_i|^2 / (2 v))

No network can do better on this set. Retrained: drop the image (weight 0). Duplicated: its weight is the number of copies.
Badly unlearned: a small weight, a memory that is only dimmed. So it tells what a test of forgetting can see at all. The
formula is the posterior mean of a mixture (for h = 0: Karras et al. 2022, arXiv 2206.00364, Eq. 57).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.schedule import Schedule, per_example
from jaxunlearn.types import Array, Predict, PyTree


class WeightedSet(NamedTuple):
    """The parameters of the model: one program serves every weighting.

    Attributes:
      images: [N,H,W,C] in [-1, 1].
      log_weights: [N], log c_i; -inf drops an image.
    """

    images: Array
    log_weights: Array

    def without(self, index) -> WeightedSet:
        """The same set after retraining without the images at ``index``."""
        return self.weighted(index, 0.0)

    def weighted(self, index, weight: float) -> WeightedSet:
        """The same set with another weight of the images at ``index``.

        Raises:
          ValueError: a negative weight.
        """
        if not weight >= 0:
            raise ValueError(f"a weight must be 0 or larger, got {weight}")
        with np.errstate(divide="ignore"):
            return self._replace(log_weights=jnp.asarray(self.log_weights).at[index].set(float(np.log(weight))))


def weighted_set(images: Array, weights: Array | None = None) -> WeightedSet:
    """A set of images [N,H,W,C] with weights [N] (all 1 if None).

    Raises:
      ValueError: another rank, not one weight for each image, a negative weight, or all of them 0.
    """
    images = jnp.asarray(images)
    values = np.ones(len(images)) if weights is None else np.asarray(weights, np.float64)
    if images.ndim != 4 or values.shape != (len(images),):
        raise ValueError(f"a set needs images [N,H,W,C] and as many weights, got {images.shape} and {values.shape}")
    if not (np.all(values >= 0) and np.any(values > 0) and np.all(np.isfinite(values))):
        raise ValueError("weights must be finite and 0 or larger, and one of them above 0")
    with np.errstate(divide="ignore"):
        return WeightedSet(images, jnp.asarray(np.log(values), images.dtype))


def make_predict(schedule: Schedule, bandwidth: float = 0.0) -> Predict:
    """The optimal denoiser as a model: ``(WeightedSet, x_t [B,H,W,C], t [B], cond) -> eps_hat``; the condition is not used.

    Args:
      schedule: the noise schedule.
      bandwidth: h, 0 or larger, in the unit of the images.

    Raises:
      ValueError: a negative bandwidth.

    >>> from jaxunlearn.schedule import linear
    >>> one = weighted_set(jnp.ones((1, 2, 2, 1)))
    >>> x_t = linear().add_noise(one.images, jnp.full((1, 2, 2, 1), 0.5), jnp.array([300]))
    >>> print(make_predict(linear())(one, x_t, jnp.array([300]), None).ravel().round(3))
    [0.5 0.5 0.5 0.5]
    """
    _check_bandwidth(bandwidth)

    def predict(params: WeightedSet, x_t: Array, t: Array, cond: PyTree = None) -> Array:
        alpha, sigma, v, log_w = _log_mixture(params, x_t, t, schedule, bandwidth)
        mean = jnp.tensordot(jax.nn.softmax(log_w, axis=1), params.images, axes=1)
        return per_example(sigma / v, x_t) * (x_t - per_example(alpha, x_t) * mean)

    return predict


def log_density(params: WeightedSet, x_t: Array, t: Array, schedule: Schedule, bandwidth: float = 0.0) -> Array:
    """``log p_t(x_t)`` in nats [B], of what :func:`make_predict` is the model.

    Raises:
      ValueError: a negative bandwidth.
    """
    _check_bandwidth(bandwidth)
    size = math.prod(x_t.shape[1:])
    _, _, v, log_w = _log_mixture(params, x_t, t, schedule, bandwidth)
    normaliser = jax.nn.logsumexp(jnp.asarray(params.log_weights)) + 0.5 * size * jnp.log(2 * jnp.pi * v)
    return jax.nn.logsumexp(log_w, axis=1) - normaliser


def _check_bandwidth(bandwidth: float) -> None:
    if not bandwidth >= 0:
        raise ValueError(f"bandwidth must be 0 or larger, got {bandwidth}")


def _log_mixture(params: WeightedSet, x_t: Array, t: Array, schedule: Schedule, bandwidth: float):
    """alpha, sigma, v [B], and log c_i - |x - alpha y_i|^2 / (2 v) [B,N]."""
    alpha, sigma = (f(jnp.broadcast_to(t, x_t.shape[:1])).astype(x_t.dtype) for f in (schedule.alpha, schedule.sigma))
    v = sigma**2 + alpha**2 * bandwidth**2
    # Differences before squares: |x|^2 - 2 x.y + |y|^2 loses the digits that count at small v.
    residual = x_t[:, None] - per_example(alpha, x_t)[:, None] * params.images
    squares = jnp.sum(residual**2, axis=tuple(range(2, residual.ndim)))
    return alpha, sigma, v, params.log_weights - squares / (2 * v[:, None])
