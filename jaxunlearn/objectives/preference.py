r"""Preference losses: the model is asked to prefer other images to the forget image, measured against itself before.

With m the error of ``params`` and m_ref that of ``ref_params`` (same t, eps and selection, no gradient), d = m - m_ref:

===========  ==================================================  ==========================================
``npo``      -(2 / beta) log sigmoid(beta d_forget)              slope in m: -2 sigmoid(-beta d)
``simnpo``   -(2 / beta) log sigmoid(beta (m_forget - delta))    no reference model
``dpo``      -log sigmoid(-(beta / 2) (d_keep - d_forget))       keep image wins over forget image
``kto``      1 - sigmoid(y beta (-d - z)), y = +1 keep, -1 forget  no pairs
===========  ==================================================  ==========================================

All are descended. They fade by themselves once the image is forgotten (d large), unlike plain ascent, which ``npo`` becomes
for beta -> 0. The formulas were read in public code: NPO and SimNPO in OpenUnlearning, for text models; DPO in Diffusion-DPO
and DUO; KTO in Diffusion-KTO. Their use on single images of a diffusion model is a reconstruction.

beta carries the inverse unit of the error: ``beta(sum_squares) = beta(mean_squares) / (H*W*C)``. The published values of DPO
and KTO are for ``mean_squares``, the default error here. A window with ``num_steps`` scales m, and so beta; to keep beta's
meaning draw t inside the window instead.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.errors import mean_squares
from jaxunlearn.objectives.base import PerExampleObjective, require_positive
from jaxunlearn.objectives.denoise import denoising_error
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Array, Batch, Draw, Error, Example, Predict, PyTree

BETA_UNITS = ("loss", "raw")
"""``raw``: beta as it is. ``loss``: beta divided by ``level``, the mean error of the starting model."""
WINNERS = ("keep", "surrogate")
"""What wins in a pair of :func:`dpo`: the row's keep image, or ``batch.extra["surrogate"]``."""


def npo_loss(d: Array, beta: float | Array) -> Array:
    """``-(2 / beta) log sigmoid(beta d)`` [B]; its slope is -2 sigmoid(-beta d).

    >>> print(npo_loss(jnp.array([0.0, 1.0]), 1.0).round(4), jax.grad(npo_loss)(0.0, 5.0))
    [1.3863 0.6265] -1.0
    """
    return -(2 / beta) * jax.nn.log_sigmoid(beta * d)


def dpo_loss(d_keep: Array, d_forget: Array, beta: float | Array) -> Array:
    """``-log sigmoid(-(beta / 2) (d_keep - d_forget))`` [B]. DUO leaves out the half: its beta is half of this one."""
    return -jax.nn.log_sigmoid(-(beta / 2) * (d_keep - d_forget))


def kto_loss(d: Array, wanted: bool, beta: float | Array, z: float | Array = 0.0) -> Array:
    """``1 - sigmoid(y beta (-d - z))`` [B] with y = +1 for wanted (keep), -1 for unwanted (forget) images."""
    return jax.nn.sigmoid((1 if wanted else -1) * beta * (d + z))


class _Model(NamedTuple):
    """What every measurement of a step shares."""

    predict: Predict
    params: PyTree
    ref_params: PyTree
    draw: Draw
    schedule: Schedule

    def error(self, example: Example, error: Error) -> Array:
        return denoising_error(self.predict, self.params, example, self.draw, self.schedule, error)

    def change(self, example: Example, error: Error) -> tuple[Array, Array]:
        """``(m, m - m_ref)`` [B]."""
        m = self.error(example, error)
        ref = denoising_error(self.predict, self.ref_params, example, self.draw, self.schedule, error)
        return m, m - jax.lax.stop_gradient(ref)


def _scaled_beta(who: str, beta: float, beta_unit: str, level: float | None) -> float:
    require_positive(who, beta=beta)
    if beta_unit not in BETA_UNITS:
        raise ValueError(f"{who}: unknown beta_unit {beta_unit!r}; known: {', '.join(BETA_UNITS)}")
    if beta_unit == "raw":
        return beta
    if level is None:
        raise ValueError(
            f"{who}: beta_unit='loss' needs level=, the mean error of the starting model on the forget images "
            "(the mean of probe_levels); or choose beta_unit='raw'"
        )
    require_positive(who, level=level)
    return beta / level


def npo(
    schedule: Schedule,
    *,
    beta: float = 1.0,
    beta_unit: str = "loss",
    level: float | None = None,
    error: Error = mean_squares,
    forget_error: Error | None = None,
) -> PerExampleObjective:
    """Negative preference optimisation: ``{keep: err(x_t), forget: -(2 / beta) log sigmoid(beta d_forget)}``.

    Args:
      schedule: the noise schedule.
      beta: how soon the ascent fades, positive; the weight of the gradient is 1.46, 1, .54, .013 at beta d = -1, 0, 1, 5.
      beta_unit: ``loss`` divides beta by ``level``, after which sums and means over pixels give the same update up to the
        scale of the loss; ``raw`` takes it as it is. The values published for text do not carry over.
      level: E[m], the starting model's mean forget error (:func:`~jaxunlearn.objectives.probes.probe_levels`), in the unit
        of the forget error. Keep it with the run: a resumed run needs the same number.
      error: of the keep term.
      forget_error: of m (``error`` if None); wrap it to select times or frequencies.

    Raises:
      ValueError: beta or level not positive, unknown unit, no level for ``loss``; ``ref_params`` missing.
    """
    forget_error = forget_error or error
    beta = _scaled_beta("npo", beta, beta_unit, level)

    def function(predict, params, batch, draw, ref_params):
        model = _Model(predict, params, ref_params, draw, schedule)
        m, d = model.change(batch.forget, forget_error)
        return {"keep": model.error(batch.keep, error), "forget": npo_loss(d, beta)}, {"m_forget": m, "d_forget": d}

    return PerExampleObjective(function, terms=("keep", "forget"), forget_sign=+1, needs_ref=True, name="npo")


def simnpo(
    schedule: Schedule,
    *,
    beta: float = 1.0,
    beta_unit: str = "loss",
    level: float | None = None,
    delta: float = 0.0,
    error: Error = mean_squares,
    forget_error: Error | None = None,
) -> PerExampleObjective:
    """NPO without a reference: ``{keep: err(x_t), forget: -(2 / beta) log sigmoid(beta (m_forget - delta))}``.

    Args:
      schedule: the noise schedule.
      beta: as in :func:`npo`.
      beta_unit: as in :func:`npo`.
      level: as in :func:`npo`.
      delta: the margin, in the unit of the forget error, finite; it takes the place of m_ref.
      error: of the keep term.
      forget_error: of m (``error`` if None); wrap it to select times or frequencies.

    Raises:
      ValueError: beta or level not positive, delta not finite, unknown unit, no level for ``loss``.
    """
    forget_error = forget_error or error
    beta = _scaled_beta("simnpo", beta, beta_unit, level)
    if not np.isfinite(delta):
        raise ValueError(f"simnpo: delta must be finite, got {delta}")

    def function(predict, params, batch, draw, ref_params):
        model = _Model(predict, params, None, draw, schedule)
        m = model.error(batch.forget, forget_error)
        return {"keep": model.error(batch.keep, error), "forget": npo_loss(m - delta, beta)}, {"m_forget": m}

    return PerExampleObjective(function, terms=("keep", "forget"), forget_sign=+1, name="simnpo")


def dpo(
    schedule: Schedule,
    *,
    beta: float = 5000.0,
    winner: str = "keep",
    keep_term: bool = False,
    prior_term: bool = False,
    error: Error = mean_squares,
    forget_error: Error | None = None,
) -> PerExampleObjective:
    """Diffusion-DPO with the forget image as the loser: ``{forget: -log sigmoid(-(beta / 2) (d_keep - d_forget))}``.

    The term is called forget because it is what makes the model forget; it is descended. Its slope in m is beta / 4 at the
    start, so a keep term wants a weight of that size.

    Args:
      schedule: the noise schedule.
      beta: positive, in the inverse unit of the forget error; 5000 is Diffusion-DPO's, for ``mean_squares``.
      winner: ``keep``, the row's keep image with its own condition (for unconditional models, or keep images of the same
        condition), or ``surrogate``, ``batch.extra["surrogate"]`` [B,H,W,C] under the forget condition.
      keep_term: adds ``keep: err(x_t)``; one more backward pass.
      prior_term: adds DUO's ``prior: error(eps_hat - eps_ref)`` at t = T - 1 on pure noise, under the forget condition; one
        more forward pass of both models and one backward pass. DUO's weight is 1e4 of its beta (half of this one).
      error: of the keep and prior terms.
      forget_error: of m in both halves of the pair (``error`` if None); wrap it to select times or frequencies.

    Raises:
      ValueError: beta not positive, unknown winner; ``ref_params`` or the surrogate missing.
    """
    forget_error = forget_error or error
    require_positive("dpo", beta=beta)
    if winner not in WINNERS:
        raise ValueError(f"dpo: unknown winner {winner!r}; known: {', '.join(WINNERS)}")

    def function(predict, params, batch, draw, ref_params):
        model = _Model(predict, params, ref_params, draw, schedule)
        wins = batch.keep if winner == "keep" else Example(batch.extra["surrogate"], batch.forget.cond)
        _, d_keep = model.change(wins, forget_error)
        m, d_forget = model.change(batch.forget, forget_error)
        terms = {"forget": dpo_loss(d_keep, d_forget, beta)}
        if keep_term:
            terms = {"keep": model.error(batch.keep, error), **terms}
        if prior_term:
            terms["prior"] = _prior(model, batch, error)
        preferred = (d_keep < d_forget).astype(m.dtype)
        return terms, {"m_forget": m, "d_forget": d_forget, "d_keep": d_keep, "preferred": preferred}

    return PerExampleObjective(
        function,
        terms=(("keep",) if keep_term else ()) + ("forget",) + (("prior",) if prior_term else ()),
        forget_sign=+1,
        needs_ref=True,
        batch_extra={"surrogate": "[B,H,W,C]"} if winner == "surrogate" else {},
        name="dpo",
    )


def _prior(model: _Model, batch: Batch, error: Error) -> Array:
    """How far the model's answer to pure noise at the last t is from the reference model's: [B]."""
    t = jnp.full_like(model.draw.t, model.schedule.num_steps - 1)
    eps_hat, eps_ref = (
        model.predict(p, model.draw.eps, t, batch.forget.cond) for p in (model.params, model.ref_params)
    )
    return error(eps_hat - jax.lax.stop_gradient(eps_ref), t)


def kto(
    schedule: Schedule,
    *,
    beta: float = 1000.0,
    z: float | str = 0.0,
    error: Error = mean_squares,
    forget_error: Error | None = None,
) -> PerExampleObjective:
    """Diffusion-KTO: ``{keep: 1 - sigmoid(beta (-d_keep - z)), forget: 1 - sigmoid(beta (d_forget + z))}``, descended.

    The weights of wanted and unwanted images are those of the combiner (1 and 1 as published).

    Args:
      schedule: the noise schedule.
      beta: positive, in the inverse unit of the error; 1000 is the published value, for ``mean_squares``.
      z: the reference point, 0 or more. ``batch`` is the published ``max(mean of -d, 0)`` over the keep and forget rows that
        the function sees. It mixes examples, and on several devices or micro-batches each share has its own, so results
        then depend on their number. With 0 (the default) none does; the clamp gives 0 too once forgetting has begun.
      error: of m_keep.
      forget_error: of m_forget (``error`` if None); wrap it to select times or frequencies.

    Raises:
      ValueError: beta not positive, z negative or unknown; ``ref_params`` missing.
    """
    forget_error = forget_error or error
    require_positive("kto", beta=beta)
    if z != "batch" and (isinstance(z, str) or not (np.isfinite(z) and z >= 0)):
        raise ValueError(f"kto: z must be 'batch' or a finite number of 0 or more, got {z!r}")

    def function(predict, params, batch, draw, ref_params):
        model = _Model(predict, params, ref_params, draw, schedule)
        _, d_keep = model.change(batch.keep, error)
        m, d_forget = model.change(batch.forget, forget_error)
        point = z
        if z == "batch":
            point = jax.lax.stop_gradient(jnp.maximum(-(jnp.mean(d_keep) + jnp.mean(d_forget)) / 2, 0))
        terms = {"keep": kto_loss(d_keep, True, beta, point), "forget": kto_loss(d_forget, False, beta, point)}
        return terms, {"m_forget": m, "d_forget": d_forget, "d_keep": d_keep}

    return PerExampleObjective(function, terms=("keep", "forget"), forget_sign=+1, needs_ref=True, name="kto")
