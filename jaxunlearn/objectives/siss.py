r"""SISS: Subtracted Importance Sampled Scores (Alberti et al., ICLR 2025, arXiv 2503.01034).

One forward pass serves the keep and the forget loss. The network sees a sample ``m_t`` of the mixture
``q_lam = (1 - lam) q(. | x0) + lam q(. | a0)`` with ``q(m | z) = N(alpha z, sigma^2 I)``, and each loss is corrected by
its importance weight ``w = q(m | z) / q_lam(m)``. Both losses are unbiased for 0 < lam < 1.

The weights need only the log-ratio ``gap = log q(m | a0) - log q(m | x0)``. Its two squared distances are large and almost
equal, so it is computed from their difference in closed form:

    gap = sum_hwc (alpha / sigma^2) (a0 - x0) (m - alpha (x0 + a0) / 2)

Facts that the tests pin: ``(1 - lam) w_keep + lam w_forget = 1``; ``w_keep <= 1 / (1 - lam)``, ``w_forget <= 1 / lam``;
:func:`siss` is the conditional expectation of :func:`bernoulli` given m (Rao-Blackwell).

When it matters: given m from keep, gap is N(-D^2/2, D^2) with ``D = alpha |x0 - a0| / sigma``. Where D exceeds about 6
(small t, large images, latents) the weights are one-hot and SISS equals :func:`bernoulli`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.errors import at_least_float32, sum_squares
from jaxunlearn.objectives.base import PerExampleObjective
from jaxunlearn.schedule import Schedule, per_example
from jaxunlearn.score_matching import eps_from_x0
from jaxunlearn.types import Array, Batch, Draw, Error, PyTree

MAX_LOG_WEIGHT = 80.0
"""Cap of log w. It acts only at lam = 0 (w_forget) and lam = 1 (w_keep), where the weight has no bound of its own."""


def log_ratio(m_t: Array, x0: Array, a0: Array, alpha: Array, sigma: Array) -> Array:
    """``gap = log q(m_t | a0) - log q(m_t | x0)``.

    Args:
      m_t: [B,H,W,C], noisy images.
      x0: [B,H,W,C], keep images.
      a0: [B,H,W,C], forget images.
      alpha: [B], scale of the image at each row's t.
      sigma: [B], standard deviation of the noise, positive.

    Returns:
      [B], float32 (float64 for float64 input), whatever the precision of the network.
    """
    m_t, x0, a0 = (at_least_float32(z) for z in (m_t, x0, a0))
    middle = per_example(alpha, m_t) * (0.5 * (x0 + a0))
    inner = jnp.sum((a0 - x0) * (m_t - middle), axis=tuple(range(1, m_t.ndim)))
    return alpha / sigma**2 * inner


def mixture_weights(gap: Array, lam: float | Array) -> tuple[Array, Array]:
    """Importance weights of the mixture from the log-ratio.

    ``w_keep = 1 / ((1 - lam) + lam e^gap)`` and ``w_forget = 1 / ((1 - lam) e^-gap + lam)``, in a form that neither
    overflows nor cancels, for every lam in [0, 1] with log 0 = -inf.

    Args:
      gap: [B], from :func:`log_ratio`.
      lam: probability of the forget component, in [0, 1].

    Returns:
      ``(w_keep [B], w_forget [B])``, finite. At lam = 0 ``w_forget = e^gap`` is heavy-tailed and capped at e^80, as is
      w_keep at lam = 1: prefer 0 < lam < 1.

    >>> w_keep, w_forget = mixture_weights(jnp.array([-0.25386454, 0.09411860]), 0.5)
    >>> print(w_keep.round(5), w_forget.round(5))
    [1.12625 0.95298] [0.87375 1.04702]
    """
    gap = at_least_float32(jnp.asarray(gap))
    lam = jnp.asarray(lam, gap.dtype)
    log_keep, log_forget = jnp.log1p(-lam), jnp.log(lam)
    log_w_keep = -jnp.logaddexp(log_keep, log_forget + gap)
    log_w_forget = -jnp.logaddexp(log_keep - gap, log_forget)
    return jnp.exp(jnp.minimum(log_w_keep, MAX_LOG_WEIGHT)), jnp.exp(jnp.minimum(log_w_forget, MAX_LOG_WEIGHT))


def importance_weights(
    m_t: Array, x0: Array, a0: Array, alpha: Array, sigma: Array, lam: float | Array
) -> tuple[Array, Array]:
    """``(w_keep [B], w_forget [B])`` of the noisy images m_t: :func:`log_ratio`, then :func:`mixture_weights`."""
    return mixture_weights(log_ratio(m_t, x0, a0, alpha, sigma), lam)


def mixture_sample(batch: Batch, draw: Draw, schedule: Schedule, lam: float | Array) -> tuple[Array, Array]:
    """A sample of the mixture for each row: ``a_t`` where ``u < lam``, else ``x_t``.

    Returns:
      ``(m_t [B,H,W,C], from_forget bool [B])``. At lam = 0 no row, at lam = 1 every row is from forget.
    """
    from_forget = draw.u < lam
    z0 = jnp.where(per_example(from_forget, batch.keep.x0), batch.forget.x0, batch.keep.x0)
    return schedule.add_noise(z0, draw.eps, draw.t), from_forget


def _check_conditions(keep: PyTree, forget: PyTree) -> None:
    """The mixture is over images; with different conditions in a row the densities would be of different models."""
    if jax.tree.structure(keep) != jax.tree.structure(forget):
        raise ValueError("keep.cond and forget.cond must have the same structure: SISS needs one condition per row")
    pairs = zip(jax.tree.leaves(keep), jax.tree.leaves(forget))
    for a, b in pairs:
        if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
            continue
        if np.shape(a) != np.shape(b) or not np.array_equal(a, b):
            raise ValueError(
                "keep.cond and forget.cond must be equal in every row: SISS mixes images under one condition. "
                "Draw keep images of the forget image's condition, or use siss_no_is"
            )


FROM_BATCH = "batch"
"""As ``lam``: every row brings its own, in ``batch.extra["lam"]`` [B]."""


def _check_lam(lam: float | Array | str) -> None:
    if isinstance(lam, str):
        if lam != FROM_BATCH:
            raise ValueError(f"lam must lie in [0, 1] or be {FROM_BATCH!r}, got {lam!r}")
    elif not isinstance(lam, jax.core.Tracer) and not 0 <= float(lam) <= 1:
        raise ValueError(f"lam must lie in [0, 1], got {lam}")


def _lam_of(lam: float | Array | str, batch: Batch) -> float | Array:
    """The number, or the [B] of the batch."""
    return batch.extra["lam"] if isinstance(lam, str) else lam


def _extra_of(lam: float | Array | str) -> dict[str, str]:
    return {"lam": "[B]"} if isinstance(lam, str) else {}


def siss(
    schedule: Schedule,
    *,
    lam: float | Array | str = 0.5,
    error: Error = sum_squares,
    forget_error: Error | None = None,
) -> PerExampleObjective:
    """SISS(lam): one forward pass, two importance-weighted terms.

    ``keep = w_keep error(eps_hat(m_t) - (m_t - alpha x0) / sigma)`` and
    ``forget = w_forget forget_error(eps_hat(m_t) - (m_t - alpha a0) / sigma)``.

    ``keep.cond`` and ``forget.cond`` of a row must be equal, since the mixture is over images under one condition.
    Concrete arrays are checked; under ``jit`` it is the caller's duty.

    A lam that changes from step to step: ``lam="batch"`` reads it from ``batch.extra["lam"]``, float [B], which the
    training loop fills (``np.full(B, lam_schedule(step), np.float32)``). One compiled step serves all values, on any number
    of devices and micro-batches. Values in a batch are not checked: outside [0, 1] the weights mean nothing. A function that
    takes lam as a traced scalar and builds the objective inside (``siss(schedule, lam=lam)``) also compiles once. A draw
    function with ``stratify_lam`` knows only one number.

    Args:
      schedule: the noise schedule.
      lam: probability of the forget component, in [0, 1]; a number, a traced scalar, or ``"batch"``.
      error: of the keep term. The SISS settings assume ``sum_squares``.
      forget_error: of the forget term (``error`` if None); wrap it to select times or frequencies. The weights always
        use all frequencies.

    Raises:
      ValueError: lam outside [0, 1]; unequal conditions.
    """
    _check_lam(lam)
    forget_error = forget_error or error

    def function(predict, params, batch, draw, ref_params):
        _check_conditions(batch.keep.cond, batch.forget.cond)
        x0, a0 = batch.keep.x0, batch.forget.x0
        alpha, sigma = schedule.alpha(draw.t), schedule.sigma(draw.t)
        probability = _lam_of(lam, batch)
        m_t, from_forget = mixture_sample(batch, draw, schedule, probability)
        gap = log_ratio(m_t, x0, a0, alpha, sigma)
        w_keep, w_forget = mixture_weights(gap, probability)
        eps_hat = at_least_float32(predict(params, m_t, draw.t, batch.keep.cond))
        terms = {
            "keep": w_keep * error(eps_hat - eps_from_x0(m_t, x0, alpha, sigma), draw.t),
            "forget": w_forget * forget_error(eps_hat - eps_from_x0(m_t, a0, alpha, sigma), draw.t),
        }
        aux = {
            "w_keep": w_keep,
            "w_forget": w_forget,
            "from_forget": from_forget.astype(gap.dtype),
            "mixed": (jnp.abs(gap) < 5).astype(gap.dtype),
        }
        return terms, aux

    return PerExampleObjective(
        function, terms=("keep", "forget"), forget_sign=-1, batch_extra=_extra_of(lam), name="siss"
    )


def bernoulli(
    schedule: Schedule,
    *,
    lam: float | Array | str = 0.5,
    error: Error = sum_squares,
    forget_error: Error | None = None,
) -> PerExampleObjective:
    """Each row serves one term: ``err(x_t) / (1 - lam)`` to keep or ``err(a_t) / lam`` to forget, by a coin ``u < lam``.

    The estimator that SISS improves on: same mean, never less variance. Rows that do not serve a term give it 0.

    Args:
      schedule: the noise schedule.
      lam: probability that a row serves forget, strictly between 0 and 1; a number, a traced scalar, or ``"batch"`` as
        in :func:`siss`.
      error: of the keep term.
      forget_error: of the forget term (``error`` if None).

    Raises:
      ValueError: lam outside (0, 1).
    """
    _check_lam(lam)
    if not isinstance(lam, (str, jax.core.Tracer)) and not 0 < lam < 1:
        raise ValueError(f"bernoulli needs 0 < lam < 1 (each term needs rows), got {lam}")
    forget_error = forget_error or error

    def function(predict, params, batch, draw, ref_params):
        _check_conditions(batch.keep.cond, batch.forget.cond)
        probability = _lam_of(lam, batch)
        m_t, from_forget = mixture_sample(batch, draw, schedule, probability)
        residual = at_least_float32(predict(params, m_t, draw.t, batch.keep.cond)) - draw.eps
        chosen = per_example(from_forget, residual)
        # The residual is masked before the error, so that a row of the other term cannot leak a NaN gradient.
        keep = jnp.where(from_forget, 0, error(jnp.where(chosen, 0, residual), draw.t)) / (1 - probability)
        forget = jnp.where(from_forget, forget_error(jnp.where(chosen, residual, 0), draw.t), 0) / probability
        return {"keep": keep, "forget": forget}, {"from_forget": from_forget.astype(residual.dtype)}

    return PerExampleObjective(
        function, terms=("keep", "forget"), forget_sign=-1, batch_extra=_extra_of(lam), name="bernoulli"
    )
