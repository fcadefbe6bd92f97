"""jaxunlearn: data unlearning in diffusion models, as pure functions in JAX.

The names below are all a training loop needs; models, files and metrics are in ``jaxunlearn.models``, ``jaxunlearn.io`` and
``jaxunlearn.metrics``, which bring their own dependencies.
"""

from jaxunlearn import (
    combine,
    errors,
    forgetting,
    frequency,
    guards,
    guidance,
    images,
    masks,
    methods,
    objectives,
    parallel,
    predictors,
    responsibility,
    sampling,
    schedule,
    score_matching,
    selection,
    spectrum,
    step,
    timesteps,
    types,
)
from jaxunlearn.combine import erasediff as erasediff_combine
from jaxunlearn.combine import fixed_norm, pcgrad, relative_norm, weighted_sum
from jaxunlearn.errors import filtered, mean_squares, sum_squares, weighted
from jaxunlearn.forgetting import Measurement, StopRule, forget_level
from jaxunlearn.frequency import band, high_pass, low_pass
from jaxunlearn.guards import anchor, l2_ball, mask_updates, plasticity_reserve
from jaxunlearn.methods import METHODS
from jaxunlearn.objectives import (
    bernoulli,
    clamped,
    denoise,
    dpo,
    erasediff,
    fisher_anchor,
    kto,
    mirrored,
    naive,
    neggrad,
    npo,
    retrack,
    simnpo,
    siss,
    siss_no_is,
    surrogate,
    vdu_style,
)
from jaxunlearn.schedule import Schedule
from jaxunlearn.selection import Choice, choose
from jaxunlearn.step import init_state, make_train_step
from jaxunlearn.timesteps import smooth_window, window
from jaxunlearn.types import Batch, Draw, Example, TrainState

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Choice",
    "Draw",
    "Example",
    "METHODS",
    "Measurement",
    "Schedule",
    "StopRule",
    "TrainState",
    "anchor",
    "band",
    "bernoulli",
    "choose",
    "clamped",
    "combine",
    "denoise",
    "dpo",
    "erasediff",
    "erasediff_combine",
    "errors",
    "filtered",
    "fisher_anchor",
    "fixed_norm",
    "forget_level",
    "forgetting",
    "frequency",
    "guards",
    "guidance",
    "high_pass",
    "images",
    "init_state",
    "kto",
    "l2_ball",
    "low_pass",
    "make_train_step",
    "mask_updates",
    "masks",
    "mean_squares",
    "methods",
    "mirrored",
    "naive",
    "neggrad",
    "npo",
    "objectives",
    "parallel",
    "pcgrad",
    "plasticity_reserve",
    "predictors",
    "relative_norm",
    "responsibility",
    "retrack",
    "sampling",
    "schedule",
    "score_matching",
    "selection",
    "simnpo",
    "siss",
    "siss_no_is",
    "smooth_window",
    "spectrum",
    "step",
    "sum_squares",
    "surrogate",
    "timesteps",
    "types",
    "vdu_style",
    "weighted",
    "weighted_sum",
    "window",
]
