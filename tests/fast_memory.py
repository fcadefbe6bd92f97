"""The closed-form denoiser by scalar products: ten times as fast as the library's, with fewer digits at small t."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def make_predict(schedule):
    """As :func:`jaxunlearn.closed_form.make_predict` with bandwidth 0, which takes differences before squares."""

    def predict(params, x, t, cond=None):
        y, flat = params.images.reshape(len(params.images), -1), x.reshape(len(x), -1)
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        square = jnp.sum(flat**2, axis=1, keepdims=True) - 2 * alpha * flat @ y.T + alpha**2 * jnp.sum(y**2, axis=1)
        weights = jax.nn.softmax(params.log_weights - square / (2 * sigma**2), axis=1)
        return ((flat - alpha * (weights @ y)) / sigma).reshape(x.shape)

    return predict
