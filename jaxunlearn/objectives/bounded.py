"""Bounded ascent: the forget error is raised, but no further than a cap, so that the ascent cannot diverge.

    keep = err(x_t),   forget = min(err(a_t), cap)

per example: a row at or above the cap has a zero gradient. ``mirrored`` caps at the level of a network that knows nothing
(after MUCS, its public code), ``clamped`` at a level l*(t) that the user measured, such as that of a retrained model (our
own design).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.errors import mean_squares
from jaxunlearn.objectives.base import PerExampleObjective, require_positive
from jaxunlearn.objectives.denoise import denoising_error
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Array, Error


def clamp(value: Array, cap: Array) -> Array:
    """``min(value, cap)`` [B] whose gradient is zero at and above the cap."""
    return jnp.where(value < cap, value, jax.lax.stop_gradient(jnp.broadcast_to(cap, value.shape)).astype(value.dtype))


def _bounded(name: str, schedule: Schedule, cap_of, error: Error, forget_error: Error) -> PerExampleObjective:
    def function(predict, params, batch, draw, ref_params):
        ascended = denoising_error(predict, params, batch.forget, draw, schedule, forget_error)
        cap = cap_of(draw)
        terms = {
            "keep": denoising_error(predict, params, batch.keep, draw, schedule, error),
            "forget": clamp(ascended, cap),
        }
        return terms, {"capped": ((ascended >= cap) & (cap > 0)).astype(ascended.dtype)}

    return PerExampleObjective(function, terms=("keep", "forget"), forget_sign=-1, name=name)


def mirrored(
    schedule: Schedule, *, cap: float | None = None, error: Error = mean_squares, forget_error: Error | None = None
) -> PerExampleObjective:
    """``{keep: err(x_t), forget: min(err(a_t), cap)}``, forget ascended up to the null level.

    The null level is the error of an untrained network. MUCS measures it as one number; a network whose output starts at
    zero has the error of its target, so by default each row is capped by ``forget_error(eps, t)``: its mean over eps is the
    null level for every t, unit and selection (1 with ``mean_squares``, H*W*C with ``sum_squares``). For images like the
    training data it lies far above what a retrained model has: it prevents divergence, not over-unlearning.

    Aux ``capped``: 1 where the row is at its cap.

    Args:
      schedule: the noise schedule.
      cap: null level in the unit of the forget error, one positive number, for example the mean of
        :func:`~jaxunlearn.objectives.probes.probe_levels` of the untrained network; None for the rule above.
      error: of the keep term. ``mean_squares`` as in the source.
      forget_error: of the forget term (``error`` if None); wrap it to select times or frequencies.

    Raises:
      ValueError: a cap that is not one finite positive number.
    """
    forget_error = forget_error or error
    if cap is not None:
        if np.ndim(cap):
            raise ValueError(
                f"mirrored: cap must be one number, got shape {np.shape(cap)}; clamped takes a table over t"
            )
        require_positive("mirrored", cap=cap)

    def cap_of(draw):
        return forget_error(draw.eps, draw.t) if cap is None else jnp.asarray(cap, jnp.result_type(float))

    return _bounded("mirrored", schedule, cap_of, error, forget_error)


def clamped(
    schedule: Schedule,
    *,
    cap: float | np.ndarray | None = None,
    error: Error = mean_squares,
    forget_error: Error | None = None,
) -> PerExampleObjective:
    """``{keep: err(x_t), forget: min(err(a_t), cap(t))}``, forget ascended up to a level that you measured.

    The level of a model retrained without the images is the definition of enough. Measure it with this objective's own
    forget error (:func:`~jaxunlearn.objectives.probes.probe_levels`) and join it to a table over t
    (:func:`~jaxunlearn.objectives.probes.level_table`): one number would bind at small t only, where errors are large.

    Aux ``capped``: 1 where the row is at its cap.

    Args:
      schedule: the noise schedule.
      cap: table [T] over t, or one number; positive, in the unit of the forget error. There is no default.
      error: of the keep term.
      forget_error: of the forget term (``error`` if None); wrap it to select times or frequencies.

    Raises:
      ValueError: no cap, a table of another length, or values that are not finite and positive.
    """
    forget_error = forget_error or error
    if cap is None:
        raise ValueError(
            "clamped needs cap=: the forget error of a retrained model, a table over t or a number "
            "(probe_levels and level_table measure it); mirrored needs none"
        )
    if np.shape(cap) not in ((), (schedule.num_steps,)):
        raise ValueError(f"clamped: cap must be a number or a table [{schedule.num_steps}] over t, got {np.shape(cap)}")
    require_positive("clamped", cap=cap)
    table = np.broadcast_to(np.asarray(cap, np.float64), (schedule.num_steps,))
    return _bounded("clamped", schedule, lambda draw: jnp.asarray(table)[draw.t], error, forget_error)
