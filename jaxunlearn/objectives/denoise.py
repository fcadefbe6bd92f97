"""The denoising loss and the baselines made of it alone: naive deletion, NegGrad, and SISS without importance sampling.

With ``err(z_t) = error(eps_hat(z_t, t) - eps, t)``, ``x_t = alpha x0 + sigma eps`` and ``a_t = alpha a0 + sigma eps``
(DDPM, Ho et al. 2020, Eq. 14):

=============  ====================================  =======================================
``denoise``    keep: err(x_t)                        training, and naive fine-tuning on keep
``neggrad``    forget: err(a_t), ascended            destroys the model if run for long
``siss_no_is`` keep: err(x_t), forget: err(a_t)      the two-forward form of SISS
=============  ====================================  =======================================
"""

from __future__ import annotations

from jaxunlearn.errors import sum_squares
from jaxunlearn.objectives.base import PerExampleObjective
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Array, Draw, Error, Example, Predict, PyTree


def denoising_error(
    predict: Predict, params: PyTree, example: Example, draw: Draw, schedule: Schedule, error: Error
) -> Array:
    """``error(eps_hat(alpha x0 + sigma eps, t) - eps, t)``: [B]."""
    x_t = schedule.add_noise(example.x0, draw.eps, draw.t)
    return error(predict(params, x_t, draw.t, example.cond) - draw.eps, draw.t)


def denoise(schedule: Schedule, *, error: Error = sum_squares) -> PerExampleObjective:
    """``{keep: err(x_t)}``: how diffusion models are trained. On keep alone it is naive deletion (METHODS ``naive``)."""

    def function(predict, params, batch, draw, ref_params):
        return {"keep": denoising_error(predict, params, batch.keep, draw, schedule, error)}, {}

    return PerExampleObjective(function, terms=("keep",), forget_sign=0)


naive = denoise
"""Fine-tuning on keep alone: forgets, if at all, by drift. The baseline of every table."""


def neggrad(
    schedule: Schedule, *, error: Error = sum_squares, forget_error: Error | None = None
) -> PerExampleObjective:
    """``{forget: err(a_t)}``, to be ascended: NegGrad (Golatkar et al. 2020). Nothing holds the rest of the model."""
    forget_error = forget_error or error

    def function(predict, params, batch, draw, ref_params):
        return {"forget": denoising_error(predict, params, batch.forget, draw, schedule, forget_error)}, {}

    return PerExampleObjective(function, terms=("forget",), forget_sign=-1)


def siss_no_is(
    schedule: Schedule, *, error: Error = sum_squares, forget_error: Error | None = None
) -> PerExampleObjective:
    """``{keep: err(x_t), forget: err(a_t)}`` with the same eps and t in both: "No-IS" of the SISS paper.

    Two forward passes. Sharing eps and t between the branches is a strong variance reduction of their difference.

    Args:
      schedule: the noise schedule.
      error: of the keep term.
      forget_error: of the forget term (``error`` if None); wrap it to select times or frequencies.
    """
    forget_error = forget_error or error

    def function(predict, params, batch, draw, ref_params):
        terms = {
            "keep": denoising_error(predict, params, batch.keep, draw, schedule, error),
            "forget": denoising_error(predict, params, batch.forget, draw, schedule, forget_error),
        }
        return terms, {}

    return PerExampleObjective(function, terms=("keep", "forget"), forget_sign=-1)
