r"""Redirection: noised forget images are answered as a denoiser that never saw them would answer.

The targets are those of ReTrack (arXiv 2509.13007, its public code; equation numbers are not known here). With keep images
y_1..y_K near the forget image a0, ``a_t = alpha a0 + sigma eps`` and ``r = alpha / sigma``:

    v_j     = (a_t - alpha y_j) / sigma = eps + r (a0 - y_j)              the noise that leads from y_j to a_t
    logit_j = -r <eps, a0 - y_j> - r^2 / 2 |a0 - y_j|^2,   w = softmax(logit)    the posterior of y_j given a_t
    target  = sum_j w_j v_j = eps + r (a0 - sum_j w_j y_j)

ReTrack sums the K errors, ``sum_j w_j |eps_hat - v_j|^2``. For squares (also filtered and weighted in t) that is
``|eps_hat - target|^2 + spread`` with a spread that no parameter enters: one target has the same gradient and 1/K of the
memory. This is derived and tested here, it is not the published form. The keep and the forget image of a row share t and
eps; the published code draws them apart.

``r^2`` is 1e4 at t = 0, 1.1 at t = 250 and .08 at t = 500 of the linear schedule, so small t rules the term. To level it:
``forget_error=weighted(error, min_snr(schedule, gamma=1.0))``, which is ``min(1, 1 / r^2)``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxunlearn.errors import at_least_float32, is_quadratic, sum_squares
from jaxunlearn.objectives.base import PerExampleObjective
from jaxunlearn.objectives.denoise import denoising_error
from jaxunlearn.schedule import Schedule, per_example
from jaxunlearn.types import Array, Batch, Draw, Error, Predict, PyTree


def posterior_weights(a0: Array, neighbours: Array, eps: Array, alpha: Array, sigma: Array) -> Array:
    """``p(y_j | a_t)`` among the neighbours: [B,K], rows sum to 1.

    ``softmax_j(-r <eps, a0 - y_j> - r^2 / 2 |a0 - y_j|^2)`` equals ``softmax_j(-|v_j|^2 / 2)`` without its cancellation.

    Args:
      a0: [B,H,W,C], forget images.
      neighbours: [B,K,H,W,C], keep images.
      eps: [B,H,W,C], noise of the row.
      alpha: [B], scale of the image at each row's t.
      sigma: [B], standard deviation of the noise, positive.

    Returns:
      [B,K], float32 or wider.
    """
    a0, neighbours, eps = (at_least_float32(z) for z in (a0, neighbours, eps))
    r = alpha / sigma
    apart = a0[:, None] - neighbours
    halfway = eps[:, None] + 0.5 * per_example(r, neighbours) * apart
    logit = -r[:, None] * jnp.sum(apart * halfway, axis=tuple(range(2, neighbours.ndim)))
    return jax.nn.softmax(logit, axis=1)


def redirect_target(a0: Array, y: Array, eps: Array, alpha: Array, sigma: Array) -> Array:
    """``eps + r (a0 - y)``: the noise that leads from y to a_t, [B,H,W,C]; y is an image or a weighted mean of some."""
    a0, y, eps = (at_least_float32(z) for z in (a0, y, eps))
    return eps + per_example(alpha / sigma, eps) * (a0 - y)


def _terms(
    predict: Predict, params: PyTree, batch: Batch, draw: Draw, schedule: Schedule, target: Array, errors: tuple
) -> dict[str, Array]:
    error, forget_error = errors
    a_t = schedule.add_noise(batch.forget.x0, draw.eps, draw.t)
    residual = at_least_float32(predict(params, a_t, draw.t, batch.forget.cond)) - target
    return {
        "keep": denoising_error(predict, params, batch.keep, draw, schedule, error),
        "forget": forget_error(residual, draw.t),
    }


def retrack(
    schedule: Schedule, *, error: Error = sum_squares, forget_error: Error | None = None
) -> PerExampleObjective:
    """``{keep: err(x_t), forget: forget_error(eps_hat(a_t, t) - target, t)}``, forget descended.

    ``batch.extra["neighbours"]`` [B,K,H,W,C] holds, for every row, K keep images near its forget image, in the model's space
    and of its condition: :func:`jaxunlearn.objectives.neighbours.nearest` finds them, or choose your own. K = 10 is the
    published value.

    Aux ``spread``: ``sum_j w_j forget_error(v_j - target, t)``, the part of ReTrack's loss that no parameter enters.

    Args:
      schedule: the noise schedule.
      error: of the keep term.
      forget_error: of the forget term (``error`` if None); wrap it to select times or frequencies. The weights of the
        neighbours always use all frequencies.

    Raises:
      ValueError: neighbours missing or of another shape; K > 1 with an error that is not a quadratic form
        (:func:`jaxunlearn.errors.is_quadratic`), for which one target is not ReTrack's loss.
    """
    forget_error = forget_error or error

    def function(predict, params, batch, draw, ref_params):
        a0, neighbours = batch.forget.x0, at_least_float32(batch.extra["neighbours"])
        if neighbours.shape[1] > 1 and not is_quadratic(forget_error):
            raise ValueError(
                f"retrack with {neighbours.shape[1]} neighbours needs a quadratic forget error: sum_squares or "
                "mean_squares, also filtered and weighted; or give one neighbour"
            )
        alpha, sigma = schedule.alpha(draw.t), schedule.sigma(draw.t)
        w = posterior_weights(a0, neighbours, draw.eps, alpha, sigma)
        mean = jnp.sum(w.reshape(w.shape + (1,) * (a0.ndim - 1)) * neighbours, axis=1)
        target = redirect_target(a0, mean, draw.eps, alpha, sigma)

        def apart(y):
            return forget_error(per_example(alpha / sigma, mean) * (mean - y), draw.t)

        spread = jnp.sum(w * jax.vmap(apart, in_axes=1, out_axes=1)(neighbours), axis=1)
        return _terms(predict, params, batch, draw, schedule, target, (error, forget_error)), {"spread": spread}

    return PerExampleObjective(
        function,
        terms=("keep", "forget"),
        forget_sign=+1,
        batch_extra={"neighbours": "[B,K,H,W,C]"},
        name="retrack",
    )


def surrogate(
    schedule: Schedule, *, error: Error = sum_squares, forget_error: Error | None = None
) -> PerExampleObjective:
    """:func:`retrack` with one image for each forget image: ``target = eps + r (a0 - y)``, forget descended.

    ``batch.extra["surrogate"]`` [B,H,W,C] holds an edited or similar image for every row, in the model's space. Any error
    serves. A reconstruction of the surrogate idea of arXiv 2603.10445 and 2512.03564, whose formulas were not available.

    Args:
      schedule: the noise schedule.
      error: of the keep term.
      forget_error: of the forget term (``error`` if None); wrap it to select times or frequencies.

    Raises:
      ValueError: the surrogate is missing or of another shape.
    """
    forget_error = forget_error or error

    def function(predict, params, batch, draw, ref_params):
        alpha, sigma = schedule.alpha(draw.t), schedule.sigma(draw.t)
        target = redirect_target(batch.forget.x0, batch.extra["surrogate"], draw.eps, alpha, sigma)
        return _terms(predict, params, batch, draw, schedule, target, (error, forget_error)), {}

    return PerExampleObjective(
        function, terms=("keep", "forget"), forget_sign=+1, batch_extra={"surrogate": "[B,H,W,C]"}, name="surrogate"
    )
