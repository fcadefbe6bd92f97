"""EraseDiff (Wu et al. 2024, arXiv 2401.05779) in the loop-free form that the SISS paper compares with.

``keep = err(x_t)``; ``forget = error(eps_hat(a_t, t) - v, t)`` with v drawn independently of a_t: the forget term is
*descended*, so that the model answers noised forget images with noise that has nothing to do with them. The combiner
:func:`jaxunlearn.combine.erasediff` joins both.
"""

from __future__ import annotations

import jax

from jaxunlearn.errors import sum_squares
from jaxunlearn.objectives.base import PerExampleObjective
from jaxunlearn.objectives.denoise import denoising_error
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Error

NOISES = {
    "uniform01": jax.random.uniform,
    "uniform": lambda key, shape: jax.random.uniform(key, shape, minval=-1.0),
    "normal": jax.random.normal,
}
"""Distributions of the target noise; ``uniform01`` is the published one."""


def erasediff(
    schedule: Schedule,
    *,
    noise: str = "uniform01",
    error: Error = sum_squares,
    forget_error: Error | None = None,
) -> PerExampleObjective:
    """``{keep: err(x_t), forget: forget_error(eps_hat(a_t, t) - v, t)}``, forget descended.

    Args:
      schedule: the noise schedule.
      noise: distribution of v: ``uniform01`` on [0, 1) (three quarters of its energy are its mean; centre it before a
        low-pass selection), ``uniform`` on [-1, 1), or ``normal``.
      error: of the keep term.
      forget_error: of the forget term (``error`` if None).

    Raises:
      ValueError: unknown noise; ``draw.extra["noise"]`` missing or not of the shape of the images.
    """
    if noise not in NOISES:
        raise ValueError(f"unknown noise {noise!r}; known: {', '.join(NOISES)}")
    forget_error = forget_error or error

    def function(predict, params, batch, draw, ref_params):
        a_t = schedule.add_noise(batch.forget.x0, draw.eps, draw.t)
        residual = predict(params, a_t, draw.t, batch.forget.cond) - draw.extra["noise"]
        terms = {
            "keep": denoising_error(predict, params, batch.keep, draw, schedule, error),
            "forget": forget_error(residual, draw.t),
        }
        return terms, {}

    return PerExampleObjective(
        function,
        terms=("keep", "forget"),
        forget_sign=+1,
        draw_extra={"noise": NOISES[noise]},
        name="erasediff",
    )
