"""How large an error is before training: the same fixed probes (t, eps) for every image and model.

From the measured levels follow the unit of beta (:mod:`jaxunlearn.objectives.preference`) and the caps of bounded ascent
(:mod:`jaxunlearn.objectives.bounded`). Our own design, from no paper.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxunlearn.errors import mean_squares
from jaxunlearn.objectives.denoise import denoising_error
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Array, Draw, Error, Example, Predict, PyTree


def strata(num_steps: int, count: int = 16, *, t_min: int = 0, t_max: int | None = None) -> np.ndarray:
    """Midpoints of ``count`` equal strata of ``t_min <= t < t_max``: int32 [count].

    Raises:
      ValueError: a range outside 0..num_steps, or more strata than timesteps.

    >>> strata(1000, 4).tolist()
    [125, 375, 625, 875]
    """
    t_max = num_steps if t_max is None else t_max
    if not 0 <= t_min < t_max <= num_steps or not 1 <= count <= t_max - t_min:
        raise ValueError(
            f"strata need 0 <= t_min < t_max <= {num_steps} and 1 <= count <= t_max - t_min, "
            f"got t_min={t_min}, t_max={t_max}, count={count}"
        )
    return (t_min + (np.arange(count) + 0.5) * (t_max - t_min) / count).astype(np.int32)


def probe_levels(
    predict: Predict,
    params: PyTree,
    example: Example,
    schedule: Schedule,
    key: Array,
    *,
    error: Error = mean_squares,
    count: int = 16,
    noises: int = 4,
    t_min: int = 0,
    t_max: int | None = None,
) -> Array:
    """Mean over ``noises`` draws of eps of ``error(eps_hat(z_t, t) - eps, t)`` at each stratum's t.

    The same key gives the same probes for every image and model. The mean over the last axis is the level of an image; over
    everything, E[m]: what :func:`~jaxunlearn.objectives.preference.npo` takes as ``level``. One image runs at a time.

    Args:
      predict: the model.
      params: its parameters: of the starting model, or of an untrained one for the null level.
      example: N images [N,H,W,C] in [-1, 1] with their conditions.
      schedule: the noise schedule.
      key: JAX key of the noises.
      error: the objective's own forget error, selections included.
      count: number of strata of t.
      noises: draws of eps at each t.
      t_min: first timestep that is drawn in training.
      t_max: one past the last (T if None).

    Returns:
      [N, count], in the unit of the error.
    """
    t = jnp.repeat(jnp.asarray(strata(schedule.num_steps, count, t_min=t_min, t_max=t_max)), noises)
    eps = jax.random.normal(key, (len(t), *example.x0.shape[1:]), jnp.promote_types(example.x0.dtype, jnp.float32))
    draw = Draw(t, jnp.ones(t.shape), eps, jnp.zeros(t.shape))

    def level(one):
        rows = jax.tree.map(lambda z: jnp.broadcast_to(z, (len(t), *z.shape)), one)
        errors = denoising_error(predict, params, rows, draw, schedule, error)
        return jnp.mean(errors.reshape(count, noises), axis=1)

    return jax.lax.map(level, Example(jnp.asarray(example.x0), jax.tree.map(jnp.asarray, example.cond)))


def level_table(
    levels: np.ndarray,
    num_steps: int,
    *,
    start: np.ndarray | None = None,
    t_min: int = 0,
    t_max: int | None = None,
) -> np.ndarray:
    """A table over all t from the levels at the strata: linear between their midpoints, constant beyond.

    Args:
      levels: [count], such as the mean over images of :func:`probe_levels`.
      num_steps: T.
      start: [count], the starting model's levels on the forget images; the table is raised to them where it is lower, so
        that nothing is capped before training begins.
      t_min: as given to :func:`probe_levels`.
      t_max: likewise.

    Returns:
      float64 [T], in the unit of the levels.

    Raises:
      ValueError: levels that are not finite and positive, or a ``start`` of another shape.

    >>> level_table(np.array([8.0, 4.0]), 8).tolist()
    [8.0, 8.0, 8.0, 7.0, 6.0, 5.0, 4.0, 4.0]
    """
    levels = np.asarray(levels, np.float64)
    if levels.ndim != 1 or not np.all(np.isfinite(levels)) or not np.all(levels > 0):
        raise ValueError(f"levels must be a vector of finite positive numbers, one for each stratum, got {levels}")
    if start is not None:
        if np.shape(start) != levels.shape:
            raise ValueError(f"start must have the shape of levels, {levels.shape}, got {np.shape(start)}")
        levels = np.maximum(levels, np.asarray(start, np.float64))
    at = strata(num_steps, len(levels), t_min=t_min, t_max=t_max)
    return np.interp(np.arange(num_steps), at, levels)
