"""Ascent held by an anchor: in the style of VDU and of Selective Amnesia. Reconstructions, not the papers' formulas.

Where the VDU paper (arXiv 2510.04058) places its weight could not be verified: only its abstract was available. Of Selective
Amnesia the anchor alone is taken; its own forget term answers another concept and is not used here.
"""

from __future__ import annotations

from jaxunlearn.errors import sum_squares
from jaxunlearn.objectives.anchor import anchored
from jaxunlearn.objectives.base import PerExampleObjective
from jaxunlearn.objectives.denoise import neggrad, siss_no_is
from jaxunlearn.schedule import Schedule
from jaxunlearn.types import Error


def vdu_style(
    schedule: Schedule,
    *,
    anchor: str = "checkpoint_var",
    error: Error = sum_squares,
    forget_error: Error | None = None,
) -> PerExampleObjective:
    """``{forget: err(a_t), anchor: 1/2 sum (theta - mean)^2 / var}``: ascent without any keep image.

    With ``weighted_sum(forget=-(1 - g), anchor=g)`` the direction is ``-(1 - g) g_forget + g (theta - mean) / var``. No g is
    known to work: in a toy 1e-3 forgot nothing and 1e-4 destroyed the model.

    Args:
      schedule: the noise schedule.
      anchor: ``checkpoint_var``, ``fisher`` or ``l2``, see :func:`~jaxunlearn.objectives.anchor.anchored`; it says what
        ``ref_params`` must be.
      error: of the forget term.
      forget_error: of the forget term (``error`` if None); wrap it to select times or frequencies.

    Raises:
      ValueError: unknown anchor; ``ref_params`` missing or of another form.
    """
    return anchored(_named("vdu_style", neggrad(schedule, error=error, forget_error=forget_error)), anchor)


def fisher_anchor(
    schedule: Schedule,
    *,
    anchor: str = "fisher",
    error: Error = sum_squares,
    forget_error: Error | None = None,
) -> PerExampleObjective:
    """``{keep: err(x_t), forget: err(a_t), anchor: 1/2 sum F (theta - theta0)^2}``, forget ascended.

    The combination with plain ascent is our own. There is no known weight for the anchor; with a Fisher diagonal of mean 1
    a weight w pulls a parameter of mean importance with ``w (theta - theta0)``.

    Args:
      schedule: the noise schedule.
      anchor: ``fisher``, ``checkpoint_var`` or ``l2``, see :func:`~jaxunlearn.objectives.anchor.anchored`; it says what
        ``ref_params`` must be.
      error: of the keep term.
      forget_error: of the forget term (``error`` if None); wrap it to select times or frequencies.

    Raises:
      ValueError: unknown anchor; ``ref_params`` missing or of another form.
    """
    return anchored(_named("fisher_anchor", siss_no_is(schedule, error=error, forget_error=forget_error)), anchor)


def _named(name: str, objective: PerExampleObjective) -> PerExampleObjective:
    return PerExampleObjective(objective.function, objective.terms, objective.forget_sign, name=name)
